"""Which columns of a packed row see which, as variable-length calls of an attention kernel.

Each completion gets copies of all keys that it sees, its own last. One causal call, whose diagonal ends at
the last key, attends to them. Keys of grouped queries are narrow, and a backward pass copies them again.

Where prompts are long and completions short, copies would be too many. There, in one call every prompt and
every completion attends causally to itself. In a second one, the completions of a group attend to their
shared prompt, and in further ones branches to what they branch off. In a window only the last keys before a
run are copied. If they are too many all the same, no calls compute it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice, pairwise

import torch
from jaxtyping import Int
from torch import Tensor

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


def whole_numbers(values: Sequence[int]) -> Int[Tensor, " N"]:
    """As `torch.tensor`, which takes five times as long."""
    return torch.frombuffer(array("q", values), dtype=torch.int64) if values else torch.empty(0).long()


def placed(numbers: Sequence[int], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """Numbers on a device. From pageable memory the copy would wait for all passes before it."""
    here = whole_numbers(numbers).to(dtype)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here


@dataclass(frozen=True)
class Pass:
    """One varlen call: each run of queries attends to a run of keys.

    Attributes:
        queries, keys: the runs of both, equally many.
        causal: a query sees the keys up to its own; the diagonal ends at the last key of a run.
        window: a causal query sees at most this many keys, its own last; None: all.
        asking_C, seen_S: columns of the queries and of the keys; None: the row as it is.
    """

    queries: Segments
    keys: Segments
    causal: bool = True
    window: int | None = None
    asking_C: Int[Tensor, " C"] | None = None
    seen_S: Int[Tensor, " S"] | None = None

    @staticmethod
    def between(pairs: Sequence[tuple[range, range]], device: torch.device) -> Pass:
        """The second columns of each pair see all of the first ones."""
        seen, asking = zip(*pairs, strict=True)
        asking_C, seen_S = (placed([*chain(*x)], device) for x in (asking, seen))
        queries, keys = (Segments.of([*map(len, x)], device) for x in (asking, seen))
        return Pass(queries, keys, False, None, asking_C, seen_S)

    @staticmethod
    def joined(
        lengths: Sequence[int],
        pairs: Sequence[tuple[range, range]],
        device: torch.device,
        window: int | None = None,
    ) -> Pass | None:
        """Consecutive runs of these lengths see copies of all keys that they may, their own last; None: these
        are only their own, or too many to copy.

        Args:
            pairs: columns that are seen, and those of one or more whole runs that see them, in the order in
                which a run sees them.
            window: of keys that a query sees; only these are copied.
        """
        ends = [*accumulate(lengths, initial=0)]
        seen: list[list[range]] = [[] for _ in lengths]
        for there, mine in pairs:
            for i in range(bisect_left(ends, mine.start), bisect_left(ends, mine.stop)):
                seen[i] += [there] if lengths[i] else []
        seen = [[*others, range(*own)] for others, own in zip(seen, pairwise(ends), strict=True)]
        totals = [sum(map(len, parts)) for parts in seen]
        counts = totals
        if window is not None:
            counts = [min(total, n + window - 1) for n, total in zip(lengths, totals, strict=True)]
        if not pairs or sum(counts) > MOST_KEYS * sum(lengths):
            return None
        each = zip(seen, totals, counts, strict=True)
        columns = (islice(chain(*parts), total - count, None) for parts, total, count in each)
        queries, keys = (Segments.of(each, device) for each in (lengths, counts))
        return Pass(queries, keys, window=window, seen_S=placed([*chain(*columns)], device))

    def sides(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the call."""
        return taken(q, self.asking_C), taken(k, self.seen_S), taken(v, self.seen_S)


def taken(x: Tensor, columns: Tensor | None, dim: int = 0) -> Tensor:
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
        window: int | None = None,
    ) -> VarlenPlan | None:
        """The plan of contiguous blocks, each given by the lengths of its prompt and its completions; None:
        columns share others, and in a window too many would be copied.

        Args:
            branches: for each call, columns of completions that branches share, and their own.
            may_join: copy keys where they are not too many; in a window they always may be.
            window: keys that a column sees at most, its own last.
        """
        own, shared, start = list[int](), list[tuple[range, range]](), 0
        for lengths in blocks:
            prompt_end, end = start + lengths[0], start + sum(lengths)
            if len(lengths) > 2:
                shared.append((range(start, prompt_end), range(prompt_end, end)))
            own += lengths if len(lengths) > 2 else [end - start]
            start = end
        pairs = [*shared, *chain(*branches)]
        joined = Pass.joined(own, pairs, device, window) if may_join or window is not None else None
        if joined is not None:
            return VarlenPlan(joined)
        if pairs and window is not None:
            return None
        runs = Segments.of(own, device)
        crossings = (Pass.between(pairs, device) for pairs in (shared, *branches) if pairs)
        return VarlenPlan(Pass(runs, runs, window=window), tuple(crossings))
