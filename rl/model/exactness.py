"""Exact log-probs: nothing random is active, attention honours the model's config, and the lengths at which
a model changes its behaviour are known.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PROBE_LIMIT = 1024  # tokens of a probe when the longest sequence is not known
EAGER_LIMIT = 2048  # tokens: eager attention holds the square of this for every head
SWITCHES = ("window", "chunk", "local_attention", "index_topk", "indexer_budget")


def quiet(model: nn.Module, *, checkpointing: bool) -> None:
    """Turns off whatever is random in a model: dropout, layer drop, router noise.

    Engines sample without them, so with them log-probs would belong to another distribution: the ratio of an
    unchanged policy would not be 1. Gradients work in evaluation mode too, but transformers then skips
    gradient checkpointing. So checkpointed layers claim to be in training until they compute.
    """
    model.eval()
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            layer.training = checkpointing
            checkpoint: Any = layer._gradient_checkpointing_func
            if getattr(checkpoint, "func", None) is not _checkpoint_quietly:
                quietly: Any = partial(_checkpoint_quietly, layer, checkpoint)
                layer._gradient_checkpointing_func = quietly


def _checkpoint_quietly(layer: Any, checkpoint: Any, compute: Any, *arguments: Any) -> Any:
    """Checkpoints a layer, which claims to be in training, as if it were not. transformers decides on
    recomputation before this call, in some versions outside the layer's hooks and in others inside.
    """

    def quietly(*again: Any) -> Any:
        before, layer.training = layer.training, False
        try:
            return compute(*again)
        finally:
            layer.training = before

    return checkpoint(quietly, *arguments)


def backbone(model: PreTrainedModel) -> Any:
    """The part below the output head. Llama 4's `base_model` names an attribute that it does not have."""
    below = cast(Any, model.base_model)
    return below if below is not model else cast(Any, model).model


def honouring_attention(model: PreTrainedModel) -> str:
    """The model's own choice of attention, or eager if that choice drops an argument that the family's own
    attention uses: `sdpa` ignores a soft cap of logits (Gemma 2).
    """
    chosen = cast(str, model.config._attn_implementation)
    if chosen != "sdpa":
        return chosen
    plain = ALL_ATTENTION_FUNCTIONS[chosen]
    known = inspect.signature(plain).parameters
    dropped: set[str] = set()

    def recorded(module: nn.Module, *tensors: Any, **arguments: Any) -> Any:
        own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", plain)
        used = inspect.signature(own).parameters.keys() - known.keys()
        dropped.update(name for name in used if arguments.get(name) is not None)
        return plain(module, *tensors, **arguments)

    ids = torch.zeros(1, 4, dtype=torch.long, device=model.device)
    ALL_ATTENTION_FUNCTIONS[chosen] = recorded
    try:
        with torch.no_grad():
            backbone(model)(input_ids=ids, use_cache=False)
    finally:
        del ALL_ATTENTION_FUNCTIONS[chosen]
    return "eager" if dropped else chosen


def switch_lengths(config: PreTrainedConfig) -> Iterator[int]:
    """Lengths beyond which a model attends differently: windows, chunks, tokens that an index keeps."""
    pending: list[Any] = [config.get_text_config().to_dict()]
    while pending:
        for key, value in pending.pop().items():
            if isinstance(value, dict):
                pending.append(value)
            elif any(word in str(key) for word in SWITCHES):
                yield from (n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int))


def moving_rope(model: PreTrainedModel) -> tuple[str, int] | None:
    """(type, length) of rotary frequencies that depend on the longest position of a forward pass once it
    exceeds that length; None: they are fixed.
    """
    for module, layer_type, name in _rotary(model):
        if name == "longrope":
            return name, int(_parameters(module, layer_type)["original_max_position_embeddings"])
        if "dynamic" in name:
            return name, int(module.original_max_seq_len)
    return None


def take_long_factors(model: PreTrainedModel) -> None:
    """Fixes longrope at its long factors, as vLLM does for all sequences once an engine may exceed the
    original length (`Phi3LongRoPEScaledRotaryEmbedding`).
    """
    for module, layer_type, name in _rotary(model):
        if name == "longrope":
            config, settled = module.config, "longrope at its long factors"
            beyond = _parameters(module, layer_type)["original_max_position_embeddings"] + 1
            frequencies, _ = ROPE_INIT_FUNCTIONS[name](
                config, model.device, seq_len=beyond, layer_type=layer_type
            )
            prefix = "" if layer_type is None else f"{layer_type}_"
            module.register_buffer(f"{prefix}inv_freq", frequencies, persistent=False)
            module.rope_type = settled if layer_type is None else {**module.rope_type, layer_type: settled}


def _rotary(model: PreTrainedModel) -> Iterator[tuple[Any, str | None, str]]:
    """(module, type of layers or None for all layers, type of the frequencies)."""
    for module in model.modules():
        found = getattr(module, "rope_type", None)
        types = found if isinstance(found, dict) else {None: found}
        yield from ((module, layer_type, name) for layer_type, name in types.items() if isinstance(name, str))


def _parameters(module: Any, layer_type: str | None) -> dict[str, Any]:
    parameters = module.config.rope_parameters
    return parameters if layer_type is None else parameters[layer_type]
