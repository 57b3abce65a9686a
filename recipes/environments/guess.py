"""Guess the number: each wrong guess is answered with "higher" or "lower"."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any

from rollout.environment import Environment, Episode, Reply, Turn


class GuessNumber(Environment):
    """An integer from `low` to `high`, drawn from the seed; a right guess pays 1 and ends the episode.

    Without hints, k different guesses find one of n numbers with probability k / n, and no policy without
    hints does better. `environment.max_turns` is k.
    """

    repeatable, tools = True, ()

    def __init__(self, *, low: int = 1, high: int = 10) -> None:
        if low > high:
            raise ValueError(f"low={low} must not be above high={high}; use low=1, high=10")
        self.low, self.high = low, high

    def open(self, row: Mapping[str, Any], seed: int, state: Any = None) -> Guessing:
        return Guessing(random.Random(seed).randint(self.low, self.high))


class Guessing(Episode):
    def __init__(self, secret: int) -> None:
        self.secret = secret

    def step(self, turn: Turn) -> Reply:
        numbers = re.findall(r"\d{1,18}", turn.text)
        guess = int(numbers[-1]) if numbers else None
        if guess == self.secret:
            return Reply((), 1.0, done=True, state={})
        hint = "say a number" if guess is None else "higher" if guess < self.secret else "lower"
        facts = {"malformed": 1} if guess is None else {}
        return Reply(({"role": "user", "content": hint},), 0.0, facts=facts, state={})


def rows(num_rows: int = 1000, low: int = 1, high: int = 10) -> list[dict[str, Any]]:
    """Prompts of the game; an episode's number is drawn from its seed, which differs between prompts."""
    text = f"I think of a number from {low} to {high} . Guess it . Say a number ."
    return [{"prompt": text, "game": i} for i in range(num_rows)]
