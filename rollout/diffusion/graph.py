"""CUDA graphs for the sampler: launch times dominate in a small model, and shapes recur for whole blocks."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rollout.diffusion.model import Denoiser, Layout


class GraphedDenoiser:
    """A Denoiser whose pass is captured when a shape is seen for the `capture_after`th time, then replayed.

    Shapes change when rows leave or join; a capture costs about three passes. Weights may change in place.
    If this model cannot be captured, `reason` says why and every pass runs as it is.
    """

    def __init__(self, inner: Denoiser, *, capture_after: int = 3, max_graphs: int = 8) -> None:
        self.inner, self.capture_after, self.max_graphs = inner, capture_after, max_graphs
        self.mask_token_id, self.context_length = inner.mask_token_id, inner.context_length
        self.shift, self.device = inner.shift, inner.device
        self.reason: str | None = None if inner.device.type == "cuda" else "the model is not on a CUDA device"
        self.uses: Counter[object] = Counter()
        self.graphs: dict[object, _Graph] = {}
        self.pool: Any = torch.cuda.graph_pool_handle() if self.reason is None else None

    def hidden(self, token_ids_N: Int[Tensor, " N"], layout: Layout) -> Float[Tensor, "N D"]:
        """The inner model's hidden states; they are valid until the next call."""
        fresh = layout.kept is not None and not layout.kept.keys
        if self.reason is not None or fresh or torch.is_grad_enabled():
            return self.inner.hidden(token_ids_N, layout)
        key = _shape(token_ids_N, layout)
        self.uses[key] += 1
        if key not in self.graphs:
            if self.uses[key] < self.capture_after:
                return self.inner.hidden(token_ids_N, layout)
            while len(self.graphs) >= self.max_graphs:
                self.graphs.pop(next(iter(self.graphs)))
            try:
                self.graphs[key] = _Graph(self.inner, token_ids_N, layout, self.pool)
            except RuntimeError as error:
                self.reason = f"no CUDA graph of this model: {str(error).splitlines()[0]}"
                return self.inner.hidden(token_ids_N, layout)
        return self.graphs[key].replay(token_ids_N, layout)

    def logits(self, hidden_LD: Float[Tensor, "L D"]) -> Float[Tensor, "L V"]:
        return self.inner.logits(hidden_LD)


class _Graph:
    """A captured pass with inputs of its own."""

    def __init__(self, inner: Denoiser, token_ids_N: Tensor, layout: Layout, pool: Any) -> None:
        self.ids_N = token_ids_N.clone()
        self.layout = replace(layout, **{name: value.clone() for name, value in _tensors(layout).items()})
        self.copied = layout
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            inner.hidden(self.ids_N, self.layout)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.out_ND = inner.hidden(self.ids_N, self.layout)

    def replay(self, token_ids_N: Tensor, layout: Layout) -> Tensor:
        """Runs the captured pass on these inputs; a layout that was copied last time is not copied again."""
        self.ids_N.copy_(token_ids_N)
        if layout is not self.copied:
            own = _tensors(self.layout)
            for name, value in _tensors(layout).items():
                own[name].copy_(value)
            self.copied = layout
        self.graph.replay()
        return self.out_ND


def _tensors(layout: Layout) -> dict[str, Tensor]:
    values = {f.name: getattr(layout, f.name) for f in fields(layout)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _shape(token_ids_N: Tensor, layout: Layout) -> object:
    """What a capture freezes: sizes, the branches they decide, and where keys and values are kept."""
    plain = [
        v for f in fields(layout) if not isinstance(v := getattr(layout, f.name), Tensor) and f.name != "kept"
    ]
    kept = layout.kept
    return (len(token_ids_N), *plain, None if kept is None else next(iter(kept.keys.values())).data_ptr())
