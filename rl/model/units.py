"""The parts of a model that processes gather one by one where they split its weights, and models without."""

from __future__ import annotations

import re
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from rl.model.hollow import can_take_apart
from rl.model.on_host import decoder_layers


def units(model: PreTrainedModel) -> list[nn.Module]:
    """Parts that are gathered separately: decoder layers, and an embedding not tied to the head."""
    return [*([] if is_tied(model) else [model.get_input_embeddings()]), *decoder_layers(model)]


def is_tied(model: PreTrainedModel) -> bool:
    return cast(Any, model.get_input_embeddings()).weight is cast(Any, model.get_output_embeddings()).weight


def is_adapter(module: Any) -> bool:
    """Whether it is peft's adapter of a tensor that is not a layer's weight, such as that of all experts."""
    return hasattr(module, "lora_A") and hasattr(module, "parameter_name")


def check_shardable(model: PreTrainedModel, size: int = 1, *, freezes: bool = False) -> None:
    """Raises ValueError for a model that cannot be split over `size` processes (`whole_because`)."""
    if reason := whole_because(model, size, freezes=freezes):
        raise ValueError(
            f"train.sharding: {reason}; use train.sharding=none, and model.lora or "
            "model.gradient_checkpointing=true where memory is short"
        )


def whole_because(model: PreTrainedModel, size: int, *, freezes: bool = False) -> str | None:
    """Why a model, with storage or without, cannot be split over `size` processes; None: it can be.

    Args:
        freezes: some weights are still to be frozen, so that the dtypes of trained ones are not known yet.
    """
    parts, named, reason = units(model), dict(model.named_parameters()), None
    seen = [id(p) for part in parts for p in {id(p): p for p in part.parameters()}.values()]
    dealt: list[int] = [cast(Any, m).num_experts for m in model.modules() if is_adapter(m)]
    if not any(isinstance(part, nn.Module) and list(part.children()) for part in parts):
        reason = "it has no list of decoder layers"
    elif len(set(seen)) < len(seen):
        reason = "its layers share weights"
    elif any(p.ndim == 0 for p in named.values()):
        reason = "it has weights that are single numbers"
    elif any(re.search(r"\.experts\.\d+\.", name) for name in named):
        reason = "its experts are separate modules, and processes choose different ones"
    elif not freezes and len({p.dtype for p in named.values() if p.requires_grad}) > 1:
        reason = "its weights have several dtypes, unlike under model.dtype=bf16-mixed"
    elif any(n > 1 and n % size for n in dealt):
        reason = f"adapters of its {max(dealt)} experts cannot be dealt to {size} processes evenly"
    elif not hasattr(model, "peft_config") and not can_take_apart(model, named):
        reason = "its files have other tensors than the loaded model"
    return reason and f"{type(model).__name__} cannot be split: {reason}"
