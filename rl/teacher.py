"""A teacher, and what a policy learns from it: an advantage of each token, or a divergence over top-k ids."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rl.causal import CausalPolicy
from rl.config import ModelConfig
from rl.config.teacher import TeacherConfig
from rl.model.head import top_ids
from rl.model.loading import check_config, load_tokenizer
from rl.policy import Prepared, Scores


def forward_kl(teacher_LO: Float[Tensor, "L O"], student_LO: Float[Tensor, "L O"]) -> Float[Tensor, " L"]:
    """KL(teacher || student) = sum_o t (log t - log s), nats: covers whatever the teacher might say."""
    return (teacher_LO.exp() * (teacher_LO - student_LO)).sum(-1)


def reverse_kl(teacher_LO: Float[Tensor, "L O"], student_LO: Float[Tensor, "L O"]) -> Float[Tensor, " L"]:
    """KL(student || teacher), nats: leaves what the teacher would not say."""
    return forward_kl(student_LO, teacher_LO)


def jensen_shannon(teacher_LO: Float[Tensor, "L O"], student_LO: Float[Tensor, "L O"]) -> Float[Tensor, " L"]:
    """(KL(teacher || m) + KL(student || m)) / 2, m = (t + s) / 2 (arXiv:2306.13649 section 2, beta = 1/2)."""
    mean_LO = torch.logaddexp(teacher_LO, student_LO) - math.log(2)
    return (forward_kl(teacher_LO, mean_LO) + forward_kl(student_LO, mean_LO)) / 2


DIVERGENCES = {"forward": forward_kl, "reverse": reverse_kl, "jsd": jensen_shannon}


def lesson(
    config: TeacherConfig,
    taught: Scores,
    scores: Scores,
    *,
    old_L: Float[Tensor, " L"],
    weights_L: Float[Tensor, " L"],
    mask_L: Bool[Tensor, " L"],
) -> tuple[Float[Tensor, " L"], Float[Tensor, ""], dict[str, tuple[Tensor, Tensor]]]:
    """Advantages to add to those of rewards, a loss to add, and metrics: name -> (sum, count).

    sampled: A = coef (log teacher - log old policy) of a token, without a graph. On average over the token,
    A grad log p is minus the gradient of KL(policy || teacher) behind the same prefix.

    Otherwise: coef sum_L weight * divergence over the teacher's top-k ids and one outcome for all others. It
    is at most the divergence of the whole distributions, and equals it at k = vocabulary. Without the last
    outcome the reverse KL would be least where the student flees from the teacher's ids.

    Args:
        taught, scores: of teacher and policy; with log-probs of the teacher's top-k ids for a divergence.
        old_L: log-probs of the policy before the first update on this batch.
    """
    gap_L = taught.logprobs_L - old_L.detach()
    advantages_L, loss, means = torch.zeros_like(gap_L), gap_L.new_zeros(()), {"teacher/kl": -gap_L}
    if config.divergence == "sampled":
        advantages_L = config.coef * gap_L
    else:
        teacher_LO, student_LO = (
            torch.cat([cast(Tensor, x.logprobs_LK), cast(Tensor, x.rest_L)[:, None]], 1)
            for x in (taught, scores)
        )
        found_L = DIVERGENCES[config.divergence](teacher_LO, student_LO)
        loss = config.coef * torch.where(mask_L, weights_L * found_L, 0.0).sum()
        means |= {"teacher/divergence": found_L.detach(), "teacher/tail": teacher_LO[:, -1].exp()}
    sums = {name: (torch.where(mask_L, x, 0.0).sum(), mask_L.sum()) for name, x in means.items()}
    return advantages_L, loss, sums


class Teacher:
    """A frozen model of transformers beside the policy, packed like it where that is exact."""

    def __init__(
        self,
        config: TeacherConfig,
        model: ModelConfig,
        policy: CausalPolicy,
        *,
        longest: int,
        note: Callable[[str], None],
    ) -> None:
        """
        Args:
            model: where it is found.
            longest: tokens of the longest sequence.

        Raises:
            ValueError: its embedding has fewer rows than the policy's, so that it cannot read all ids.
        """
        self.config = config
        self.scorer = CausalPolicy(model, policy.accelerator, temperature=policy.temperature)
        embeddings: list[Any] = [x.model.get_input_embeddings() for x in (self.scorer, policy)]
        rows, self.num_ids = (len(x.weight) for x in embeddings)
        if rows < self.num_ids:
            raise ValueError(
                f"teacher.name={config.name!r} has {rows} embedding rows and the model {self.num_ids}, which "
                "may sample an id that the teacher cannot read; resize the teacher's embedding, and save it"
            )
        if (reason := self.scorer.settle_attention(longest)) is not None:
            note(f"the teacher reads one sequence at a time: {reason}")
        self.scorer.scorer.requires_grad_(False).eval()

    @torch.no_grad()
    def score(self, prepared: Prepared) -> Scores:
        """At the policy's temperature; with `ids_LK`, its likeliest ids, where a divergence reads them.

        A teacher with more embedding rows than the policy has padding there, which is among all other ids.
        """
        if self.config.divergence == "sampled":
            return self.scorer.score(prepared)
        scorer, batch = self.scorer.scorer, prepared.batch
        hidden_LD = scorer.hidden(batch)
        ids_LK = top_ids(scorer.model, hidden_LD, min(self.config.top_k, self.num_ids), num_ids=self.num_ids)
        return Scores(*scorer.answers(hidden_LD, batch, self.scorer.temperature, ids_LK), ids_LK=ids_LK)


def check_tokenizers(model: ModelConfig, tokenizer: Any, longest: int) -> None:
    """Compares a teacher's tokenizer with the policy's, id by id, before any weights are loaded.

    Raises:
        ValueError: an id stands for another token, or for none, in one of them; or the teacher has too few
            positions for `longest` tokens; or it has no tokenizer or config that can be read.
    """
    try:
        check_config(model, teachers := load_tokenizer(model), longest)
    except ValueError as error:
        raise ValueError(str(error).replace("model.name", "teacher.name")) from error
    ours, theirs = ({i: token for token, i in x.get_vocab().items()} for x in (tokenizer, teachers))
    differing = [i for i in sorted(ours.keys() | theirs.keys()) if ours.get(i) != theirs.get(i)]
    if differing:
        first = differing[0]
        raise ValueError(
            f"teacher.name={model.name!r} has another tokenizer: {len(differing):,} ids differ, the first is "
            f"{first}, {ours.get(first)!r} of the model and {theirs.get(first)!r} of the teacher, which "
            "scores the model's own ids; take one of the same family, or fine-tune on its texts (recipes.sft)"
        )
