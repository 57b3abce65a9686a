"""Environments that misbehave, for processes that are killed."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

from recipes.environments.calls import now
from rollout.environment import EnvironmentFault, Reply

TEXT = {"role": "user", "content": "ok"}


class Misbehaves:
    """Does what the turn's text names."""

    repeatable, tools = True, ()

    def __init__(self, *, keeps_state: bool = True) -> None:
        self.keeps_state = keeps_state

    def open(self, row, seed, state=None):
        if row.get("reset") == "fails":
            raise EnvironmentFault("no such world")
        return Doing(self, (state or {}).get("turns", 0))

    def close(self):
        pass


class Doing:
    def __init__(self, owner, turns) -> None:
        self.owner, self.turns = owner, turns

    def step(self, turn):
        self.turns += 1
        state = {"turns": self.turns} if self.owner.keeps_state else None
        content = f"turn {self.turns} in {os.getpid()}"
        if turn.text == "hang":
            time.sleep(600)
        if turn.text == "die":
            os.kill(os.getpid(), 9)
        if turn.text == "exit":
            os._exit(7)
        if turn.text == "last words":
            os.write(2, b"the last words\n")
            os._exit(7)
        if turn.text == "huge":
            content = "x" * 10_000_000
        if turn.text == "nul":
            content = "a\x00b\ud800c"
        if turn.text == "memory":
            content = "x" * (1 << 33)
        if turn.text == "raise":
            raise KeyError("lost")
        if turn.text == "print":
            print("y" * 200_000)
        return Reply(({"role": "user", "content": content},), 0.0, state=state)

    def close(self):
        pass


class Draws(Misbehaves):
    """Says what it draws, as an environment does that knows nothing of seeds."""

    def open(self, row, seed, state=None):
        return Drawing()


class Drawing:
    def step(self, turn):
        return Reply(({"role": "user", "content": f"{random.random()} {now()}"},), 0.0, state={})

    def close(self):
        pass


class Fails(Misbehaves):
    def open(self, row, seed, state=None):
        raise EnvironmentFault("the world is down")


class Logged:
    """Notes every call in a file, one line each; waits where a file says so. Ends after three turns."""

    tools = ()

    def __init__(self, *, file: str, repeatable: bool = True) -> None:
        self.file, self.repeatable = Path(file), repeatable

    def open(self, row, seed, state=None):
        return Noting(self, seed)

    def close(self):
        pass


class Noting:
    def __init__(self, owner, seed) -> None:
        self.owner, self.seed = owner, seed

    def step(self, turn):
        with self.owner.file.open("a") as file:
            file.write(f"{self.seed} {turn.number} {turn.text!r}\n")
        words = turn.text.split("w")
        return Reply(
            ({"role": "user", "content": f"w{turn.number} w{self.seed % 50}"},),
            len(words) / 10,
            turn.number == 2,
            state={},
        )

    def close(self):
        pass
