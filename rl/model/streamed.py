"""The tensors of a model that go to an engine."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

SELECTION = ("e_score_correction_bias", "expert_bias", "balancing_biases")
"""Buffers that a router adds to its scores before it selects experts; loss-free balancing moves them."""


def streamed(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor): each parameter once, and the buffers with which routers select."""
    yield from model.named_parameters()
    yield from ((name, b) for name, b in model.named_buffers() if name.rpartition(".")[2] in SELECTION)
