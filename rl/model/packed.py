"""Attention for packed rows with shared prompts, registered with transformers under the name `cohort_packed`.

A packed row is a list of blocks: one prompt followed by completions that all continue it. A completion token
sees the prompt and its own completion up to itself, and nothing of its siblings, unless its completion is a
branch: then it also sees the beginning of another one. What is shared has its keys and values computed once.
The layout travels as a keyword argument through the model's forward, so it survives gradient checkpointing.
The attention mask that transformers passes (None for an unknown implementation) is never used: the layout is
the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, chain, pairwise
from os.path import commonprefix
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from rl.model.varlen import (
    FLASH,
    Kernels,
    flash_serves,
    joined_flash_works,
    shared_prompt_attention,
    windowed_flash_works,
)
from rl.model.varlen_plan import VarlenPlan, placed

PACKED = "cohort_packed"


@dataclass(frozen=True)
class Block:
    """A prompt and the completions that share it, in consecutive columns: [prompt | completion 0 | ...].

    Attributes:
        start: column of the prompt's first token.
        prompt_length: tokens of the prompt, at least 1.
        completion_lengths: tokens of each completion; may be empty.
        branches: for each completion, the one that it branches off and the number of its tokens that both
            have in common; these are left out of its own. (): none does.
    """

    start: int
    prompt_length: int
    completion_lengths: tuple[int, ...]
    branches: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def of(
        start: int, prompt_length: int, row_lengths: Sequence[int], branches: tuple[tuple[int, int], ...]
    ) -> Block:
        """The block of rows of these lengths after the prompt, what they share included."""
        own = tuple(length - shared for length, (_, shared) in zip(row_lengths, branches, strict=True))
        return Block(start, prompt_length, own, branches if any(n for _, n in branches) else ())

    @property
    def completion_start(self) -> int:
        return self.start + self.prompt_length

    @property
    def lengths(self) -> tuple[int, ...]:
        return (self.prompt_length, *self.completion_lengths)

    @property
    def end(self) -> int:
        return self.start + sum(self.lengths)

    @cached_property
    def columns(self) -> tuple[tuple[range, range], ...]:
        """For each completion: columns that it shares with another one, and its own."""
        ends = [*accumulate(self.completion_lengths, initial=self.completion_start)]
        branches = self.branches or tuple((i, 0) for i in range(len(self.completion_lengths)))
        shared = [range(ends[trunk], ends[trunk] + number) for trunk, number in branches]
        return tuple(zip(shared, (range(a, b) for a, b in pairwise(ends)), strict=True))


@dataclass(frozen=True)
class Layout:
    """How the columns of a packed row attend to each other; computed once, and used by every layer.

    Attributes:
        sizes: columns of prompt, completions, prompt, completions, ... in order.
        longest: columns of the longest prompt with one of its completions.
        kernels: varlen attention, whatever the device; None: torch's flash kernels where they serve.
    """

    blocks: tuple[Block, ...]
    device: torch.device
    kernels: Kernels | None = None

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(n for b in self.blocks for n in (b.prompt_length, sum(b.completion_lengths)))

    @cached_property
    def longest(self) -> int:
        widths = ((b.prompt_length, len(shared) + len(own)) for b in self.blocks for shared, own in b.columns)
        return max([*map(sum, widths), *(b.prompt_length for b in self.blocks)], default=0)

    @cached_property
    def slots(self) -> tuple[Int[Tensor, " n"], ...]:
        """Per block, where each completion column lies in the flattened G x C rectangle of completions."""
        slots = []
        for block in self.blocks:
            width = max(block.completion_lengths, default=0)
            runs = (range(g * width, g * width + n) for g, n in enumerate(block.completion_lengths))
            slots.append(placed([*chain(*runs)], self.device))
        return tuple(slots)

    @cached_property
    def places(self) -> Int[Tensor, " N"]:
        """Where each column lies in the flattened rectangle of blocks, padded on the right to the longest."""
        runs = (range(i * self.longest, i * self.longest + sum(b.lengths)) for i, b in enumerate(self.blocks))
        return placed([*chain(*runs)], self.device)

    def kernels_for(self, query: Tensor, value: Tensor, window: int | None) -> Kernels | None:
        """Varlen attention that takes such tensors; None: there is none."""
        if self.kernels is not None:
            return self.kernels
        works = flash_serves(query, value) and (window is None or windowed_flash_works())
        return FLASH if works else None

    def padded(self, x_N: Shaped[Tensor, " N *any"], fill: int) -> Shaped[Tensor, " BT *any"]:
        """The flattened rectangle of what columns hold, with `fill` in its padding."""
        flat = x_N.new_full((len(self.blocks) * self.longest, *x_N.shape[1:]), fill)
        return flat.index_copy(0, self.places, x_N)

    @cached_property
    def _varlen(self) -> dict[int | None, VarlenPlan | None]:
        return {}

    def varlen(self, window: int | None = None) -> VarlenPlan | None:
        """The varlen calls of a layer in which a column sees at most `window` columns, its own last; None:
        they would copy too many keys.
        """
        if window not in self._varlen:
            self._varlen[window] = self._planned(window)
        return self._varlen[window]

    def _planned(self, window: int | None) -> VarlenPlan | None:
        pairs = [pair for b in self.blocks for pair in b.columns if pair[0]]
        bins = first_fit([len(seen) for seen, _ in pairs], sum(self.sizes))  # a call copies at most N keys
        branches = [[pairs[i] for i in bin_] for bin_ in bins]
        may_join = self.device.type != "cuda" or joined_flash_works()
        how = {"branches": branches, "may_join": may_join, "window": window}
        return VarlenPlan.of([b.lengths for b in self.blocks], self.device, **how)


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "1 Hq N D"],
    key: Float[Tensor, "1 Hk N D"],
    value: Float[Tensor, "1 Hk N Dv"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cohort_layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "1 N Hq Dv"], None]:
    """softmax(q k^T * scaling) v within each block of the layout; an attention function of transformers.

    Raises:
        ValueError: no layout was passed: the model dropped the keyword argument that packed rows need; or
            dropout is on.
    """
    if cohort_layout is None:
        raise ValueError(f"{type(module).__name__} does not pass keyword arguments to its attention function")
    if dropout:
        raise ValueError(f"{type(module).__name__} applies dropout although it is not in training")
    window = None if sliding_window is None or cohort_layout.longest <= sliding_window else sliding_window
    kernels = None if softcap is not None else cohort_layout.kernels_for(query, value, window)
    if kernels is not None and (plan := cohort_layout.varlen(window)) is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return shared_prompt_attention(q, k, v, plan, scale=scale, sinks_H=s_aux, kernels=kernels)[None], None
    attend = partial(_attend, scaling=scaling, sliding_window=window, softcap=softcap, s_aux=s_aux)
    # Split, not slices: the backward of a slice writes zeros for the whole row.
    pieces = [x[0].split(cohort_layout.sizes, dim=1) for x in (query, key, value)]
    outputs = []
    for i, (block, slots) in enumerate(zip(cohort_layout.blocks, cohort_layout.slots, strict=True)):
        prompt, rest = ([x[at] for x in pieces] for at in (2 * i, 2 * i + 1))
        outputs.append(attend(*(x[None] for x in prompt))[0])
        if block.branches:
            outputs += _branching(attend, block, prompt, rest)
        elif len(slots):
            shape = len(block.completion_lengths), max(block.completion_lengths)
            q, *own = (_rectangle(x, slots, shape) for x in rest)
            shared = (x[None].expand(len(q), -1, -1, -1) for x in prompt[1:])
            k, v = (torch.cat(both, dim=2) for both in zip(shared, own, strict=True))
            # Padding is on the right, after every real query, so causality alone hides it.
            answer = attend(q, k, v).transpose(0, 1).flatten(1, 2)
            outputs.append(answer.index_select(1, slots))
    # Dory views the answer in another shape, so it must be contiguous, as that of transformers' functions is.
    return torch.cat([x.transpose(0, 1) for x in outputs])[None], None


def _rectangle(
    x_HnD: Float[Tensor, "H n D"], slots: Int[Tensor, " n"], shape: tuple[int, int]
) -> Float[Tensor, "G H C D"]:
    """Turns consecutive completions into rows of equal width, with zeros on the right."""
    num_heads, _, size = x_HnD.shape
    flat = x_HnD.new_zeros(num_heads, shape[0] * shape[1], size).index_copy(1, slots, x_HnD)
    return flat.unflatten(1, shape).transpose(0, 1)


def _branching(
    attend: Callable[..., Tensor], block: Block, prompt: list[Tensor], rest: list[Tensor]
) -> Iterator[Float[Tensor, "Hq n Dv"]]:
    """Answers completion by completion. All keys that they see are many more than N, so none are kept."""
    q, k, v = (x.split(block.completion_lengths, dim=1) for x in rest)

    def answer(own: Tensor, *given: Tensor) -> Tensor:
        return attend(own[None], *(torch.cat(given[i::2], dim=1)[None] for i in (0, 1)))[0]

    for i, (trunk, shared) in enumerate(block.branches):
        others = (k[trunk][:, :shared], v[trunk][:, :shared], k[i], v[i])
        yield checkpoint(answer, q[i], *prompt[1:], *others, use_reentrant=False)


def _attend(
    q: Float[Tensor, "B Hq T D"],
    k: Float[Tensor, "B Hk S D"],
    v: Float[Tensor, "B Hk S Dv"],
    *,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Float[Tensor, "B Hq T Dv"]:
    """Causal attention of the last T of S positions: the queries are aligned to the end of the keys.

    Soft-capped logits (Gemma 2) and attention sinks (gpt-oss) are computed step by step, by all scores.
    """
    num_queries, num_keys = q.shape[2], k.shape[2]
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    window = num_keys if sliding_window is None else sliding_window
    is_plain = softcap is None and s_aux is None
    if is_plain and num_keys <= window and num_queries == num_keys:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    columns = torch.arange(num_keys, device=q.device)
    distance = columns[num_keys - num_queries :, None] - columns
    mask = (distance >= 0) & (distance < window)
    if is_plain:
        return scaled_dot_product_attention(q, k, v, mask, scale=scaling)
    scores = q @ k.transpose(2, 3) * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float().masked_fill(~mask, float("-inf"))
    if s_aux is not None:
        sinks = s_aux.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    return torch.softmax(scores, dim=-1)[..., :num_keys].to(q.dtype) @ v


AttentionInterface.register(PACKED, packed_attention)


def branches_of(
    episodes: Sequence[tuple[int, int]], contexts: Sequence[list[int]]
) -> tuple[tuple[int, int], ...]:
    """`Block.branches` of rows: each branches off the row of its episode with the longest context.

    Args:
        contexts: tokens with which each row begins after the prompt; none of them was sampled. Only
            these are shared, so that each row keeps the weights, log-probs and routes of its own tokens.
    """
    trunks: dict[tuple[int, int], int] = {}
    for i, episode in enumerate(episodes):
        if len(contexts[i]) > len(contexts[trunks.setdefault(episode, i)]):
            trunks[episode] = i
    pairs = [(trunks[episode], i) for i, episode in enumerate(episodes)]
    return tuple((t, len(commonprefix([contexts[t], contexts[i]])) * (t != i)) for t, i in pairs)  # noqa: RUF071


def first_fit(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """First-fit decreasing: indices by bin, the largest first, each into the first bin with room."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        found = next((b for b, free in enumerate(room) if sizes[index] <= free), None)
        if found is None:
            found = len(bins)
            bins.append([])
            room.append(budget)
        bins[found].append(index)
        room[found] -= sizes[index]
    return bins


def even_bins(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """As few bins as first-fit decreasing needs, filled evenly: the largest index into the emptiest bin.

    Even bins have a lower memory peak. If one is larger than every first-fit bin, the latter are kept.
    """
    bins = first_fit(sizes, budget)
    even, filled = [list[int]() for _ in bins], [0] * len(bins)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        emptiest = filled.index(min(filled))
        even[emptiest].append(i)
        filled[emptiest] += sizes[i]
    limit = max((sum(sizes[i] for i in bin_) for bin_ in bins), default=0)
    return even if max(filled, default=0) <= limit else bins


def padded_bins(sizes: Sequence[tuple[int, int]], budget: int) -> list[list[int]]:
    """Bins of parcels, given as (width, rows), the widest first. All rows of a bin, padded to its widest,
    stay in the budget, and every parcel has three quarters of that width or more.
    """
    bins, widest, height = list[list[int]](), 0, 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i][0]):
        width, rows = sizes[i]
        if not bins or widest * (height + rows) > budget or 4 * width < 3 * widest:
            bins.append([])
            widest, height = width, 0
        bins[-1].append(i)
        height += rows
    return bins
