"""The trained model under accelerate: loading, log-probs, the reference, and the stream of weights to the
engine.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import sys
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from rl.batch import MicroBatch
from rl.config import ModelConfig
from rl.model.adapters import add_lora, check_adapted
from rl.model.exactness import (
    EAGER_LIMIT,
    backbone,
    honouring_attention,
    moving_rope,
    quiet,
    take_long_factors,
)
from rl.model.head import head_logprobs
from rl.model.loading import (
    check_vocabulary,
    context_length,
    load_model,
    load_tokenizer,
    nonfinite_parameters,
    storage_dtype,
    use_fused_layers,
)
from rl.model.packed import PACKED
from rl.model.saving import save_model
from rl.packed_check import plain_logprobs, probe_batch
from rl.types import WeightStream
from rl.weights import PolicyWeights

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
        self.longest = sys.maxsize

    def check_length(self, num_tokens: int) -> None:
        """Raises ValueError beyond the length from which on dynamic rotary frequencies depend on the longest
        sequence so far, so that a log-prob has no value of its own.
        """
        if num_tokens > self.longest:
            raise ValueError(
                f"a sequence of {num_tokens} tokens exceeds the {self.longest} from which on the dynamic "
                "rotary frequencies of this model depend on what was computed before; lower "
                "sampling.max_completion_length and leave out long prompts"
            )

    def train(self, mode: bool = True) -> CausalScorer:
        """In both modes nothing random is active; only gradient checkpointing follows `mode`."""
        super().train(mode)
        quiet(self.model, checkpointing=mode)
        return self

    def forward(
        self, batch: MicroBatch, temperature: float
    ) -> tuple[Float[Tensor, " L"], Float[Tensor, " L"]]:
        """Log-prob of each loss token and entropy of its distribution, in nats, at the sampling
        temperature.
        """
        hidden_LD = self._packed_hidden(batch) if self.packed else self._row_hidden(batch)
        return head_logprobs(self.model, hidden_LD, batch.targets_L, temperature=temperature)

    def _packed_hidden(self, batch: MicroBatch) -> Float[Tensor, "L D"]:
        hidden_1ND = backbone(self.model)(
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
        pieces: list[Tensor] = []
        sequence = 0
        for block in batch.blocks:
            prompt = batch.token_ids_N[block.start : block.completion_start]
            start = block.completion_start
            for length in block.completion_lengths:
                row = torch.cat([prompt, batch.token_ids_N[start : start + length]])
                self.check_length(len(row))
                hidden_TD = backbone(self.model)(input_ids=row[None], use_cache=False).last_hidden_state[0]
                # Not the prompt's columns of a sibling: a rotary embedding may depend on the row's length.
                columns = batch.columns_L[batch.sequence_ids_L == sequence]
                pieces.append(hidden_TD[columns - start + block.prompt_length - 1])
                start, sequence = start + length, sequence + 1
        return torch.cat(pieces)


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
        self.own_attention = honouring_attention(model)
        self.peft_model: Any = add_lora(model, config) if config.lora else None
        if config.lora:
            check_adapted(model, config)
        self.long_factors = False
        self.packing_fault: str | None = None
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
        """Chooses between packed rows and one sequence at a time, for the policy and its reference alike.
        Where packed rows were found to be wrong it stays with one at a time.
        """
        packed = packed and self.packing_fault is None
        for scorer in filter(None, (self.scorer, self.reference)):
            scorer.model.set_attn_implementation(PACKED if packed else self.own_attention)
            scorer.packed = packed

    def settle_attention(self, longest: int | None = None) -> str | None:
        """Turns packed rows on where they reproduce one-sequence-at-a-time log-probs, checked on this model;
        else says why not.

        Args:
            longest: tokens of the longest sequence that will be trained on.

        Raises:
            ValueError: the head is not a plain linear layer, so that log-probs from hidden states would be
                wrong; or attention=packed was asked for and is not exact; or `longest` is beyond what dynamic
                rotary frequencies can do.
        """
        rope = moving_rope(self.model)
        if rope and rope[0] == "longrope" and (longest or 0) > rope[1]:
            for scorer in filter(None, (self.scorer, self.reference)):
                take_long_factors(scorer.model)
            self.long_factors, rope = True, None
        if rope and "dynamic" in rope[0]:
            for scorer in filter(None, (self.scorer, self.reference)):
                scorer.longest = rope[1]
                scorer.check_length(longest or 0)
        batch = probe_batch(self.model, longest).to(self.device)
        tolerance = 2e-4 if storage_dtype(self.config) == torch.float32 else 0.15
        self.scorer.eval()
        with torch.no_grad():
            expected = self._settle_rows(batch, tolerance)
            reason = None if self.config.attention != "rows" else "model.attention=rows"
            if reason is None and rope and (longest is None or longest > rope[1]):
                reason = (
                    f"the rotary frequencies ({rope[0]}) of a whole row change when one of its sequences "
                    f"exceeds {rope[1]} tokens"
                )
            if reason is None:
                try:
                    reason = self._compare_packed(batch, expected, tolerance)
                except ValueError as error:
                    reason = str(error).splitlines()[0]
                except (TypeError, AttributeError, RuntimeError):
                    reason = (
                        f"the layers of {type(self.model).__name__} need an attention mask, or a shape that "
                        "a packed row does not have"
                    )
        self.scorer.train()
        if reason is not None:
            if self.config.attention == "packed":
                raise ValueError(f"model.attention=packed: {reason}; use model.attention=auto")
            self.packing_fault = reason
            self.set_packed(False)
        return reason

    def _settle_rows(self, batch: MicroBatch, tolerance: float) -> Float[Tensor, " L"]:
        """Log-probs of one sequence at a time, checked against the logits of eager attention, which honours
        every config. Where they differ because of the model's own attention, eager takes its place.
        """
        own = self.own_attention
        if batch.layout.longest <= EAGER_LIMIT:
            self.model.set_attn_implementation("eager")
        plain = plain_logprobs(self.model, batch)
        gap = math.inf
        for self.own_attention in dict.fromkeys((own, "eager")):
            self.set_packed(False)
            expected = self.scorer(batch, 1.0)[0]
            gap = self._gap(expected, plain)
            if gap <= tolerance:
                return expected
        if broken := nonfinite_parameters(self.model) if math.isnan(gap) else []:
            raise ValueError(
                f"{self.config.name}: {len(broken)} weights such as {broken[0]} hold NaN or infinity; "
                "take an earlier checkpoint, or download the model again"
            )
        raise ValueError(
            f"{type(self.model).__name__}: log-probs from hidden states differ by {gap:.2g} nats from its "
            "own logits; its output head does more than a linear layer, a scale and a soft cap, and is not "
            "supported"
        )

    def _compare_packed(self, batch: MicroBatch, expected_L: Tensor, tolerance: float) -> str | None:
        """Why packed rows may not be used: they are off in the storage dtype, or off in the compute dtype by
        more than rounding moves one sequence at a time (fused kernels take 16 bits only).
        """
        with self.autocast():
            rounded = self._gap(self.scorer(batch, 1.0)[0], expected_L)
        self.set_packed(True)
        gap = self._gap(self.scorer(batch, 1.0)[0], expected_L)
        if not gap <= tolerance:
            return (
                f"packed log-probs differ by {gap:.2g} nats: something beside attention looks along the row, "
                "or attention takes distances or a window from elsewhere"
            )
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
        packed = self.scorer.packed
        self.set_packed(False)
        save_model(target, self.model, folder)
        self.set_packed(packed)
        self.tokenizer.save_pretrained(folder)
        config_file = folder / "config.json"
        if config_file.exists():
            config_file.write_text(
                json.dumps(json.loads(config_file.read_text()) | {"dtype": compute}, indent=2) + "\n"
            )
