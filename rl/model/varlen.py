"""Packed attention with fused kernels, one variable-length call after another (`rl.model.varlen_plan`).

Softmax over the union of two key sets is the mean of both softmaxes, weighted by the exponentials of their
log-sum-exps (ring attention, arXiv:2310.01889). The backward kernel needs only the merged output and
log-sum-exp of each row, so it is called as often with those. The prompt's keys and values are computed and
kept once per group. An attention sink is one more key, whose value is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rl.model.self_check import reproduces
from rl.model.varlen_plan import Pass, Segments, VarlenPlan, taken


class Kernels(NamedTuple):
    """A varlen attention that returns its log-sum-exp, and its gradient.

    forward(q, k, v, call, scale) -> out [n, Hq, D], lse [Hq, n] (nats, fp32);
    backward(grad_out, q, k, v, out, lse, call, scale) -> dq, dk, dv.
    q is [n, Hq, D], k and v are [m, Hk, D], as `call.sides` gives them; Hq is a multiple of Hk.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _flash_forward(*how: Any) -> tuple[Tensor, Tensor]:
    *tensors, call, scale = how
    flash = torch.ops.aten._flash_attention_forward
    keywords = {"return_debug_mask": False, "scale": scale, **_window(call)}
    out, lse, *_ = flash(*tensors, *_spans(call), 0.0, call.causal, **keywords)
    return out, lse


def _flash_backward(grad_out: Tensor, *how: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, call, scale = how
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=grad_out.device)
    unused = torch.empty(0, device=grad_out.device)
    flash = torch.ops.aten._flash_attention_backward
    keywords = {"scale": scale, **_window(call)}
    return flash(grad_out, *tensors, *_spans(call), 0.0, call.causal, no_dropout, unused, **keywords)


def _spans(call: Pass) -> tuple[Any, ...]:
    return call.queries.ends, call.keys.ends, call.queries.longest, call.keys.longest


def _window(call: Pass) -> dict[str, int]:
    return {} if call.window is None else {"window_size_left": call.window - 1, "window_size_right": 0}


FLASH = Kernels(_flash_forward, _flash_backward)


def flash_serves(query: Float[Tensor, "1 Hq N D"], value: Float[Tensor, "1 Hk N Dv"]) -> bool:
    """Whether torch's flash kernels take them: on CUDA, 16 bits, equal head sizes that are multiples of 8."""
    size = query.shape[-1]
    narrow = query.dtype in (torch.bfloat16, torch.float16)
    fits = size == value.shape[-1] and size % 8 == 0 and size <= 256
    return query.is_cuda and narrow and fits and flash_works()


@cache
def flash_works() -> bool:
    """Compares a small row and its gradients with plain attention once, and warns if they differ."""
    return reproduces("varlen flash attention", lambda: _flash_gap(joined=False), 2e-2)


@cache
def joined_flash_works() -> bool:
    """`flash_works` of one causal call with more keys than queries."""
    return reproduces("varlen flash attention to copied keys", lambda: _flash_gap(joined=True), 2e-2)


@cache
def windowed_flash_works() -> bool:
    """`flash_works` of one causal call to copied keys in a window."""
    return reproduces("varlen flash attention in a window", lambda: _flash_gap(joined=True, window=3), 2e-2)


def _flash_gap(*, joined: bool, window: int | None = None) -> float:
    """Largest relative difference of the output and of each gradient, by their largest numbers."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, grad = (
        torch.randn(12, heads, 64, device="cuda", generator=generator).bfloat16() for heads in (4, 2, 2, 4)
    )
    # A prompt of 3 with a completion of 4 and a branch of 2 behind 2 of these, and one of 1 with one of 2.
    sees = torch.ones(12, 12, device="cuda").tril().bool()
    sees[7:9, 5:7], sees[9:, :9] = False, False
    branches = [[(range(3, 5), range(7, 9))]]
    places = torch.tensor([0, 1, 2, 3, 4, 5, 6, 5, 6, 0, 1, 2], device="cuda")
    sees &= places[:, None] - places < (window or 12)
    how = {"branches": branches, "may_join": joined, "window": window}
    plan = cast(VarlenPlan, VarlenPlan.of([(3, 4, 2), (1, 2)], q.device, **how))
    with torch.enable_grad():
        ours = [x.clone().requires_grad_() for x in (q, k, v)]
        theirs = [x.float().requires_grad_() for x in (q, k, v)]
        found = shared_prompt_attention(ours[0], ours[1], ours[2], plan, scale=0.125)
        expected = scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in theirs), attn_mask=sees, scale=0.125, enable_gqa=True
        )[0].transpose(0, 1)
        pairs = [(found, expected)]
        pairs += zip(
            torch.autograd.grad(found, ours, grad),
            torch.autograd.grad(expected, theirs, grad.float()),
            strict=True,
        )
    return max(((a.float() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def shared_prompt_attention(
    q_NHD: Float[Tensor, "N Hq D"],
    k_NHD: Float[Tensor, "N Hk D"],
    v_NHE: Float[Tensor, "N Hk E"],
    plan: VarlenPlan,
    *,
    scale: float,
    sinks_H: Float[Tensor, " Hq"] | None = None,
    kernels: Kernels = FLASH,
) -> Float[Tensor, "N Hq E"]:
    """softmax(q k^T * scale) v over the columns that `plan` lets each column see.

    Args:
        sinks_H: a score of each head that takes part in the softmax and stands for no column.
    """
    return _SharedPromptAttention.apply(q_NHD, k_NHD, v_NHE, sinks_H, plan, scale, kernels)  # type: ignore[return-value]


def run_attention(
    query: Float[Tensor, "1 Hq N D"],
    key: Float[Tensor, "1 Hk N D"],
    value: Float[Tensor, "1 Hk N D"],
    *,
    ends_S: Int[Tensor, " S"],
    longest: int,
    scale: float,
) -> Float[Tensor, "N Hq D"] | None:
    """Bidirectional attention within consecutive runs, without a gradient; None if flash kernels do not fit.

    Args:
        ends_S: 0, n1, n1 + n2, ... for runs of n1, n2, ... columns; int32, on the device.
        longest: columns of the longest run, or an upper bound of them.
    """
    if not flash_serves(query, value):
        return None
    runs = Segments(ends_S, longest)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return FLASH.forward(q, k, v, Pass(runs, runs, causal=False), scale)[0]


class _SharedPromptAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks_H: Tensor | None,
        plan: VarlenPlan,
        scale: float,
        kernels: Kernels,
    ) -> Tensor:
        out, lse = kernels.forward(*plan.own.sides(q, k, v), plan.own, scale)
        for x in plan.crossings:
            asking_C = cast(Tensor, x.asking_C)
            there, there_lse = kernels.forward(*x.sides(q, k, v), x, scale)
            here, here_lse = out.index_select(0, asking_C), lse.index_select(1, asking_C)
            merged_lse = torch.logaddexp(here_lse, there_lse)
            share = (there_lse - merged_lse).exp_().T.unsqueeze(-1)
            merged = torch.lerp(here.to(share.dtype), there.to(share.dtype), share)
            out.index_copy_(0, asking_C, merged.to(out.dtype))
            lse.index_copy_(1, asking_C, merged_lse)
        if sinks_H is not None:
            lse, without = torch.logaddexp(lse, sinks_H.to(lse.dtype)[:, None]), lse
            out = (out * (without - lse).exp_().T.unsqueeze(-1)).to(out.dtype)
        ctx.save_for_backward(q, k, v, out, lse, sinks_H)
        ctx.settings = (plan, scale, kernels)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_out,) = grads
        q, k, v, out, lse, sinks_H = ctx.saved_tensors
        plan, scale, kernels = ctx.settings

        def gradients(x: Pass) -> list[Tensor]:
            rows = (taken(out, x.asking_C), taken(lse, x.asking_C, dim=1))
            return [*kernels.backward(taken(grad_out, x.asking_C), *x.sides(q, k, v), *rows, x, scale)]

        found = gradients(plan.own)
        if (copied_S := plan.own.seen_S) is not None:
            found[1:] = (_summed(grad, copied_S, like=k) for grad in found[1:])
        for x in plan.crossings:
            for grad, part, at in zip(found, gradients(x), (x.asking_C, x.seen_S, x.seen_S), strict=True):
                grad.index_add_(0, at, part)
        return *found, _of_sinks(grad_out, out, lse, sinks_H), None, None, None


def _of_sinks(grad_out: Tensor, out: Tensor, lse: Tensor, sinks_H: Tensor | None) -> Tensor | None:
    """The gradient of sinks: their share of each softmax, times what the output would gain without it."""
    if sinks_H is None:
        return None
    share_HN = (sinks_H.to(lse.dtype)[:, None] - lse).exp_()
    slope_NH = (grad_out * out).sum(-1, dtype=lse.dtype)
    return -torch.einsum("hn,nh->h", share_HN, slope_NH).to(sinks_H.dtype)


def _summed(grad_SHD: Float[Tensor, "S H D"], columns_S: Tensor, like: Tensor) -> Float[Tensor, "N H D"]:
    """Gradients of copies, added up for each column in fp32 or wider."""
    wide = torch.promote_types(like.dtype, torch.float32)
    total = like.new_zeros(like.shape, dtype=wide).index_add_(0, columns_S, grad_SHD.to(wide))
    return total.to(like.dtype)
