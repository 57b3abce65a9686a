"""What the layers of any model keep for a backward pass, measured by a pass on tensors without storage.

`rl.plan.sizes` counts gated decoders by hand, as the kernels of GPUs keep their tensors. For other families
(latent attention, state spaces beside attention, MLPs without a gate, experts of other kinds) torch's fake
tensors go through the model itself, and autograd's hooks say what it saves, layer by layer. That takes
seconds and no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from rl.config import ModelConfig
from rl.config.sections import TrainedModelConfig
from rl.model.exactness import backbone
from rl.model.loading import narrow_under_autocast
from rl.model.on_host import decoder_layers
from rl.model.packed import PACKED, Block, Layout
from rl.model.varlen import Kernels
from rl.plan.sizes import Experts, ModelSize, NoPrediction, head_size, of_layers, without_loops

TOKENS = (256, 512, 768)
"""Lengths of the rows that are measured: multiples of the chunks of linear attention."""


def measured_size(config: PreTrainedConfig) -> ModelSize:
    """The size of a model whose layers are measured.

    Raises:
        NoPrediction: its layers are computed in a loop, or it has none, or none of attention.
    """
    text: Any = config.get_text_config()
    # Without attention an engine holds states of sequences, which are not counted.
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        if not isinstance(getattr(text, name, None), int):
            raise NoPrediction(f"no memory prediction for {text.model_type}: it names no {name}")
    model = without_loops(config)
    layers, head = len(decoder_layers(model)), model.get_output_embeddings()
    if not layers or head is None:
        raise NoPrediction(f"no memory prediction for {text.model_type}: layers or head are not found")
    size = head_size(text)
    cache = 2 * size * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    if latent := getattr(text, "kv_lora_rank", None):
        cache = latent + text.qk_rope_head_dim
    owners = [m for m in model.modules() if not isinstance(m, nn.Conv1d)]
    stacks = [p for m in owners for p in m.parameters(recurse=False) if p.ndim == 3 and len(p) > 1]
    top_k = getattr(text, "num_experts_per_tok", None)
    experts = None
    if stacks and isinstance(top_k, int):
        experts = Experts(sum(p.numel() for p in stacks), top_k, max(map(len, stacks)), 0, 0, 0)
    return ModelSize(
        parameters=sum(p.numel() for p in model.parameters()),
        matrices=of_layers(model, head),
        head=head.weight.numel(),
        layers=layers,
        hidden=text.hidden_size,
        saved_per_token=0,
        kept_for_weights=0,
        cache_per_token=layers * cache,
        sampled_per_token=2 * layers * size * text.num_attention_heads,
        is_measured=True,
        experts=experts,
        config=config,
        family=config.model_type,
    )


def layer_bytes(size: ModelSize, config: TrainedModelConfig) -> tuple[int, int]:
    """Bytes that a layer keeps for a token: on average over all layers, and of the one that keeps most.

    Raises:
        NoPrediction: the model cannot be computed without storage, or keeps more than in proportion to a
            row's tokens.
    """
    own = {"name": "", "gradient_checkpointing": "auto", "keep_logits": "auto"}  # they change no layer
    settings = config.model_copy(update=own)
    return _layer_bytes(size, settings.model_dump_json())


@lru_cache(maxsize=32)
def _layer_bytes(size: ModelSize, settings: str) -> tuple[int, int]:
    config, times = ModelConfig.model_validate_json(settings), 1
    if size.experts and config.lora is None and config.dtype != "bf16":
        config, times = config.model_copy(update={"dtype": "bf16"}), 2  # grouped products take bf16 alone
    try:
        rows = [kept_by_layer(size, config, n) for n in TOKENS]
    except Exception as error:
        reason = f"its layers cannot be measured ({type(error).__name__}: {error})"
        raise NoPrediction(f"no memory prediction for {size.family}: {reason}") from error
    first, second = (sum(b) - sum(a) for a, b in pairwise(rows))
    if second > 1.3 * first:
        reason = "what it keeps grows faster than the tokens of a row"
        raise NoPrediction(f"no memory prediction for {size.family}: {reason}")
    each = [times * -(-(b - a) // (TOKENS[2] - TOKENS[1])) for a, b in zip(*rows[1:], strict=True)]
    return -(-sum(each) // len(each)), max(each)


def kept_by_layer(size: ModelSize, config: ModelConfig, num_tokens: int) -> list[int]:
    """Bytes that each layer keeps of one row, weights left out. Of equal layers one is computed."""
    model = size.without_storage(config).eval()
    kept: dict[int, tuple[int, torch.Tensor]] = {}  # holds them, so that no address is used twice
    kinds: dict[tuple, int] = {}
    of_layer = [
        kinds.setdefault(tuple((n, p.shape) for n, p in layer.named_parameters()), len(kinds))
        for layer in decoder_layers(model)
    ]
    now, answers = -1, list[Any]()

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.setdefault(x.untyped_storage()._cdata, (now, x))
        return x

    def forward(hidden: torch.Tensor, *given: Any, kind: int, compute: Callable, **more: Any) -> Any:
        nonlocal now
        if kind < len(answers):
            return (hidden,) if isinstance(answers[kind], tuple) else hidden
        if not hidden.requires_grad:  # frozen embeddings; behind other layers they have a gradient
            hidden = hidden.detach().requires_grad_()
        now = kind
        answers.append(compute(hidden, *given, **more))
        now = -1
        return answers[-1]

    for layer, kind in zip(decoder_layers(model), of_layer, strict=True):
        layer.forward = partial(forward, kind=kind, compute=layer.forward)
    narrow = torch.autocast("cpu", torch.bfloat16, enabled=config.dtype == "bf16-mixed")
    hooks, own = torch.autograd.graph.saved_tensors_hooks, cast(str, model.config._attn_implementation)
    with FakeTensorMode(allow_non_fake_inputs=True), hooks(keep, lambda x: x), narrow:
        _give_storage(model)
        model.get_input_embeddings().register_forward_hook(narrow_under_autocast)
        ids = torch.zeros(1, num_tokens, dtype=torch.long)
        layout = Layout((Block(0, num_tokens, ()),), ids.device, KEPT)
        try:
            model.set_attn_implementation(PACKED)
            packed = {"position_ids": torch.arange(num_tokens)[None], "cohort_layout": layout}
            backbone(model)(input_ids=ids, use_cache=False, **packed)
        except (TypeError, ValueError):  # it has no place for a layout
            model.set_attn_implementation(own)
            now = -1
            kept.clear()
            answers.clear()
            backbone(model)(input_ids=ids, use_cache=False)
        finally:
            model.set_attn_implementation(own)  # of the config, which others hold too
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    found = [0] * len(kinds)
    for address, (i, x) in kept.items():
        if i >= 0 and address not in weights:
            found[i] += x.untyped_storage().nbytes()
    return [found[kind] for kind in of_layer]


def _give_storage(model: nn.Module) -> None:
    """Fake tensors for parameters and buffers; `Module.to` cannot replace those."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, x in own.items():
                if x is not None and id(x) not in made:
                    fake = torch.empty_like(x, device="cpu")
                    made[id(x)] = nn.Parameter(fake, x.requires_grad) if isinstance(x, nn.Parameter) else fake
                own[name] = None if x is None else made[id(x)]


def _nothing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(q.shape[1], len(q), dtype=torch.float32)


KEPT = Kernels(_nothing, _nothing)  # type: ignore[arg-type]  # no gradient is computed
"""What a flash kernel keeps, and no attention."""
