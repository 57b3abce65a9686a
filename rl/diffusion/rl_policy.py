"""A masked diffusion model as a policy of `rl.policy`: same loop, losses and checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor, nn

from rl.batch import Batch, idle_micro_batch
from rl.config.diffusion import DiffusionModelConfig
from rl.config.diffusion_rl import MaskedRunConfig
from rl.diffusion.elbo import idle_row
from rl.diffusion.estimators import Plan, count_repeats, draw_plan, score
from rl.diffusion.policy import DiffusionPolicy
from rl.policy import Prepared, Scores
from rl.sharded import GatheredWeights
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

    def __init__(self, config: MaskedRunConfig, accelerator: Accelerator, *, name: str) -> None:
        self.estimator, self.seed = config.diffusion.estimator, config.train.seed
        self.token_budget = config.token_budget
        # Only a trace is scored under the distribution that was sampled from.
        self.temperature = config.sampling.temperature if self.estimator.name == "trace" else 1.0
        try:
            self.trained = DiffusionPolicy(diffusion_model_config(config), accelerator, name=name)
        except ValueError as error:  # it names the keys of recipes.llada
            said = re.sub(r"\bmodel\.(mask_token|shift)\b", r"diffusion.\1", str(error))
            raise ValueError(said) from error
        self.scorer.random_in_training = False
        self.scorer.train()
        self.trained.is_coarse = config.is_coarse

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["trained"], name)

    def split(self, split: Callable[[DiffusionPolicy], Any]) -> MaskedPolicy:
        """Splits the weights over processes: `split` makes the policy that replaces `trained`."""
        self.trained = split(self.trained)
        return self

    @property
    def redraws(self) -> bool:
        """Whether log-probs are estimates on random masks, drawn anew for each pass over a batch."""
        e = self.estimator
        if e.name == "trace":
            return e.max_canvases is not None
        return e.name != "one_step" or e.prompt_mask > 0

    def step_metrics(self) -> dict[str, float]:
        return {}

    def prepare(self, batch: Batch, *, draw: int) -> list[Prepared]:
        repeats = count_repeats(row for micro_batch in batch.micro_batches for row in micro_batch.rows)
        prepared = []
        for micro_batch in (m.to(self.device) for m in batch.micro_batches):
            plan = draw_plan(
                micro_batch,
                self.estimator,
                draw=draw,
                mask_token_id=self.mask_token_id,
                seed=self.seed,
                token_budget=self.token_budget,
                repeats=repeats,
            )
            prepared.append(Prepared(micro_batch, plan))
        return self._in_step(prepared) if self.in_step else prepared

    def _in_step(self, prepared: list[Prepared]) -> list[Prepared]:
        """Adds idle micro-batches, and idle rows inside each, until all processes have equally many."""
        one = idle_row(self.mask_token_id)
        one = replace(one, weights_L=torch.ones_like(one.weights_L)).to(self.device)
        slot = torch.zeros(1, dtype=torch.long, device=self.device)
        counts = [len(p.drawn.rows) for p in prepared]
        most = [max(all_) for all_ in zip_longest(*World(self.accelerator).gather(counts), fillvalue=1)]
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
        return GatheredWeights(MaskedWeights(self), self.sent) if self.in_step else MaskedWeights(self)


class MaskedWeights:
    """Every weight and LoRA adapter under its own name; and the canary of a diffusion model.

    Adapters are not merged. At small learning rates, the bf16 sum of weight and delta rounds to the weight
    for a hundred updates: the engine would sample from the base model.
    """

    def __init__(self, policy: MaskedPolicy) -> None:
        self.model, self.canary = policy.model, policy.canary

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, parameter.detach()) for name, parameter in self.model.named_parameters())


def diffusion_model_config(config: MaskedRunConfig) -> DiffusionModelConfig:
    """The keys of a run's config that loading needs."""
    shared = ("name", "revision", "dtype", "fused_layers", "gradient_checkpointing", "lora", "chat_template")
    return DiffusionModelConfig(
        mask_token=config.diffusion.mask_token,
        shift=config.diffusion.shift,
        **{name: getattr(config.model, name) for name in shared},
    )
