"""The stream of weights from a policy to its engine, with LoRA deltas added on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from rl.model.adapters import adapters_of, original_name


class Streamed(Protocol):
    """What the stream needs of a policy."""

    model: Any
    scorer: Any
    canary_ids: list[int]

    @property
    def device(self) -> torch.device: ...

    def set_packed(self, packed: bool) -> None: ...

    def autocast(self) -> AbstractContextManager[Any]: ...


class PolicyWeights:
    """Every weight under its Hugging Face name: nothing is merged in place, nothing drifts."""

    def __init__(self, policy: Streamed) -> None:
        self.policy = policy

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        model = self.policy.model
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                continue
            value = parameter.detach()
            for layer in adapters_of(model, name):
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
