"""Reads experts on a CPU back from the order in which vLLM's kernel keeps them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_DIGIT = 128  # whole numbers below it are exact in every dtype, bfloat16 included
_ORDERS: dict[tuple[Any, ...], Tensor] = {}


def unpacked(packed: Tensor, rows: Sequence[int], parameter: str, pack: Callable[[Any], Any]) -> Tensor:
    """[E, *rows]: the values of `packed`, bit for bit, in the order in which they were loaded.

    Packing rearranges the values of each expert alike and may add zeros. The order is found by packing
    numbers.

    Args:
        rows: rows and columns of one expert.
        parameter: w13_weight or w2_weight.
        pack: vLLM's method that packs the experts of a layer.
    """
    key = (
        parameter,
        tuple(rows),
        packed.dtype,
        packed.shape[1:].numel(),
        type(getattr(pack, "__self__", pack)),
    )
    if key not in _ORDERS:
        _ORDERS[key] = _order(rows, parameter, packed, pack)
    return packed.detach().reshape(len(packed), -1)[:, _ORDERS[key]].view(len(packed), *rows)


def _order(rows: Sequence[int], parameter: str, packed: Tensor, pack: Callable[[Any], Any]) -> Tensor:
    """Where each value of an expert is in the packed one.

    Raises:
        ValueError: packing loses or changes values, so that nothing could prove what the kernel holds.
    """
    size = math.prod(rows)
    numbers, found, scale = torch.arange(1, size + 1), torch.zeros(packed[0].numel(), dtype=torch.long), 1
    while scale <= size:
        digits = (numbers // scale % _DIGIT).view(1, *rows)
        found += scale * _packed(digits.to(packed.dtype), parameter, pack).flatten().round().long()
        scale *= _DIGIT
    places = found.nonzero().flatten()
    if not torch.equal(found[places].sort().values, numbers):
        raise ValueError(
            f"vLLM's kernel on this CPU packs {parameter} in a way that cannot be read back, so nothing "
            "would prove that new experts arrived; use engine.name=transformers"
        )
    order = torch.empty(size, dtype=torch.long)
    order[found[places] - 1] = places
    return order


def _packed(values: Tensor, parameter: str, pack: Callable[[Any], Any]) -> Tensor:
    """These values of one expert as the kernel would hold them; the layer's other parameter is made up."""
    _, height, width = values.shape
    layer: Any = nn.Module()
    other = (1, width, height // 2) if parameter == "w13_weight" else (1, 2 * width, height)
    layer.w13_weight = nn.Parameter(values if parameter == "w13_weight" else values.new_zeros(other), False)
    layer.w2_weight = nn.Parameter(values if parameter == "w2_weight" else values.new_zeros(other), False)
    pack(layer)
    return getattr(layer, parameter).detach()
