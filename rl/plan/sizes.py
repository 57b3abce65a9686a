"""The numbers that a model's memory depends on, counted without loading it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from rl.config import LoraConfig, ModelConfig
from rl.model.adapters import add_lora
from rl.model.exactness import backbone
from rl.model.loading import storage_dtype
from rl.model.on_host import decoder_layers
from rl.model.packed import PACKED

NORMS = {"fused": (4, 2), "bf16-mixed": (11, 4), "bf16": (8, 4), "fp32": (6, 2)}
"""(What a layer's two norms keep per token, in widths of the model; the part of it that only gradients of
weights need.) "fused" is Liger's; the others are transformers' norms, which widen to fp32 on the way.
"""
GATE = "_default_apply_gate"
"""The gate whose saved tensors are counted: gate, up, the activation of the gate, and the product."""
LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


class NoPrediction(ValueError):
    """A model's memory cannot be predicted; the message has the reason."""


@dataclass(frozen=True)
class Experts:
    """Routed experts, computed by transformers' `grouped_mm`: a token is copied for `top_k` of them.

    Attributes:
        weights: weights of all experts of all layers; autocast does not narrow them.
        top_k, number: experts of a token, and of a layer.
        saved_per_token: elements, in the weights' dtype, that they keep for a token, on average over all
            layers of the model.
        kept_for_weights: the part of them that only the gradients of the experts' own weights need.
        bytes_per_token: bytes of the router and the order of tokens, whatever the dtype.
    """

    weights: int
    top_k: int
    number: int
    saved_per_token: int
    kept_for_weights: int
    bytes_per_token: int


@dataclass(frozen=True)
class ModelSize:
    """What memory depends on, in numbers of elements.

    Attributes:
        parameters: all weights, a tied head once.
        matrices: name, inputs and outputs of the layers' matrix products, the head and experts left out.
        head: vocabulary x hidden.
        saved_per_token: elements that one layer's backward pass keeps for a token, experts left out; on
            average, where layers differ.
        kept_for_weights: the part of them that only the gradients of the layer's own weights need.
        cache_per_token: keys and values of all layers.
        sampled_per_token: what a sampler in this process holds for each token of a sequence.
        sampled_per_sequence: what it also holds for each sequence.
        is_measured: what layers keep was not counted (0 here); `rl.plan.measured` has it.
        capped_heads: query heads whose scores are soft-capped, and kept whole since no kernel caps them.
        has_own_sampler: the model is sampled in this process, never by vLLM.
        teacher: all weights of the teacher.
        config, family: the transformers config, and its name of the family.
        adapt: (model, config); puts the adapters of a run around a model without storage.
    """

    parameters: int
    matrices: tuple[tuple[str, int, int], ...]
    head: int
    layers: int
    hidden: int
    saved_per_token: int
    kept_for_weights: int
    cache_per_token: int
    sampled_per_token: int
    sampled_per_sequence: int = 0
    is_measured: bool = False
    capped_heads: int = 0
    has_own_sampler: bool = False
    experts: Experts | None = None
    teacher: int = 0
    config: PreTrainedConfig | None = field(default=None, compare=False, repr=False)
    family: str = ""
    adapt: Callable[..., Any] = field(default=add_lora, repr=False)

    @property
    def linear(self) -> int:
        """Weights of the matrix products, experts left out."""
        return sum(inputs * outputs for _, inputs, outputs in self.matrices)

    @property
    def active(self) -> int:
        """Weights that a token is multiplied with, including the head and the token's experts. A forward
        pass takes 2 FLOPs for each, and training three times as many.
        """
        experts = self.experts.weights * self.experts.top_k // self.experts.number if self.experts else 0
        return self.linear + self.head + experts

    def without_storage(self, config: ModelConfig) -> PreTrainedModel:
        """The model with its adapters, in the dtype in which a run keeps it."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, dtype=storage_dtype(config))
            if config.lora is not None:
                self.adapt(model, config)
        return model

    @staticmethod
    def of(config: PreTrainedConfig, *, fused_layers: bool, dtype: str = "bf16-mixed") -> ModelSize:
        """The size of a model, counted on one without storage.

        Args:
            dtype: a key of NORMS, used where layers are not fused.

        Raises:
            NoPrediction: layers in a loop, or without attention and a gated MLP; or experts of another kind.
        """
        text: Any = config.get_text_config()
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if not isinstance(getattr(text, name, None), int):
                raise NoPrediction(f"no memory prediction for {text.model_type}: it names no {name}")
        if others := set(getattr(text, "layer_types", None) or ()) - LAYERS:
            raise NoPrediction(f"no memory prediction for {text.model_type}: layers of {min(others)}")
        if getattr(text, "kv_lora_rank", None):
            raise NoPrediction(f"no memory prediction for {text.model_type}: latent attention")
        model = without_loops(config)
        head: Any = model.get_output_embeddings()
        names = [name for name, _ in model.named_modules()]
        matrices = of_layers(model, head)
        experts = _experts(model, text)
        hidden, wide, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
        if experts is None:
            opened = sum(n for _, inputs, n in matrices if inputs == hidden and n in (wide, 2 * wide))
            if opened < 2 * wide * layers:
                raise NoPrediction(f"no memory prediction for {text.model_type}: its MLPs have no gate")
        else:  # dense layers and shared experts beside them
            opened = sum(
                n for name, _, n in matrices if re.search(r"(gate|up|gate_up|input)_(proj|linear)$", name)
            )
        wide = opened // 2 // layers if experts else wide
        size = head_size(text)
        keys = size * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
        queries = size * text.num_attention_heads
        norms, unneeded = NORMS["fused" if fused_layers else dtype]
        if experts and not fused_layers and dtype == "bf16-mixed":
            norms += 1  # experts return fp32, and so the residual stream stays wide
        norms += (norms - 2) // 2 * _added_norms(model, hidden)
        normed = (2 if dtype == "fp32" else 3) * any(name.endswith("q_norm") for name in names)
        mlp = 3 if fused_layers else 4
        return ModelSize(
            parameters=sum(p.numel() for p in model.parameters()),
            matrices=matrices,
            head=head.weight.numel(),
            layers=layers,
            hidden=hidden,
            saved_per_token=norms * hidden + (2 + normed) * queries + (2 + normed) * keys + mlp * wide,
            kept_for_weights=unneeded * hidden + (normed and 1) * (queries + keys) + wide,
            cache_per_token=2 * layers * keys,
            sampled_per_token=2 * layers * keys,
            capped_heads=text.num_attention_heads if getattr(text, "attn_logit_softcapping", None) else 0,
            experts=experts,
            config=config,
            family=config.model_type,
        )


def _added_norms(model: PreTrainedModel, hidden: int) -> int:
    """Norms of a layer besides two; they keep as much as those, except the input of a product."""
    layer = decoder_layers(model)[0]
    norms = [
        m for name, m in layer.named_children() if "norm" in name and getattr(m, "weight", None) is not None
    ]
    return max(sum(m.weight.shape == (hidden,) for m in norms) - 2, 0)


def head_size(text: Any) -> int:
    """Numbers of an attention head; raises NoPrediction where layers differ in it."""
    try:
        return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    except Exception as error:  # Gemma 4's, whose layers have heads of different sizes
        raise NoPrediction(f"no memory prediction for {text.model_type}: {error}") from error


def of_layers(model: nn.Module, head: nn.Module) -> tuple[tuple[str, int, int], ...]:
    """`ModelSize.matrices`; layers that share one have it once."""
    linear = {m.weight: (name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return tuple((name, m.in_features, m.out_features) for name, m in linear.values() if m is not head)


def without_loops(config: PreTrainedConfig) -> PreTrainedModel:
    """A model without storage; raises NoPrediction where a pass computes layers several times."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text: Any = config.get_text_config()
    if computed_layers(model) > text.num_hidden_layers:
        raise NoPrediction(f"no memory prediction for {text.model_type}: a loop of layers")
    return model


def computed_layers(model: PreTrainedModel) -> int:
    """Decoder layers that a pass computes, those in a loop (Dory) each time anew. It spoils the model, which
    has no storage: layers only count, and unknown attention needs no mask, which would read numbers.
    """
    seen, own = list[int](), cast(str, model.config._attn_implementation)

    def counted(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        seen.append(1)
        return hidden_states

    for layer in decoder_layers(model):
        layer.forward = counted
    model.set_attn_implementation(PACKED)
    with torch.no_grad(), torch.device("meta"), contextlib.suppress(Exception):
        backbone(model)(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)
    model.set_attn_implementation(own)  # of the config, which others hold too
    return len(seen)


def count_parameters(config: PreTrainedConfig) -> int:
    """Weights of a model of any kind, a tied head once."""
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def _experts(model: nn.Module, text: Any) -> Experts | None:
    """The experts of a model, which are stacks of matrices; None: it has none."""
    if not any(getattr(text, f"{name}_experts", 0) for name in ("num", "num_local", "n_routed")):
        return None
    stacks: list[Any] = [m for m in model.modules() if getattr(m, "gate_up_proj", None) is not None]
    stacks = [m for m in stacks if isinstance(m.gate_up_proj, nn.Parameter) and m.gate_up_proj.ndim == 3]
    top_k = getattr(text, "num_experts_per_tok", None)
    kinds = {type(m)._apply_gate.__qualname__ for m in stacks if hasattr(m, "_apply_gate")}
    if not stacks or not isinstance(top_k, int) or kinds != {GATE}:
        raise NoPrediction(f"no memory prediction for mixtures of experts of the kind {text.model_type}")
    hidden, number = text.hidden_size, len(stacks[0].gate_up_proj)
    wide = stacks[0].down_proj.numel() // number // hidden

    def mean(number: int) -> int:
        return number * len(stacks) // text.num_hidden_layers

    return Experts(
        weights=sum(p.numel() for m in stacks for p in m.parameters()),
        top_k=top_k,
        number=number,
        saved_per_token=mean(top_k * (2 * hidden + 4 * wide)),
        kept_for_weights=mean(top_k * (hidden + wide)),
        # Four 64-bit places and a weight of each choice, and a share in fp32 of each expert.
        bytes_per_token=mean(36 * top_k + 4 * number),
    )


@dataclass(frozen=True)
class Adapters:
    """What peft adds: weights, and (inputs, outputs) of each adapted linear layer. `copied` are adapted
    weights of experts, which it copies in each pass unless they are split (`rl.moe.adapters`).
    """

    weights: int
    pairs: tuple[tuple[int, int], ...]
    copied: int = 0
    of_experts: bool = False


def adapters_of(size: ModelSize, lora: LoraConfig) -> Adapters:
    """What peft adds to a model without storage; it has rules of its own per family."""
    return _adapters_of(size, lora.model_dump_json())


@lru_cache(maxsize=16)
def _adapters_of(size: ModelSize, lora: str) -> Adapters:
    model = size.without_storage(ModelConfig(lora=LoraConfig.model_validate_json(lora)))
    wrapped: list[Any] = [m for m in model.modules() if hasattr(m, "lora_A")]
    linear = [m for m in wrapped if isinstance(m.base_layer, nn.Linear)]
    of_tensors = [(m.get_base_layer(), m.parameter_name) for m in wrapped if hasattr(m, "parameter_name")]
    adapted = [(m, getattr(m, name)) for m, name in of_tensors]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    pairs = tuple((m.in_features, m.out_features) for m in linear)
    copied = sum(p.numel() for m, p in adapted if not hasattr(m, "adapters"))
    return Adapters(trained, pairs, copied, of_experts=any(p.ndim == 3 for _, p in adapted))


def lora_layer_bytes(size: ModelSize, lora: LoraConfig, dtype: str) -> int:
    """Bytes that a layer keeps for a token. Frozen weights need no inputs. Each adapter keeps its own copy of
    them, which peft widens to fp32 and autocast narrows again, and its `r` numbers in between. Dropout adds
    a byte of mask per input. Adapted experts keep what trained ones keep.
    """
    found, experts = adapters_of(size, lora), size.experts
    inputs = sum(n for n, _ in found.pairs) // size.layers
    ranks = lora.r * len(found.pairs) // size.layers
    if dtype == "fp32":
        kept = size.saved_per_token * 4
        copy = 4 if lora.dropout else 0  # without dropout all adapters share the input as it is
    else:
        kept = (size.saved_per_token - size.kept_for_weights) * 2
        copy = 2 if dtype == "bf16-mixed" else 4
    width = 2 if dtype == "bf16-mixed" else 4
    if experts:
        unneeded = 0 if found.of_experts else experts.kept_for_weights
        kept += (experts.saved_per_token - unneeded) * (4 if dtype == "fp32" else 2) + experts.bytes_per_token
    return kept + inputs * (copy + (1 if lora.dropout else 0)) + ranks * width
