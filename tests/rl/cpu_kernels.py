"""Varlen attention on torch's own CPU flash kernels, one call for each run."""

from __future__ import annotations

from itertools import pairwise

import torch

from rl.model.varlen import Kernels
from rl.model.varlen_plan import Pass, Segments


def _runs(segments: Segments) -> list[slice]:
    ends = segments.ends.tolist()
    return [slice(a, b) for a, b in pairwise(ends)]


def _heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[n, Hk, D] as [1, Hq, n, D]: the CPU kernel takes no grouped heads."""
    return x.repeat_interleave(num_heads // x.shape[1], dim=1).transpose(0, 1)[None].contiguous()


def _sees(a: slice, b: slice, call: Pass, like: torch.Tensor) -> dict:
    """As on a GPU the diagonal ends at the last key, where the CPU kernel's own starts at the first."""
    n, m = a.stop - a.start, b.stop - b.start
    if not call.causal or (n == m and call.window is None):
        return {"is_causal": call.causal}
    sees = torch.ones(n, m).tril(m - n).triu(m - n - (call.window or m) + 1).bool()
    return {"is_causal": False, "attn_mask": like.new_zeros(n, m).masked_fill(~sees, -torch.inf)}


def forward(q, k, v, call, scale):
    out, lse = torch.full_like(q, torch.nan), q.new_full((q.shape[1], len(q)), torch.nan)
    for a, b in zip(_runs(call.queries), _runs(call.keys), strict=True):
        heads = [_heads(x, q.shape[1]) for x in (q[a], k[b], v[b])]
        piece, piece_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *heads, 0.0, **_sees(a, b, call, q), scale=scale
        )
        out[a], lse[:, a] = piece[0].transpose(0, 1), piece_lse[0]
    return out, lse


def backward(grad_out, q, k, v, out, lse, call, scale):
    num_heads, group = q.shape[1], q.shape[1] // k.shape[1]
    grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    for a, b in zip(_runs(call.queries), _runs(call.keys), strict=True):
        sides = [_heads(x, num_heads) for x in (grad_out[a], q[a], k[b], v[b], out[a])]
        pieces = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *sides, lse[None, :, a].contiguous(), 0.0, **_sees(a, b, call, q), scale=scale
        )
        for grad, piece, run in zip(grads, pieces, (a, b, b), strict=True):
            rows = piece[0].transpose(0, 1)
            grad[run] = rows if grad is grads[0] else rows.unflatten(1, (-1, group)).sum(2)
    return tuple(grads)


KERNELS = Kernels(forward, backward)
