"""Weights and moments that take less of the GPU: in host memory while they are not used, or in 16 bits."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rl.model.exactness import backbone

_ALIGNMENT = 256
PIECE_BYTES = 1 << 30
"""Bytes of an optimizer's moments that come to the GPU at once; at least those of one parameter."""


def host_like(tensors: Iterable[Tensor], *, pinned: bool) -> list[Tensor]:
    """Uninitialised tensors of these shapes and dtypes in host memory; `pinned` ones travel at full speed.

    They share one block of memory, but each has its own storage, as safetensors requires. The block is
    registered with CUDA: torch's own pinned memory would round each size up to a power of two.

    Raises:
        MemoryError: this machine cannot pin that much memory.
    """
    found, ends, end = list(tensors), [], 0
    for tensor in found:
        ends.append(end)
        end = -(-(end + tensor.nbytes) // _ALIGNMENT) * _ALIGNMENT
    memory = np.empty(end, dtype=np.uint8)
    if pinned:
        code = torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, end, 0)  # type: ignore[attr-defined]
        if int(code) != 0:
            raise MemoryError(
                f"{end / 2**30:.1f} GiB of host memory could not be pinned (CUDA's error {int(code)}); use "
                "memory.optimizer_on_host=false and memory.reference_on_host=false, or raise ulimit -l"
            )
    return [
        torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=begin).view(tensor.shape)
        for begin, tensor in zip(ends, found, strict=True)
    ]


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The model's decoder layers; empty if it does not keep them in a list."""
    number = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in backbone(model).modules() if isinstance(m, nn.ModuleList) and len(m) == number]
    return list(lists[0]) if lists else []


def narrow_matrices(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Keeps matrices of linear layers, the head's left out, in autocast's dtype, which makes them so in each
    pass: results do not change.
    """
    head = cast(Any, model.get_output_embeddings())
    for parameter in {m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head}:
        parameter.data = parameter.data.to(dtype)


def layers_to_host(model: PreTrainedModel) -> None:
    """Keeps each decoder layer in host memory, and moves it to the device only for its own forward pass.

    Raises:
        ValueError: the model has no list of decoder layers.
    """
    layers = decoder_layers(model)
    if not layers:
        raise ValueError(
            f"memory.reference_on_host: {type(model).__name__} has no list of decoder layers; leave it out"
        )
    device = model.device
    for layer in layers:
        parameters = list(layer.parameters())
        homes = host_like(parameters, pinned=device.type == "cuda")
        pairs = [(p, home.copy_(p.data)) for p, home in zip(parameters, homes, strict=True)]
        _leave(pairs)
        layer.register_forward_pre_hook(partial(_bring, pairs, device))
        layer.register_forward_hook(partial(_leave, pairs), always_call=True)


def _bring(pairs: list[tuple[nn.Parameter, Tensor]], device: torch.device, *call: Any) -> None:
    for parameter, home in pairs:
        parameter.data = torch.empty_like(home, device=device).copy_(home, non_blocking=True)


def _leave(pairs: list[tuple[nn.Parameter, Tensor]], *call: Any) -> None:
    for parameter, home in pairs:
        parameter.data = home
