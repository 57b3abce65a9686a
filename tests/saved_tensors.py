"""What autograd keeps of a forward pass, counted by torch's own hooks."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def bytes_kept(model: Any, dtype: str, num_tokens: int, **given: Any) -> int:
    """Bytes that a pass of one row without a head holds for its backward pass, weights left out.

    Args:
        dtype: of the config, as the policy computes.
        given: to the model, besides the row.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # holds them, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16) if dtype == "bf16-mixed" else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        output = model.base_model(input_ids=torch.arange(num_tokens)[None], use_cache=False, **given)
    assert output.last_hidden_state.requires_grad
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in weights)
