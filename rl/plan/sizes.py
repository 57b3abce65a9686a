"""What a model's memory depends on, counted without loading it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from rl.config import LoraConfig


class NoPrediction(ValueError):
    """Nothing can be said of a model's memory beforehand, with the reason."""


@dataclass(frozen=True)
class ModelSize:
    """What memory depends on, in numbers of elements.

    Attributes:
        parameters: all weights, a tied head once.
        matrices: name, inputs and outputs of the layers' matrix products, the head left out.
        head: vocabulary x hidden.
        saved_per_token: elements that one layer's backward pass keeps for a token.
        kept_for_weights: those of them that only the gradients of the layer's own weights need.
        cache_per_token: keys and values of all layers.
        sampled_per_token: what a sampler in this process holds for a token of each sequence that it samples.
        sampled_per_sequence: what it holds for each sequence besides.
        has_own_sampler: the model is sampled in this process, never by vLLM.
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
    has_own_sampler: bool = False

    @property
    def linear(self) -> int:
        """Weights of the matrix products."""
        return sum(inputs * outputs for _, inputs, outputs in self.matrices)

    @staticmethod
    def of(config: PreTrainedConfig, *, fused_layers: bool) -> ModelSize:
        """Counted on a model without storage.

        Raises:
            NoPrediction: a mixture of experts or a layer without attention and a gated MLP: no prediction.
        """
        text: Any = config.get_text_config()
        if any(getattr(text, f"{name}_experts", 0) for name in ("num", "num_local", "n_routed")):
            raise NoPrediction(
                f"no memory prediction for mixtures of experts ({text.model_type}); run the probe"
            )
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if not isinstance(getattr(text, name, None), int):
                raise NoPrediction(f"no memory prediction for {text.model_type}: it names no {name}")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        head = model.get_output_embeddings()
        matrices = tuple(
            (name, m.in_features, m.out_features)
            for name, m in model.named_modules()
            if isinstance(m, nn.Linear) and m is not head
        )
        hidden, wide, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
        opened = sum(n for _, inputs, n in matrices if inputs == hidden and n in (wide, 2 * wide))
        if opened < 2 * wide * layers:
            raise NoPrediction(f"no memory prediction for {text.model_type}: its MLPs have no gate")
        size = getattr(text, "head_dim", None) or hidden // text.num_attention_heads
        keys = size * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
        queries = size * text.num_attention_heads
        norms, mlp, unneeded = (4, 3, 2) if fused_layers else (14, 4, 4)
        return ModelSize(
            parameters=sum(p.numel() for p in model.parameters()),
            matrices=matrices,
            head=head.weight.numel(),
            layers=layers,
            hidden=hidden,
            saved_per_token=norms * hidden + 2 * queries + 2 * keys + mlp * wide,
            kept_for_weights=unneeded * hidden + wide,
            cache_per_token=2 * layers * keys,
            sampled_per_token=2 * layers * keys,
        )


def adapted(size: ModelSize, lora: LoraConfig) -> list[tuple[int, int]]:
    """Inputs and outputs of the matrices that get an adapter, by peft's rule for names."""
    targets = lora.target_modules

    def is_target(name: str) -> bool:
        if isinstance(targets, str):
            return targets == "all-linear" or re.fullmatch(targets, name) is not None
        return any(f".{name}".endswith(f".{target}") for target in targets)

    return [(inputs, outputs) for name, inputs, outputs in size.matrices if is_target(name)]


def lora_layer_bytes(size: ModelSize, lora: LoraConfig, dtype: str) -> int:
    """What a layer keeps for a token. The frozen weights need no inputs; each adapter keeps its own copy of
    them, which peft widens to the adapter's fp32 and autocast narrows again, and its `r` numbers in between.
    With dropout it keeps a byte of mask for each input too.
    """
    pairs = adapted(size, lora)
    inputs, ranks = sum(n for n, _ in pairs) // size.layers, lora.r * len(pairs) // size.layers
    if dtype == "fp32":
        kept = size.saved_per_token * 4
        copy = 4 if lora.dropout else 0  # without dropout the input is kept as it is, once for all adapters
    else:
        kept = (size.saved_per_token - size.kept_for_weights) * 2
        copy = 2 if dtype == "bf16-mixed" else 4
    width = 2 if dtype == "bf16-mixed" else 4
    return kept + inputs * (copy + (1 if lora.dropout else 0)) + ranks * width
