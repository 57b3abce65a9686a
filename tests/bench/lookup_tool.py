"""Does a policy learn to ask a tool? `python -m tests.bench.lookup_tool [FOLDER] [STEPS]`.

A model of 2 layers from random weights says which of four numbers is meant, and nothing but the tool `look`
knows: without it no policy is right more often than 1 / 4. The same model plays with the tool, and where it
is missing. Prints the share of episodes that succeed in the first and last 20 steps, with intervals clustered
by prompt, and the calls of an episode.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.environments.calls import answer_calls
from recipes.evaluation.statistics import share_interval
from recipes.grpo import run
from rl.store.ledger import Ledger
from rollout.environment import Environment, Episode, Reply, Turn
from tests.bench.guess_number import make_model
from tests.conftest import SPECIAL

NUMBERS, LAST = 4, 20
CALL = '<tool_call>{"name":"look","arguments":{}}</tool_call>'  # a word, as it has no space
WORDS = [*SPECIAL, "<tool>", *map(str, range(1, NUMBERS + 1)), CALL, "Which", "number", "is", "it", "?"]


class Lookup(Environment):
    """A number drawn from the seed; the answer pays 1 if it is that, and ends the episode."""

    repeatable, tools = True, ()

    def __init__(self, *, has_tool: bool) -> None:
        self.has_tool = has_tool

    def open(self, row: Mapping[str, Any], seed: int, state: Any = None) -> Looking:
        return Looking(str(random.Random(seed).randint(1, NUMBERS)), self.has_tool)


class Looking(Episode):
    def __init__(self, secret: str, has_tool: bool) -> None:
        self.secret = secret
        self.tools = {"look": lambda: secret} if has_tool else {}

    def step(self, turn: Turn) -> Reply:
        messages, counts = answer_calls(turn, self.tools)
        paid = float(turn.text.strip() == self.secret)
        return Reply(tuple(messages), None if messages else paid, not messages, counts, {})


def rows(num_rows: int) -> list[dict[str, Any]]:
    return [{"prompt": "Which number is it ?", "number": i} for i in range(num_rows)]


def play(folder: Path, steps: int, *, has_tool: bool) -> None:
    run_dir = folder / ("with" if has_tool else "without")
    ends = [WORDS.index(word) for word in (*map(str, range(1, NUMBERS + 1)), CALL)]
    config = {
        "run_dir": str(run_dir),
        "model": {"name": str(folder / "model"), "dtype": "fp32"},
        "data": {"source": "tests.bench.lookup_tool:rows", "options": {"num_rows": 8}},
        "sampling": {"max_completion_length": 32, "stop_token_ids": ends},  # a number or a call ends a turn
        "engine": {"name": "transformers"},
        "environment": {
            "name": "tests.bench.lookup_tool:Lookup",
            "options": {"has_tool": has_tool},
            "max_turns": 2,
            "max_turn_length": 2,
            "workers": 1,
        },
        "rewards": {"functions": [{"name": "environment"}]},
        "train": {"steps": steps, "prompts_per_step": 32, "group_size": 8, "token_budget": 8192},
        "loss": {"kl_coef": 0.0, "entropy_coef": 0.1},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every": 0},
    }
    run(config)
    ledger = Ledger(run_dir)
    for last in (range(LAST), range(steps - LAST, steps)):
        groups = [g for step in last for g in ledger.read(step).groups]  # pyright: ignore[reportOptionalMemberAccess]
        shares = [sum(r.score or 0.0 for r in g.rewards) / len(g.rewards) for g in groups]
        calls = [c.facts.get("counts", {}).get("calls", 0) for g in groups for c in g.group.completions]
        number = len(calls)
        low, high = share_interval(shares, number)
        print(
            f"{run_dir.name} the tool, steps {last.start + 1} to {last.stop}: "
            f"{sum(shares) / len(shares):.1%} of {number} episodes succeed "
            f"(95 % interval {low:.1%} to {high:.1%}), {sum(calls) / number:.2f} calls an "
            f"episode; without a tool at most {1 / NUMBERS:.1%}"
        )


if __name__ == "__main__":
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    make_model(place / "model", WORDS)
    for has_tool in (True, False):
        play(place, int(sys.argv[2]) if len(sys.argv) > 2 else 100, has_tool=has_tool)
