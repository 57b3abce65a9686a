"""The stream of weights from a policy to its engine, with LoRA deltas added on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rl.model.adapters import adapters_of, original_name


class PolicyWeights:
    """Every weight under its Hugging Face name: nothing is merged in place, nothing drifts."""

    def __init__(self, model: PreTrainedModel, canary: Callable[[], tuple[list[int], list[float]]]) -> None:
        self.model, self.canary = model, canary

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                continue
            value = parameter.detach()
            for layer in adapters_of(self.model, name):
                # In fp32: rounding to the engine's dtype happens once, on arrival.
                value = value.float() + sum(layer.get_delta_weight(a).float() for a in layer.active_adapters)
            yield original_name(name), value
