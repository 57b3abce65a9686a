"""The trained model under accelerate: loading, log-probs, the reference, and the stream of weights to the
engine.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from rl.attention import PACKED
from rl.batch import MicroBatch, PackRules, pack
from rl.config import ModelConfig
from rl.loading import (
    add_lora,
    check_vocabulary,
    context_length,
    load_model,
    load_tokenizer,
    nonfinite_parameters,
    storage_dtype,
    use_fused_layers,
)
from rl.logprobs import head_logprobs
from rl.saving import save_model
from rl.types import Completion, Group, Prompt, Reward, ScoredGroup, VersionSpan, WeightStream

CANARY_TEXT = (
    "Cohort counts: one, two, three, four. The answer to 17 + 25 is \\boxed{42}, and the sky is blue. "
    "A farmer has 12 cows and buys 8 more, so that she has 12 + 8 = 20 cows. If each of them gives 15 liters "
    "of milk a day, then all of them together give 20 * 15 = 300 liters a day, which is 2100 a week."
)
CANARY_LENGTH = 64  # tokens: more than a block of the engine's cache


class CausalScorer(nn.Module):
    """A causal language model that answers with log-probs of given tokens instead of logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.packed = False

    def forward(
        self, batch: MicroBatch, temperature: float
    ) -> tuple[Float[Tensor, " L"], Float[Tensor, " L"]]:
        """Log-prob of each loss token and entropy of its distribution, in nats, at the sampling
        temperature.
        """
        hidden_LD = self._packed_hidden(batch) if self.packed else self._row_hidden(batch)
        return head_logprobs(self.model, hidden_LD, batch.targets_L, temperature=temperature)

    def _packed_hidden(self, batch: MicroBatch) -> Float[Tensor, "L D"]:
        hidden_1ND = self.model.base_model(
            input_ids=batch.token_ids_N[None],
            position_ids=batch.positions_N[None],
            use_cache=False,
            cohort_layout=batch.layout,
        ).last_hidden_state
        return hidden_1ND[0, batch.predecessors_L]

    def _row_hidden(self, batch: MicroBatch) -> Float[Tensor, "L D"]:
        """One sequence at a time through the model's own attention: slow, exact, for models that packing
        cannot serve.
        """
        hidden_ND: list[Tensor] = []
        for block in batch.blocks:
            prompt = batch.token_ids_N[block.start : block.completion_start]
            start = block.completion_start
            for i, length in enumerate(block.completion_lengths):
                row = torch.cat([prompt, batch.token_ids_N[start : start + length]])
                hidden = self.model.base_model(input_ids=row[None], use_cache=False).last_hidden_state[0]
                # The prompt's columns are filled by the first completion; its last one predicts every first
                # token alike.
                hidden_ND.append(hidden if i == 0 else hidden[block.prompt_length :])
                start += length
        return torch.cat(hidden_ND)[batch.predecessors_L]


class Policy:
    """The model being trained, its tokenizer, and the reference of the KL term."""

    redraws = False  # its log-probs are exact, and the same in each pass over a batch

    def __init__(
        self, config: ModelConfig, accelerator: Accelerator, *, temperature: float, with_reference: bool
    ) -> None:
        self.config, self.accelerator, self.temperature = config, accelerator, temperature
        self.tokenizer = load_tokenizer(config)
        model = load_model(config)
        check_vocabulary(cast(Any, model.get_input_embeddings()).weight.shape[0], self.tokenizer)
        if accelerator.device.type == "cuda":
            use_fused_layers(model.to(accelerator.device), config)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.peft_model: Any = add_lora(model, config) if config.lora else None
        self.own_attention = cast(str, model.config._attn_implementation)
        self.scorer = CausalScorer(model).to(accelerator.device)
        self.scorer.train()
        self.reference: CausalScorer | None = None
        if with_reference and not config.lora:
            self.reference = copy.deepcopy(self.scorer).requires_grad_(False).eval()
        self.with_reference = with_reference
        context = context_length(model.config) or sys.maxsize
        text_ids = self.tokenizer(CANARY_TEXT, add_special_tokens=False)["input_ids"]
        self.canary_ids: list[int] = text_ids[: min(CANARY_LENGTH, context - 1)]

    @property
    def model(self) -> PreTrainedModel:
        return self.scorer.model

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    @property
    def shares_prompts(self) -> bool:
        """Whether a prompt is computed once for all its completions in a micro-batch."""
        return self.scorer.packed

    def set_packed(self, packed: bool) -> None:
        """Chooses between packed rows and one sequence at a time, for the policy and its reference alike."""
        for scorer in filter(None, (self.scorer, self.reference)):
            scorer.model.set_attn_implementation(PACKED if packed else self.own_attention)
            scorer.packed = packed

    def settle_attention(self) -> str | None:
        """Turns packed rows on where they reproduce one-sequence-at-a-time log-probs, checked on this model;
        else says why not.

        Raises:
            ValueError: the head is not a plain linear layer, so that log-probs from hidden states would be
                wrong; or attention=packed was asked for and is not exact.
        """
        batch = probe_batch(self.model).to(self.device)
        tolerance = 2e-4 if storage_dtype(self.config) == torch.float32 else 0.15
        self.scorer.eval()
        self.set_packed(False)
        with torch.no_grad():
            expected = self.scorer(batch, 1.0)[0]
            gap = self._gap(expected, _plain_logprobs(self.model, batch))
            if broken := nonfinite_parameters(self.model) if math.isnan(gap) else []:
                raise ValueError(
                    f"{self.config.name}: {len(broken)} weights such as {broken[0]} hold NaN or infinity; "
                    "take an earlier checkpoint, or download the model again"
                )
            if not gap <= tolerance:
                raise ValueError(
                    f"{type(self.model).__name__}: log-probs from hidden states differ by {gap:.2g} nats "
                    "from its own logits; "
                    "its output head does more than a linear layer, a scale and a soft cap, and is not "
                    "supported"
                )
            reason = None if self.config.attention != "rows" else "model.attention=rows"
            if reason is None:
                try:
                    reason = self._packing_fault(batch, expected, tolerance)
                except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
                    reason = str(error).splitlines()[0]
        self.scorer.train()
        if reason is not None:
            if self.config.attention == "packed":
                raise ValueError(f"model.attention=packed: {reason}; use model.attention=auto")
            self.set_packed(False)
        return reason

    def _packing_fault(self, batch: MicroBatch, expected_L: Tensor, tolerance: float) -> str | None:
        """Why packed rows may not be used: they are off in the storage dtype, or off in the compute dtype by
        more than rounding moves one sequence at a time (fused kernels take 16 bits only).
        """
        with self.autocast():
            rounded = self._gap(self.scorer(batch, 1.0)[0], expected_L)
        self.set_packed(True)
        gap = self._gap(self.scorer(batch, 1.0)[0], expected_L)
        if not gap <= tolerance:
            return f"packed log-probs differ by {gap:.2g} nats"
        with self.autocast():
            gap = self._gap(self.scorer(batch, 1.0)[0], expected_L)
        if not gap <= 4 * rounded + tolerance:
            return f"packed log-probs differ by {gap:.2g} nats, and rounding alone by {rounded:.2g}"
        return None

    def _gap(self, ours_L: Tensor, theirs_L: Tensor) -> float:
        """The greatest gap in nats; of weights in bf16 the mean, as rounding has single tokens at 0.3."""
        gaps_L = (ours_L - theirs_L).abs()
        return (gaps_L.max() if storage_dtype(self.config) == torch.float32 else gaps_L.mean()).item()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.dtype == "bf16-mixed":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def logprobs(self, batch: MicroBatch) -> tuple[Float[Tensor, " L"], Float[Tensor, " L"]]:
        """Log-probs of the loss tokens under the sampling distribution (temperature applied) and its
        entropies.
        """
        with self.autocast():
            return self.scorer(batch, self.temperature)

    @torch.no_grad()
    def reference_logprobs(self, batch: MicroBatch) -> Float[Tensor, " L"]:
        """The same under the reference: a frozen copy, or the base model below the LoRA adapter."""
        with self.autocast():
            if self.reference is not None:
                return self.reference(batch, self.temperature)[0]
            with self.peft_model.disable_adapter():
                return self.scorer(batch, self.temperature)[0]

    @torch.no_grad()
    def move_reference(self, mixup: float) -> None:
        """reference <- mixup * policy + (1 - mixup) * reference."""
        assert self.reference is not None
        for theirs, ours in zip(self.reference.parameters(), self.scorer.parameters(), strict=True):
            theirs.lerp_(ours.to(theirs.dtype), mixup)

    def load_weights(self, folder: Path) -> None:
        """Weights (or the adapter) that `write_model` wrote, bit for bit; the reference stays what it was."""
        if self.peft_model is not None:
            from peft import load_peft_weights, set_peft_model_state_dict

            set_peft_model_state_dict(
                self.peft_model, load_peft_weights(str(folder), device=str(self.device))
            )
            return
        saved = load_model(self.config.model_copy(update={"name": str(folder), "revision": None}))
        self.model.load_state_dict(saved.state_dict())

    def weights(self) -> WeightStream:
        return PolicyWeights(self)

    def write_model(self, folder: Path) -> None:
        """Plain Hugging Face form: a model folder, or the adapter's folder with LoRA; the tokenizer beside
        it.

        Weights keep their storage dtype; config.json names the compute dtype, so that `from_pretrained` and
        vLLM load it as trained.
        """
        target = self.peft_model or self.model
        compute = "bfloat16" if self.config.dtype != "fp32" else "float32"
        implementation = self.model.config._attn_implementation
        self.model.set_attn_implementation(self.own_attention)
        save_model(target, self.model, folder)
        self.model.set_attn_implementation(cast(str, implementation))
        self.tokenizer.save_pretrained(folder)
        config_file = folder / "config.json"
        if config_file.exists():
            config_file.write_text(
                json.dumps(json.loads(config_file.read_text()) | {"dtype": compute}, indent=2) + "\n"
            )


class PolicyWeights:
    """Every weight under its Hugging Face name, with LoRA deltas added on the way: nothing is merged in
    place, nothing drifts.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        model = self.policy.model
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                continue
            value = parameter.detach()
            if ".base_layer." in name:
                layer = cast(Any, model.get_submodule(name.split(".base_layer.")[0]))
                if name.endswith("weight"):
                    # In fp32: rounding to the engine's dtype happens once, on arrival.
                    value = value.float() + sum(
                        layer.get_delta_weight(a).float() for a in layer.active_adapters
                    )
                name = name.replace(".base_layer.", ".")
            yield name, value

    @torch.no_grad()
    def canary(self) -> tuple[list[int], list[float]]:
        ids = torch.tensor(self.policy.canary_ids, device=self.policy.device)
        scorer = self.policy.scorer
        packed, training = scorer.packed, scorer.training
        self.policy.set_packed(False)
        scorer.eval()
        with self.policy.autocast():
            logits = scorer.model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        scorer.train(training)
        self.policy.set_packed(packed)
        return ids.tolist(), torch.log_softmax(logits, -1).gather(-1, ids[1:, None]).squeeze(-1).tolist()


def probe_batch(model: PreTrainedModel) -> MicroBatch:
    """Ragged groups with shared prompts, longer than the model's sliding window where that is short."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    extra = window + 3 if window <= 64 else 0
    generator = torch.Generator().manual_seed(0)
    groups = []
    for prompt_length, lengths in ((5, (3, 1, 7 + extra)), (2 + extra, (4, 2)), (1, (1,))):
        draw = lambda n: torch.randint(0, config.vocab_size, (n,), generator=generator).tolist()  # noqa: E731
        completions = [Completion(draw(n), [], [True] * n, "stop", [VersionSpan(0, n)]) for n in lengths]
        prompt = Prompt("probe", "", tuple(draw(prompt_length)))
        groups.append(ScoredGroup(Group(prompt, completions), [Reward(0.0)] * len(completions)))
    rules = PackRules(token_budget=1 << 20, row_weight=lambda *counts: 1.0, skip_without_signal=False)
    return pack(groups, [[0.0] * len(g.completions) for g in groups], rules)[0].micro_batches[0]


def _plain_logprobs(model: PreTrainedModel, batch: MicroBatch) -> Float[Tensor, " L"]:
    """Log-probs by the model's own logits, one sequence at a time, in the order of the loss tokens."""
    pieces = []
    for block in batch.blocks:
        start = block.completion_start
        for length in block.completion_lengths:
            prompt = batch.token_ids_N[block.start : block.completion_start]
            row = torch.cat([prompt, batch.token_ids_N[start : start + length]])
            logits = (
                model(input_ids=row[None], use_cache=False).logits[0, block.prompt_length - 1 : -1].float()
            )
            pieces.append(
                torch.log_softmax(logits, -1).gather(-1, row[block.prompt_length :, None]).squeeze(-1)
            )
            start += length
    return torch.cat(pieces)
