"""Arithmetic that a training pass must do, for model FLOPs utilisation; what is recomputed does not count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 FLOP/s by the vendors' datasheets."""


def peak_flops() -> float:
    """Peak of this machine's GPU; NaN where it is not in the table."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for part, peak in PEAK_BF16.items() if part in name), float("nan"))


def training_flops(config: dict[str, Any], groups: Sequence[tuple[int, Sequence[int]]]) -> float:
    """Forward and backward (3 x forward) over groups of (prompt length, completion lengths), prompts once.

    A matrix product counts 2 x its size; attention counts only the pairs that causality lets see each other;
    the head counts the completion tokens, which alone have log-probs.
    """
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    matrices = layers * (
        hidden * size * (2 * heads + 2 * kv_heads) + 3 * hidden * config["intermediate_size"]
    )
    tokens = sum(p + sum(lengths) for p, lengths in groups)
    answers = sum(sum(lengths) for _, lengths in groups)
    pairs = sum(p * (p + 1) / 2 + sum(n * p + n * (n + 1) / 2 for n in lengths) for p, lengths in groups)
    attention = layers * pairs * 2 * heads * size
    return 3 * 2 * (tokens * matrices + answers * hidden * config["vocab_size"] + attention)


def active_matrix_values(model: Any) -> float:
    """The number of matrix values that a token is multiplied with in a forward pass. Of routed experts the
    share K / E counts. The head counts, the embedding and adapters do not.
    """
    from rl.moe.adapters import part_of
    from rl.moe.routers import find_routers

    sites = find_routers(model)
    shares = {site.layer: site.top_k / site.num_experts for site in sites}
    share = sum(shares.values()) / max(len(shares), 1)
    embedding, total = model.get_input_embeddings(), 0.0
    head = model.get_output_embeddings()
    for name, p in model.named_parameters():
        if (
            p.ndim < 2
            or ".lora_" in name
            or (p is embedding.weight and head is not None and head.weight is not p)
        ):
            continue
        total += p.numel() * (share if part_of(model, name) == "routed experts" and p.ndim == 3 else 1.0)
    return total


def forward_flops(model: Any, length: int, *, causal: bool = True) -> float:
    """FLOPs of a sequence: 2 x active values per token, and 4 x heads x head size per pair of tokens.

    Args:
        causal: counts only pairs that see each other under causal attention.
    """
    config = model.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    pairs = length * (length + 1) / 2 if causal else length**2
    return 2 * length * active_matrix_values(model) + 4 * heads * size * pairs * config.num_hidden_layers
