"""Packed attention with fused kernels: variable-length calls.

Each completion gets copies of all keys that it sees, its own last. One causal call, whose diagonal ends at
the last key, attends to them. Keys of grouped queries are narrow, and a backward pass copies them again.

Where prompts are long and completions short, copies would be too many. There, in one call every prompt and
every completion attends causally to itself. In a second one, the completions of a group attend to their
shared prompt, and in further ones branches to what they branch off. Softmax over the union of two key sets is
the mean of both softmaxes, weighted by the exponentials of their log-sum-exps (ring attention,
arXiv:2310.01889). The backward kernel needs only the merged output and log-sum-exp of each row, so it is
called as often with those. Either way the prompt's keys and values are computed and kept once per group.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rl.model.self_check import reproduces

MOST_KEYS = 3
"""Most copied keys, as a multiple of the row's columns; with more, completions get no copies."""


@dataclass(frozen=True)
class Segments:
    """Consecutive runs of a packed axis. `ends` [S+1], int32: 0, n1, n1 + n2, ... for runs of n1, n2, ..."""

    ends: Int[Tensor, " S1"]
    longest: int

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device) -> Segments:
        ends = placed([*accumulate(lengths, initial=0)], device, torch.int32)
        return Segments(ends, max(lengths, default=0))


def placed(numbers: Sequence[int], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """Numbers on a device. From pageable memory the copy would wait for all passes before it."""
    here = torch.tensor(numbers, dtype=dtype)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here


@dataclass(frozen=True)
class Pass:
    """One varlen call: each run of queries attends to a run of keys.

    Attributes:
        queries, keys: the runs of both, equally many.
        causal: a query sees the keys up to its own; the diagonal ends at the last key of a run.
        asking_C, seen_S: columns of the queries and of the keys; None: the row as it is.
    """

    queries: Segments
    keys: Segments
    causal: bool = True
    asking_C: Int[Tensor, " C"] | None = None
    seen_S: Int[Tensor, " S"] | None = None

    @staticmethod
    def between(pairs: Sequence[tuple[range, range]], device: torch.device) -> Pass:
        """The second columns of each pair see all of the first ones."""
        seen, asking = zip(*pairs, strict=True)
        asking_C, seen_S = (placed([*chain(*x)], device) for x in (asking, seen))
        queries, keys = (Segments.of([*map(len, x)], device) for x in (asking, seen))
        return Pass(queries, keys, False, asking_C, seen_S)

    @staticmethod
    def joined(
        lengths: Sequence[int], pairs: Sequence[tuple[range, range]], device: torch.device
    ) -> Pass | None:
        """Consecutive runs of these lengths see copies of all keys that they may, their own last; None: these
        are only their own, or too many to copy.

        Args:
            pairs: columns that are seen, and those of one or more whole runs that see them.
        """
        ends = [*accumulate(lengths, initial=0)]
        seen: list[list[range]] = [[] for _ in lengths]
        for there, mine in pairs:
            for i in range(bisect_left(ends, mine.start), bisect_left(ends, mine.stop)):
                seen[i] += [there] if lengths[i] else []
        seen = [[*others, range(*own)] for others, own in zip(seen, pairwise(ends), strict=True)]
        counts = [sum(map(len, parts)) for parts in seen]
        if not pairs or sum(counts) > MOST_KEYS * sum(lengths):
            return None
        columns_S = placed([*chain(*chain(*seen))], device)
        return Pass(Segments.of(lengths, device), Segments.of(counts, device), seen_S=columns_S)

    def sides(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
        """Queries, keys and values of the call, the runs of queries and of keys, and causality."""
        q, k, v = _taken(q, self.asking_C), _taken(k, self.seen_S), _taken(v, self.seen_S)
        return q, k, v, self.queries, self.keys, self.causal


def _taken(x: Tensor, columns: Tensor | None, dim: int = 0) -> Tensor:
    return x if columns is None else x.index_select(dim, columns)


@dataclass(frozen=True)
class VarlenPlan:
    """Which columns see which, as varlen calls.

    Attributes:
        own: runs of the whole row: prompts, completions, and a prompt together with its completion if it has
            only one. They attend to themselves, or to copies of all keys that they see.
        crossings: completions that see their shared prompt; branches that see the beginning of another one.
    """

    own: Pass
    crossings: tuple[Pass, ...] = ()

    @staticmethod
    def documents(lengths: Sequence[int], device: torch.device) -> VarlenPlan:
        """Runs that see all of themselves and nothing else."""
        runs = Segments.of(lengths, device)
        return VarlenPlan(Pass(runs, runs, causal=False))

    @staticmethod
    def of(
        blocks: Sequence[Sequence[int]],
        device: torch.device,
        *,
        branches: Sequence[Sequence[tuple[range, range]]] = (),
        may_join: bool = True,
    ) -> VarlenPlan:
        """The plan of contiguous blocks, each given by the lengths of its prompt and its completions.

        Args:
            branches: for each call, columns of completions that branches share, and their own.
            may_join: copy keys where they are not too many.
        """
        own, shared, start = list[int](), list[tuple[range, range]](), 0
        for lengths in blocks:
            prompt_end, end = start + lengths[0], start + sum(lengths)
            if len(lengths) > 2:
                shared.append((range(start, prompt_end), range(prompt_end, end)))
            own += lengths if len(lengths) > 2 else [end - start]
            start = end
        if may_join and (joined := Pass.joined(own, [*shared, *chain(*branches)], device)) is not None:
            return VarlenPlan(joined)
        runs = Segments.of(own, device)
        crossings = (Pass.between(pairs, device) for pairs in (shared, *branches) if pairs)
        return VarlenPlan(Pass(runs, runs), tuple(crossings))


class Kernels(NamedTuple):
    """A varlen attention that returns its log-sum-exp, and its gradient.

    forward(q, k, v, query segments, key segments, causal, scale) -> out [n, Hq, D], lse [Hq, n] (nats, fp32);
    backward(grad_out, q, k, v, out, lse, query segments, key segments, causal, scale) -> dq, dk, dv.
    q is [n, Hq, D], k and v are [m, Hk, D]; Hq is a multiple of Hk.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    queries, keys, causal, scale = how
    spans = (queries.ends, keys.ends, queries.longest, keys.longest)
    flash = torch.ops.aten._flash_attention_forward
    out, lse, *_ = flash(q, k, v, *spans, 0.0, causal, return_debug_mask=False, scale=scale)
    return out, lse


def _flash_backward(grad_out: Tensor, *how: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, queries, keys, causal, scale = how
    spans = (queries.ends, keys.ends, queries.longest, keys.longest)
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=grad_out.device)
    unused = torch.empty(0, device=grad_out.device)
    flash = torch.ops.aten._flash_attention_backward
    return flash(grad_out, *tensors, *spans, 0.0, causal, no_dropout, unused, scale=scale)


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


def _flash_gap(*, joined: bool) -> float:
    """Largest relative difference of the output and of each gradient, by their largest numbers."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, grad = (
        torch.randn(12, heads, 64, device="cuda", generator=generator).bfloat16() for heads in (4, 2, 2, 4)
    )
    # A prompt of 3 with a completion of 4 and a branch of 2 behind 2 of these, and one of 1 with one of 2.
    sees = torch.ones(12, 12, device="cuda").tril().bool()
    sees[7:9, 5:7], sees[9:, :9] = False, False
    branches = [[(range(3, 5), range(7, 9))]]
    plan = VarlenPlan.of([(3, 4, 2), (1, 2)], q.device, branches=branches, may_join=joined)
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
    v_NHD: Float[Tensor, "N Hk D"],
    plan: VarlenPlan,
    *,
    scale: float,
    kernels: Kernels = FLASH,
) -> Float[Tensor, "N Hq D"]:
    """softmax(q k^T * scale) v over the columns that `plan` lets each column see."""
    return _SharedPromptAttention.apply(q_NHD, k_NHD, v_NHD, plan, scale, kernels)  # type: ignore[return-value]


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
    return FLASH.forward(q, k, v, runs, runs, False, scale)[0]


class _SharedPromptAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: VarlenPlan, scale: float, kernels: Kernels
    ) -> Tensor:
        out, lse = kernels.forward(*plan.own.sides(q, k, v), scale)
        for x in plan.crossings:
            asking_C = cast(Tensor, x.asking_C)
            there, there_lse = kernels.forward(*x.sides(q, k, v), scale)
            here, here_lse = out.index_select(0, asking_C), lse.index_select(1, asking_C)
            merged_lse = torch.logaddexp(here_lse, there_lse)
            share = (there_lse - merged_lse).exp_().T.unsqueeze(-1)
            merged = torch.lerp(here.to(share.dtype), there.to(share.dtype), share)
            out.index_copy_(0, asking_C, merged.to(out.dtype))
            lse.index_copy_(1, asking_C, merged_lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = (plan, scale, kernels)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_out,) = grads
        q, k, v, out, lse = ctx.saved_tensors
        plan, scale, kernels = ctx.settings

        def gradients(x: Pass) -> list[Tensor]:
            *sides, queries, keys, causal = x.sides(q, k, v)
            rows = (_taken(out, x.asking_C), _taken(lse, x.asking_C, dim=1))
            how = (queries, keys, causal, scale)
            return [*kernels.backward(_taken(grad_out, x.asking_C), *sides, *rows, *how)]

        found = gradients(plan.own)
        if (copied_S := plan.own.seen_S) is not None:
            found[1:] = (_summed(grad, copied_S, like=k) for grad in found[1:])
        for x in plan.crossings:
            for grad, part, at in zip(found, gradients(x), (x.asking_C, x.seen_S, x.seen_S), strict=True):
                grad.index_add_(0, at, part)
        return *found, None, None, None


def _summed(grad_SHD: Float[Tensor, "S H D"], columns_S: Tensor, like: Tensor) -> Float[Tensor, "N H D"]:
    """Gradients of copies, added up for each column in fp32 or wider."""
    wide = torch.promote_types(like.dtype, torch.float32)
    total = like.new_zeros(like.shape, dtype=wide).index_add_(0, columns_S, grad_SHD.to(wide))
    return total.to(like.dtype)
