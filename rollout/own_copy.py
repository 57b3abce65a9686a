"""A transformers model that an engine keeps for itself in this process: its tensors, new weights, hashes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from rl.model.streamed import streamed
from rollout.fingerprint import HeldTensor, compared_part, fingerprints


def held_tensors(model: Any) -> dict[str, HeldTensor]:
    return {name: HeldTensor(tuple(p.shape), p.dtype, p.device, name) for name, p in streamed(model)}


@torch.no_grad()
def copy_weights(model: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Raises ValueError for a name or shape that the model lacks; weights before it have been copied."""
    own = dict(streamed(model))
    for name, tensor in weights:
        if name not in own or own[name].shape != tensor.shape:
            raise ValueError(
                f"this model has no weight {name} of shape {tuple(tensor.shape)}; send the same model's"
            )
        own[name].copy_(tensor)


def own_fingerprints(model: Any, tensors: Mapping[str, HeldTensor], version: int) -> dict[str, int]:
    return fingerprints((name, compared_part(p, tensors[name], version)) for name, p in streamed(model))
