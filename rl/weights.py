"""The stream of weights from a policy to its engine, with LoRA deltas added on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rl.model.adapters import adapter_parameters, adapters_of, original_name, unsent
from rl.model.streamed import streamed

CANARY_TEXT = (
    "Cohort counts: one, two, three, four. The answer to 17 + 25 is \\boxed{42}, and the sky is blue. "
    "A farmer has 12 cows and buys 8 more, so that she has 12 + 8 = 20 cows. If each of them gives 15 liters "
    "of milk a day, then all of them together give 20 * 15 = 300 liters a day, which is 2100 a week."
)
CANARY_LENGTH = 64  # tokens: more than a block of the engine's cache


def canary_ids(tokenizer: Any, context: int | None) -> list[int]:
    """Ids of the canary's text that a model of `context` positions (None: no limit) can read."""
    ids: list[int] = tokenizer(CANARY_TEXT, add_special_tokens=False)["input_ids"]
    return ids[: min(CANARY_LENGTH, (context or CANARY_LENGTH + 1) - 1)]


def check_streamed(model: PreTrainedModel) -> None:
    """Raises ValueError if a trainable tensor of the model changes nothing that an engine is sent."""
    if lost := unsent(model):
        raise ValueError(
            f"model.lora.target_modules: {len(lost)} weights such as {lost[0]} would be trained but not "
            "reach the engine, because their adapter has no delta in the shape of the weight it adapts; name "
            "other layers"
        )


class PolicyWeights:
    """Every weight under its Hugging Face name. Deltas are added to copies: merging in place would drift.

    The tensors are looked up once, when the stream is made, so each sync makes a new one.
    """

    def __init__(self, model: PreTrainedModel, canary: Callable[[], tuple[list[int], list[float]]]) -> None:
        self.model, self.canary = model, canary
        own = adapter_parameters(model)
        self._tensors = [(name, tensor) for name, tensor in streamed(model) if id(tensor) not in own]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._tensors:
            value = tensor.detach()
            for layer in adapters_of(self.model, name):
                # In fp32: rounding to the engine's dtype happens once, on arrival.
                with torch.no_grad():
                    deltas = [layer.get_delta_weight(a).float() for a in layer.active_adapters]
                    value = value.float() + sum(deltas)
            yield original_name(name), value
