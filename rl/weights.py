"""The stream of weights from a policy to its engine, with LoRA deltas added on the way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from rl.policy import Policy

BASE = ".base_layer."


class PolicyWeights:
    """Every weight under its Hugging Face name: nothing is merged in place, nothing drifts."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        model = self.policy.model
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                continue
            value = parameter.detach()
            for layer in _adapters(model, name):
                # In fp32: rounding to the engine's dtype happens once, on arrival.
                value = value.float() + sum(layer.get_delta_weight(a).float() for a in layer.active_adapters)
            yield original_name(name), value

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


def original_name(name: str) -> str:
    """The name of an adapted tensor without its adapters; those of several tensors of a module are nested."""
    while BASE in name:
        name = name.replace(BASE, ".", 1)
    return name


def unsent(model: PreTrainedModel) -> list[str]:
    """Trainable tensors whose change would not reach the engine: they are neither streamed themselves, nor
    part of an adapter whose delta has the shape of a streamed tensor.
    """
    covered: set[int] = set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for layer in _adapters(model, name):
                if all(layer.get_delta_weight(a).shape == parameter.shape for a in layer.active_adapters):
                    covered.update(map(id, _own(layer)))
    return [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and "lora_" in name and id(p) not in covered
    ]


def _own(layer: Any) -> Iterator[Tensor]:
    """Parameters of an adapter, without those of what it adapts."""
    return (p for name, p in layer.named_parameters() if not name.startswith("base_layer."))


def _adapters(model: PreTrainedModel, name: str) -> Iterator[Any]:
    """The adapters of one tensor: a chain of them stands before a module, and each adapts one of its
    tensors.
    """
    if BASE not in name:
        return
    path, leaf = name.split(BASE)[0], name.rsplit(BASE, 1)[1]
    layer = cast(Any, model.get_submodule(path))
    while hasattr(layer, "base_layer"):
        if getattr(layer, "parameter_name", "weight") == leaf and hasattr(layer, "get_delta_weight"):
            yield layer
        layer = layer.base_layer
