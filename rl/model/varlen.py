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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

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
class Crossing:
    """Runs of columns that see all of other runs, the first of the first and so on.

    Attributes:
        answers_C, prompts_P: columns of those that see, and of those that are seen.
        answer_groups, prompt_groups: their runs.
    """

    answers_C: Int[Tensor, " C"]
    prompts_P: Int[Tensor, " P"]
    answer_groups: Segments
    prompt_groups: Segments

    @staticmethod
    def of(pairs: Sequence[tuple[range, range]], device: torch.device) -> Crossing:
        """The crossing of pairs of columns: those that are seen, and those that see them."""
        prompts, answers = zip(*pairs, strict=True)
        answers_C, prompts_P = (placed([*chain(*x)], device) for x in (answers, prompts))
        groups, seen = (Segments.of([*map(len, x)], device) for x in (answers, prompts))
        return Crossing(answers_C, prompts_P, groups, seen)

    def answers(self, x: Float[Tensor, "N H D"]) -> Float[Tensor, "C H D"]:
        return x.index_select(0, self.answers_C)

    def prompts(self, x: Float[Tensor, "N H D"]) -> Float[Tensor, "P H D"]:
        return x.index_select(0, self.prompts_P)


@dataclass(frozen=True)
class Joined:
    """For each run of a row all columns that it sees, its own last.

    Attributes:
        columns_S: of all runs, one after the other.
        runs: how many of them each run has.
    """

    columns_S: Int[Tensor, " S"]
    runs: Segments

    @staticmethod
    def of(
        lengths: Sequence[int], pairs: Sequence[tuple[range, range]], device: torch.device
    ) -> Joined | None:
        """What consecutive runs of these lengths see; None: nothing but themselves, or too much.

        Args:
            pairs: columns that are seen, and those of one or more whole runs that see them.
        """
        runs = [range(a, b) for a, b in pairwise(accumulate(lengths, initial=0))]
        first = {run.start: i for i, run in enumerate(runs) if run}
        seen: list[list[range]] = [[] for _ in runs]
        for there, mine in pairs:
            at = first[mine.start] if mine else len(runs)
            while at < len(runs) and runs[at].start < mine.stop:
                seen[at] += [there] if runs[at] else []
                at += 1
        counts = [len(run) + sum(map(len, before)) for run, before in zip(runs, seen, strict=True)]
        if not pairs or sum(counts) > MOST_KEYS * sum(lengths):
            return None
        columns = chain.from_iterable(chain(*before, run) for run, before in zip(runs, seen, strict=True))
        return Joined(placed([*columns], device), Segments.of(counts, device))

    def sums(self, grad_SHD: Float[Tensor, "S H D"], like: Float[Tensor, "N H D"]) -> Float[Tensor, "N H D"]:
        """Gradients of the copies, added up for each column in fp32 or wider."""
        wide = torch.promote_types(like.dtype, torch.float32)
        total = like.new_zeros(like.shape, dtype=wide).index_add_(0, self.columns_S, grad_SHD.to(wide))
        return total.to(like.dtype)


@dataclass(frozen=True)
class VarlenPlan:
    """Which columns see which, as varlen calls.

    Attributes:
        own: runs of the whole row that attend to themselves: prompts, completions, and a prompt together with
            its completion if it has only one.
        crossings: completions that see their shared prompt; branches that see the beginning of another one.
        causal: whether a column sees only what precedes it in its run.
        joined: copied keys in place of crossings, or None.
    """

    own: Segments
    crossings: tuple[Crossing, ...]
    causal: bool = True
    joined: Joined | None = None

    @staticmethod
    def documents(lengths: Sequence[int], device: torch.device) -> VarlenPlan:
        """Runs that see all of themselves and nothing else."""
        return VarlenPlan(Segments.of(lengths, device), (), causal=False)

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
        if may_join and (joined := Joined.of(own, [*shared, *chain(*branches)], device)) is not None:
            return VarlenPlan(Segments.of(own, device), (), joined=joined)
        crossings = (Crossing.of(pairs, device) for pairs in (shared, *branches) if pairs)
        return VarlenPlan(Segments.of(own, device), tuple(crossings))

    def keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Segments, Segments, bool]:
        """Keys, values, runs of queries, runs of keys and causality of the call for all runs."""
        if (x := self.joined) is None:
            return k, v, self.own, self.own, self.causal
        return k.index_select(0, x.columns_S), v.index_select(0, x.columns_S), self.own, x.runs, True


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
        keys, values, *how = plan.keys(k, v)
        out, lse = kernels.forward(q, keys, values, *how, scale)
        for x in plan.crossings:
            sides = (x.answers(q), x.prompts(k), x.prompts(v))
            there, there_lse = kernels.forward(*sides, x.answer_groups, x.prompt_groups, False, scale)
            here, here_lse = x.answers(out), lse.index_select(1, x.answers_C)
            merged_lse = torch.logaddexp(here_lse, there_lse)
            share = (there_lse - merged_lse).exp_().T.unsqueeze(-1)
            merged = torch.lerp(here.to(share.dtype), there.to(share.dtype), share)
            out.index_copy_(0, x.answers_C, merged.to(out.dtype))
            lse.index_copy_(1, x.answers_C, merged_lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = (plan, scale, kernels)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_out,) = grads
        q, k, v, out, lse = ctx.saved_tensors
        plan, scale, kernels = ctx.settings
        keys, values, *how = plan.keys(k, v)
        found = kernels.backward(grad_out, q, keys, values, out, lse, *how, scale)
        if plan.joined is not None:
            found = (found[0], *(plan.joined.sums(x, k) for x in found[1:]))
        for x in plan.crossings:
            sides = (x.answers(q), x.prompts(k), x.prompts(v), x.answers(out))
            runs = (lse.index_select(1, x.answers_C), x.answer_groups, x.prompt_groups)
            more = kernels.backward(x.answers(grad_out), *sides, *runs, False, scale)
            columns = (x.answers_C, x.prompts_P, x.prompts_P)
            for grad, part, at in zip(found, more, columns, strict=True):
                grad.index_add_(0, at, part)
        return *found, None, None, None
