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
