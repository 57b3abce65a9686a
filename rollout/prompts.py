"""The order in which prompts are consumed, and their seeds: the same on any number of processes and after a
restart.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from itertools import count
from typing import Any

from rl.types import Prompt


class PromptStream:
    """An endless seeded order of the prompts: every epoch holds each prompt once, shuffled anew."""

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool = True) -> None:
        self.prompts, self.seed, self.shuffle = prompts, seed, shuffle
        self._order: tuple[int, Sequence[int]] = (-1, ())

    def at(self, ordinal: int) -> Prompt:
        """The prompt that is consumed as number `ordinal`, counted from 0 over all epochs."""
        epoch, index = divmod(ordinal, len(self.prompts))
        if self._order[0] != epoch:
            order = list(range(len(self.prompts)))
            if self.shuffle:
                random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self.prompts[self._order[1][index]]


def sampling_seed(run_seed: int, ordinal: int, purpose: str = "train") -> int:
    """A 31-bit seed for the completions of one consumed prompt."""
    digest = hashlib.blake2b(f"{purpose}/{run_seed}/{ordinal}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF


def deal(first: int, wanted: Sequence[int]) -> list[list[int]]:
    """Ordinals from `first` on, dealt round to the processes until each has what it wants: [2, 1] -> [[0,
    2], [1]].
    """
    hands: list[list[int]] = [[] for _ in wanted]
    numbers = count(first)
    for turn in range(max(wanted)):
        for hand, n in zip(hands, wanted, strict=True):
            if turn < n:
                hand.append(next(numbers))
    return hands


def shortest_cursor(next_ordinal: int, pending: list[int]) -> Any:
    """The shortest form of a cursor. Pending numbers at the end count as not dealt; `pending` ascends."""
    while pending and pending[-1] == next_ordinal - 1:
        next_ordinal = pending.pop()
    return {"next": next_ordinal, "pending": pending} if pending else next_ordinal
