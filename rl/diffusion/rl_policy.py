"""A masked diffusion model as a policy of `rl.policy`: same loop, losses and checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest

import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from rl.batch import Batch, idle_micro_batch
from rl.config.diffusion import DiffusionModelConfig
from rl.config.diffusion_rl import MaskedRunConfig
from rl.diffusion.elbo import idle_row
from rl.diffusion.estimators import Plan, count_repeats, draw_plan, score
from rl.diffusion.model import DiffusionScorer
from rl.diffusion.policy import DiffusionPolicy
from rl.model.bidirectional import Documents
from rl.policy import Prepared, Reference, Scores
from rl.references import Copy
from rl.sharded import GatheredWeights, make_mesh, shard
from rl.types import WeightStream
from rl.world import World


class MaskedPolicy:
    """The model being trained. Its log-probs are the estimates of `diffusion.estimator`, on masks drawn in
    `prepare`: old, current and reference policy see the same ones. Each pass of `train.num_epochs` has its
    own masks, as in d1 and ESPO.

    Args:
        name: folder or hub name; `config.model.name` with built-in names resolved.
    """

    shares_prompts = True  # its estimator counts the copies it makes in its own budget
    in_step = False
    sent: torch.dtype | None = None

    def __init__(self, config: MaskedRunConfig, accelerator: Accelerator, *, name: str) -> None:
        self.estimator, self.seed = config.diffusion.estimator, config.train.seed
        self.token_budget = config.token_budget
        self.is_coarse = config.is_coarse
        # Only a trace is scored under the distribution that was sampled from.
        self.temperature = config.sampling.temperature if self.estimator.name == "trace" else 1.0
        try:
            self.trained = DiffusionPolicy(diffusion_model_config(config), accelerator, name=name)
        except ValueError as error:  # it names the keys of recipes.llada
            said = re.sub(r"\bmodel\.(mask_token|shift)\b", r"diffusion.\1", str(error))
            raise ValueError(said) from error
        self.scorer.random_in_training = False
        self.scorer.train()
        t = self.trained
        self.peft_model, self.tokenizer, self.device = t.peft_model, t.tokenizer, t.device
        self.trainable, self.autocast, self.write_model = t.trainable, t.autocast, t.write_model
        self.backward, self.finish_gradients = t.backward, t.finish_gradients
        self.snapshot, self.load, self.load_weights = t.snapshot, t.load, t.load_weights

    @property
    def redraws(self) -> bool:
        """Whether log-probs are estimates on random masks, drawn anew for each pass over a batch."""
        e = self.estimator
        if e.name == "trace":
            return e.max_canvases is not None
        return e.name != "one_step" or e.prompt_mask > 0

    def step_metrics(self) -> dict[str, float]:
        return {}

    @property
    def scorer(self) -> DiffusionScorer:
        return self.trained.scorer

    @property
    def model(self) -> PreTrainedModel:
        return self.trained.model

    def prepare(self, batch: Batch, *, draw: int) -> list[Prepared]:
        repeats = count_repeats(row for micro_batch in batch.micro_batches for row in micro_batch.rows)
        prepared = []
        for micro_batch in (m.to(self.device) for m in batch.micro_batches):
            plan = draw_plan(
                micro_batch,
                self.estimator,
                draw=draw,
                mask_token_id=self.trained.mask_token_id,
                seed=self.seed,
                token_budget=self.token_budget,
                repeats=repeats,
            )
            prepared.append(Prepared(micro_batch, plan))
        return self._in_step(prepared) if self.in_step else prepared

    def split(self, reference: Reference | None, *, sent: torch.dtype) -> None:
        """Splits the weights over all processes, and those of the reference if it is a copy (`rl.sharded`).

        Args:
            sent: dtype of the sampler's weights.
        """
        mesh = make_mesh(self.device, self.trained.accelerator.num_processes, "full")
        copies = [reference.scorer] if isinstance(reference, Copy) else []
        for scorer in (self.scorer, *copies):
            shard(scorer, mesh, compute=torch.bfloat16 if self.is_coarse else torch.float32)
        self.in_step, self.sent, self.trained.sharded = True, sent, True
        self.backward = lambda loss, *, last: loss.backward()  # gradients are sums, in fp32

    def _in_step(self, prepared: list[Prepared]) -> list[Prepared]:
        """Adds idle micro-batches, and idle rows inside each, until all processes have equally many."""
        one = idle_row(self.trained.mask_token_id)
        one = replace(one, weights_L=torch.ones_like(one.weights_L)).to(self.device)
        slot = torch.zeros(1, dtype=torch.long, device=self.device)
        counts = [len(p.drawn.rows) for p in prepared]
        most = [
            max(all_) for all_ in zip_longest(*World(self.trained.accelerator).gather(counts), fillvalue=1)
        ]
        nothing = Prepared(idle_micro_batch().to(self.device), Plan([one], [slot]), is_idle=True)
        prepared = prepared + [nothing] * (len(most) - len(prepared))
        idle = [(one,) * (number - len(p.drawn.rows)) for p, number in zip(prepared, most, strict=True)]
        return [replace(p, drawn=replace(p.drawn, idle=i)) for p, i in zip(prepared, idle, strict=True)]

    def score(self, prepared: Prepared, *, ids_LK: Int[Tensor, "L K"] | None = None) -> Scores:
        """The estimate for each loss token, and the entropy of the distribution it was scored under.

        Raises:
            ValueError: `ids_LK` is given; only sampled tokens have estimates.
        """
        if ids_LK is not None:
            raise ValueError("a masked diffusion policy estimates only the sampled tokens, not other ids")
        return self.score_by(self.scorer, prepared)

    def score_by(self, scorer: nn.Module, prepared: Prepared) -> Scores:
        with self.autocast():
            return Scores(
                *score(scorer, prepared.drawn, prepared.batch, self.estimator, temperature=self.temperature)
            )

    def weights(self) -> WeightStream:
        return MaskedWeights(self) if self.sent is None else GatheredWeights(MaskedWeights(self), self.sent)


class MaskedWeights:
    """Every weight and LoRA adapter under its own name; and the canary of a diffusion model.

    Adapters are not merged. At small learning rates, the bf16 sum of weight and delta rounds to the weight
    for a hundred updates: the engine would sample from the base model.
    """

    def __init__(self, policy: MaskedPolicy) -> None:
        self.policy = policy

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, parameter.detach()) for name, parameter in self.policy.model.named_parameters())

    @torch.no_grad()
    def canary(self) -> tuple[list[int], list[float]]:
        """Ids from all over the vocabulary, and log p(ids[i] | ids[0] and masks) for i >= 1.

        Under bf16 they are the likeliest ids: rounding moves a log-prob of -20 by more than a lost weight
        would.
        """
        policy, mask = self.policy, self.policy.trained.mask_token_id
        size = policy.model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
        spread = [token for i in range(18) if (token := (i * 7919 + 13) % size) != mask][:16]
        ids = torch.tensor(spread, device=policy.device)
        canvas = torch.full_like(ids, mask)
        canvas[0] = ids[0]
        columns = torch.arange(1, len(ids), device=policy.device)
        documents = Documents.of([len(ids)], policy.device)
        scorer, training = policy.scorer, policy.scorer.training
        scorer.eval()
        with policy.autocast():
            if policy.is_coarse:
                ids[1:] = scorer.likeliest(canvas, documents, columns)
            logprobs = scorer(canvas, documents, columns, ids[1:])[0]
        scorer.train(training)
        return ids.tolist(), logprobs.float().tolist()


def diffusion_model_config(config: MaskedRunConfig) -> DiffusionModelConfig:
    """The keys of a run's config that loading needs."""
    shared = ("name", "revision", "dtype", "fused_layers", "gradient_checkpointing", "lora", "chat_template")
    return DiffusionModelConfig(
        mask_token=config.diffusion.mask_token,
        shift=config.diffusion.shift,
        **{name: getattr(config.model, name) for name in shared},
    )
