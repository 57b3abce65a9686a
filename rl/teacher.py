"""A teacher, and what a policy learns from it: an advantage of each token, or a divergence over top-k ids."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rl.batch import MicroBatch, micro_batch_of
from rl.causal import CausalPolicy
from rl.config import ModelConfig
from rl.config.teacher import TeacherConfig
from rl.model.head import top_ids
from rl.model.loading import check_config, load_tokenizer, num_ids
from rl.policy import Prepared, Scores


def forward_kl(teacher_LO: Float[Tensor, "L O"], student_LO: Float[Tensor, "L O"]) -> Float[Tensor, " L"]:
    """KL(teacher || student) = sum_o t (log t - log s), in nats: mass-covering."""
    return (teacher_LO.exp() * (teacher_LO - student_LO)).sum(-1)


def reverse_kl(teacher_LO: Float[Tensor, "L O"], student_LO: Float[Tensor, "L O"]) -> Float[Tensor, " L"]:
    """KL(student || teacher), in nats: mode-seeking."""
    return forward_kl(student_LO, teacher_LO)


def jensen_shannon(teacher_LO: Float[Tensor, "L O"], student_LO: Float[Tensor, "L O"]) -> Float[Tensor, " L"]:
    """(KL(teacher || m) + KL(student || m)) / 2, m = (t + s) / 2 (arXiv:2306.13649 section 2, beta = 1/2)."""
    mean_LO = torch.logaddexp(teacher_LO, student_LO) - math.log(2)
    return (forward_kl(teacher_LO, mean_LO) + forward_kl(student_LO, mean_LO)) / 2


Ask = Callable[[list[list[int]], int], Sequence[Any]]
"""(rows of ids, k) -> of each row its `logprobs`, `top_ids` and `top_logprobs`, from the second token on."""
LEAST_REST = 1e-6
"""Least mass of all other ids: what a server's fp32 log-probs leave of 1 is rounding below it."""
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

    sampled: A = coef (log teacher - log old policy) of a token, without a graph. On average over sampled
    tokens, A grad log p is minus the gradient of KL(policy || teacher) given the same prefix.

    Otherwise: coef sum_L weight * divergence over the teacher's top-k ids and one outcome for all others. It
    is at most the divergence of the whole distributions, and equals it at k = vocabulary. Without the last
    outcome the reverse KL would be smallest where the student avoids the teacher's ids.

    Args:
        taught, scores: of teacher and policy; for a divergence, with log-probs of the teacher's top-k ids.
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


def as_taught(prepared: Prepared) -> Prepared:
    """The same completions, in the same order, after the prompts that a teacher reads. Nothing is replayed.

    It may exceed the token budget: its prompts are longer, but no graph of them is kept.
    """
    batch = prepared.batch
    if not any(row.prompt.teacher_token_ids for row in batch.rows):
        return prepared
    prompts = [row.prompt for row in batch.rows]
    read = [replace(p, token_ids=p.teacher_token_ids or p.token_ids) for p in prompts]  # idle rows have none
    rows = iter([replace(row, prompt=p) for row, p in zip(batch.rows, read, strict=True)])
    blocks = [[next(rows) for _ in block.completion_lengths] for block in batch.blocks]
    return replace(prepared, batch=micro_batch_of(blocks).to(batch.token_ids_N.device), drawn=None)


class Teacher:
    """The policy itself, or a frozen transformers model beside it, which reads packed rows where exact."""

    def __init__(
        self,
        config: TeacherConfig,
        model: ModelConfig | Ask | None,
        policy: CausalPolicy,
        *,
        longest: int,
        note: Callable[[str], None],
    ) -> None:
        """
        Args:
            model: where it is found; or a function that asks a server; None: the policy's current weights.
            longest: tokens of the longest sequence.

        Raises:
            ValueError: its embedding has fewer rows than the policy's, so it cannot read all ids.
        """
        self.config, self.scorer, self.ask = config, policy, model if callable(model) else None
        self.num_ids = num_ids(policy.model)
        if model is None or callable(model):
            return
        self.scorer = CausalPolicy(model, policy.accelerator, temperature=policy.temperature)
        if (rows := num_ids(self.scorer.model)) < self.num_ids:
            raise ValueError(
                f"teacher.name={config.name!r} has {rows} embedding rows and the model {self.num_ids}, which "
                "may sample an id that the teacher cannot read; resize the teacher's embedding, and save it"
            )
        if (reason := self.scorer.settle_attention(longest)) is not None:
            note(f"the teacher reads sequences without packing them: {reason}")
        self.scorer.scorer.requires_grad_(False).eval().padded &= not policy.shares_prompts  # else too wide

    @torch.no_grad()
    def score(self, prepared: Prepared) -> Scores:
        """Scores at the policy's temperature. Where a divergence needs them, `ids_LK` are its likeliest ids.

        Embedding rows beyond the policy's are padding; they count among all other ids.
        """
        prepared, scorer = as_taught(prepared), self.scorer.scorer
        if self.ask is not None:
            return self._asked(self.ask, prepared.batch)
        if self.config.divergence == "sampled":
            return self.scorer.score_by(scorer, prepared)
        batch, k = prepared.batch, min(self.config.top_k, self.num_ids)
        with self.scorer.autocast():
            hidden_LD = scorer.hidden(batch)
            ids_LK = top_ids(scorer.model, hidden_LD, k, num_ids=self.num_ids)
            return Scores(*scorer.answers(hidden_LD, batch, self.scorer.temperature, ids_LK), ids_LK=ids_LK)

    def _asked(self, ask: Ask, batch: MicroBatch) -> Scores:
        """What a server answers, at temperature 1. It gives no logits: all other ids get the rest of 1."""
        k, sequences = min(self.config.asked_ids, self.num_ids), list(batch.sequences())
        own, ids, tops = [], [], []
        for row, (tokens, prompt_length, start) in zip(
            ask([tokens.tolist() for tokens, *_ in sequences], k), sequences, strict=True
        ):
            at = batch.columns_L[batch.columns_L >= start] - start
            at = (at[at < len(tokens) - prompt_length] + prompt_length - 1).tolist()
            own += [row.logprobs[i] for i in at]
            ids += [row.top_ids[i] for i in at]
            tops += [row.top_logprobs[i] for i in at]
        found_L = torch.tensor(own, device=batch.columns_L.device)
        if not k:
            return Scores(found_L, torch.zeros_like(found_L))
        ids_LK, tops_LK = (torch.tensor(x, device=found_L.device) for x in (ids, tops))
        if (most := int(ids_LK.max())) >= self.num_ids:
            raise RuntimeError(
                f"teacher.url={self.config.url} has id {most} among its {k} likeliest, but the model has "
                f"ids below {self.num_ids}; use a smaller teacher.top_k, or teacher.divergence=sampled"
            )
        rest_L = (1 - tops_LK.double().exp().sum(-1)).clamp(min=LEAST_REST).log().float()
        return Scores(found_L, torch.zeros_like(found_L), tops_LK, rest_L, ids_LK)


def check_tokenizers(model: ModelConfig, tokenizer: Any, longest: int) -> None:
    """Compares a teacher's tokenizer with the policy's, id by id, before any weights are loaded.

    Raises:
        ValueError: an id differs between the two or is missing in one; or the teacher has too few positions
            for `longest` tokens; or its tokenizer or config cannot be read.
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
            f"{first}, {ours.get(first)!r} of the model and {theirs.get(first)!r} of the teacher, which must "
            "score the model's ids; take a teacher of its family, or fine-tune on its texts (recipes.sft)"
        )
