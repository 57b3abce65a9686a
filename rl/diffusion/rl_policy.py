"""A masked diffusion model behind the surface of `rl.policy.Policy`: same loop, losses and checkpoints."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from rl.batch import MicroBatch
from rl.config.diffusion import DiffusionModelConfig
from rl.config.diffusion_rl import MaskedRunConfig
from rl.diffusion.estimators import draw_plan, score
from rl.diffusion.model import DiffusionScorer, hidden_states, logits_at
from rl.diffusion.policy import DiffusionPolicy
from rl.model.bidirectional import Documents
from rl.types import WeightStream


class MaskedPolicy:
    """The model being trained, and the reference of the KL term.

    `logprobs` are the estimates of `diffusion.estimator`, on masks that a micro-batch keeps: whichever of
    old, current and reference policy comes first draws them, the others see the same. Each pass of
    `train.num_epochs` has masks of its own, as d1 and ESPO have.

    Args:
        name: folder or hub name; `config.model.name` with built-in names resolved.
    """

    shares_prompts = True  # its estimator counts the copies it makes in a budget of its own

    def __init__(self, config: MaskedRunConfig, accelerator: Accelerator, *, name: str) -> None:
        self.config, self.accelerator = config.model, accelerator
        self.estimator, self.seed = config.diffusion.estimator, config.train.seed
        self.token_budget = config.train.token_budget
        self.is_coarse = config.is_coarse
        # Only a trace is scored under the distribution that was sampled from.
        self.temperature = config.sampling.temperature if self.estimator.name == "trace" else 1.0
        try:
            self.trained = DiffusionPolicy(diffusion_model_config(config), accelerator, name=name)
        except ValueError as error:  # by the keys of recipes.llada
            said = re.sub(r"\bmodel\.(mask_token|shift)\b", r"diffusion.\1", str(error))
            raise ValueError(said) from error
        self.scorer.random_in_training = False
        self.scorer.train()
        self.reference: DiffusionScorer | None = None
        self.with_reference = config.loss.kl_coef > 0
        if self.with_reference and not config.model.lora:
            self.reference = copy.deepcopy(self.scorer).requires_grad_(False).eval()

    @property
    def redraws(self) -> bool:
        """Whether log-probs are estimates on random masks, new ones for each pass over a batch."""
        e = self.estimator
        if e.name == "trace":
            return e.max_canvases is not None
        return e.name != "one_step" or e.prompt_mask > 0

    @property
    def scorer(self) -> DiffusionScorer:
        return self.trained.scorer

    @property
    def model(self) -> PreTrainedModel:
        return self.trained.model

    @property
    def tokenizer(self) -> Any:
        return self.trained.tokenizer

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return self.trained.trainable()

    def settle_attention(self, longest: int | None = None) -> str | None:
        """Nothing to settle: loading proved that attention is bidirectional and documents do not mix."""
        return None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return self.trained.autocast()

    def logprobs(self, batch: MicroBatch) -> tuple[Float[Tensor, " L"], Float[Tensor, " L"]]:
        """The estimate for each loss token, and the entropy of what it was scored under."""
        return self._score(self.scorer, batch)

    @torch.no_grad()
    def reference_logprobs(self, batch: MicroBatch) -> Float[Tensor, " L"]:
        """The same under the reference: a frozen copy, or the base model below the LoRA adapter."""
        if self.reference is not None:
            return self._score(self.reference, batch)[0]
        with self.trained.peft_model.disable_adapter():
            return self._score(self.scorer, batch)[0]

    @torch.no_grad()
    def move_reference(self, mixup: float) -> None:
        """reference <- mixup * policy + (1 - mixup) * reference."""
        assert self.reference is not None
        for theirs, ours in zip(self.reference.parameters(), self.scorer.parameters(), strict=True):
            theirs.lerp_(ours.to(theirs.dtype), mixup)

    def load_weights(self, folder: Path) -> None:
        self.trained.load_weights(folder)

    def write_model(self, folder: Path) -> None:
        self.trained.write_model(folder)

    def weights(self) -> WeightStream:
        return MaskedWeights(self)

    def _score(self, scorer: DiffusionScorer, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        if batch.plan is None:
            batch.plan = draw_plan(
                batch,
                self.estimator,
                mask_token_id=self.trained.mask_token_id,
                seed=self.seed,
                token_budget=self.token_budget,
            )
        with self.autocast():
            return score(scorer, batch.plan, batch, self.estimator, temperature=self.temperature)


class MaskedWeights:
    """Every weight and LoRA adapter under its own name; and the canary of a diffusion model.

    Adapters are not merged: at small learning rates the bf16 sum of weight and delta is the weight itself for
    a hundred updates, and the engine would sample from the base model.
    """

    def __init__(self, policy: MaskedPolicy) -> None:
        self.policy = policy

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, parameter.detach()) for name, parameter in self.policy.model.named_parameters())

    @torch.no_grad()
    def canary(self) -> tuple[list[int], list[float]]:
        """Ids from all over the vocabulary, and log p(ids[i] | ids[0] and masks) for i >= 1.

        Where bf16 is in play the likeliest ids: in it a log-prob of -20 is uncertain by more than what a lost
        weight would change.
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
                hidden = hidden_states(policy.model, canvas, documents)
                ids[1:] = logits_at(policy.model, hidden, columns, documents).argmax(-1)
            logprobs = scorer(canvas, documents, columns, ids[1:])[0]
        scorer.train(training)
        return ids.tolist(), logprobs.float().tolist()


def diffusion_model_config(config: MaskedRunConfig) -> DiffusionModelConfig:
    """What loading needs of a run's config."""
    model = config.model
    return DiffusionModelConfig(
        name=model.name,
        revision=model.revision,
        dtype=model.dtype,
        mask_token=config.diffusion.mask_token,
        shift=config.diffusion.shift,
        fused_layers=model.fused_layers,
        gradient_checkpointing=model.gradient_checkpointing,
        lora=model.lora,
        chat_template=model.chat_template,
    )
