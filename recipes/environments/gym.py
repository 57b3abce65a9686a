"""Tasks of reasoning-gym in several turns: after a wrong answer, the model is told what is wrong with it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from recipes.environments.arithmetic import value_of
from rollout.environment import Environment, EnvironmentFault, Episode, Reply, Turn

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def spoken_answer(text: str) -> str:
    """The text inside the last <answer></answer>, else everything after the thinking."""
    spoken = text.rpartition("</think>")[2]
    return (ANSWER.findall(spoken) or [spoken])[-1].strip()


def countdown(answer: str, entry: Mapping[str, Any]) -> str:
    """Feedback on an expression: its value, and numbers that it may not use, or uses too often."""
    facts = entry["metadata"]
    try:
        value = value_of(answer)
    except (ValueError, ZeroDivisionError) as error:
        return f"that cannot be computed: {error}"
    extra = Counter(map(int, re.findall(r"\d+", answer))) - Counter(facts["numbers"])
    left = Counter(facts["numbers"]) - Counter(map(int, re.findall(r"\d+", answer)))
    said = f"that is {value}, and {facts['target']} is wanted"
    said += f"; not to be used: {sorted(extra.elements())}" if extra else ""
    return said + (f"; not used yet: {sorted(left.elements())}" if left else "")


def mini_sudoku(answer: str, entry: Mapping[str, Any]) -> str:
    """Feedback on a grid: the first rule that it breaks."""
    grid = [re.findall(r"\d", line) for line in answer.strip().splitlines() if line.strip()]
    if len(grid) != 4 or any(len(row) != 4 for row in grid):
        return "the grid must have 4 rows of 4 digits"
    for r, row in enumerate(entry["metadata"]["puzzle"]):
        for c, given in enumerate(row):
            if given and grid[r][c] != str(given):
                return f"row {r + 1}, column {c + 1} must stay {given}"
    boxes = [[grid[r + i][c + j] for i in (0, 1) for j in (0, 1)] for r in (0, 2) for c in (0, 2)]
    named = {"row": grid, "column": [list(column) for column in zip(*grid, strict=True)], "box": boxes}
    for name, parts in named.items():
        for number, part in enumerate(parts, 1):
            if sorted(part) != ["1", "2", "3", "4"]:
                return f"{name} {number} does not hold 1 to 4 once each: {' '.join(part)}"
    return "that is not the solution"


def number_sorting(answer: str, entry: Mapping[str, Any]) -> str:
    """Feedback on a list: missing or surplus numbers, else where its order is first wrong."""
    given, said = (re.findall(r"-?\d+(?:\.\d+)?", str(x)) for x in (entry["answer"], answer))
    if missing := Counter(given) - Counter(said):
        return f"missing: {', '.join(missing.elements())}"
    if extra := Counter(said) - Counter(given):
        return f"too many: {', '.join(extra.elements())}"
    place = next((i for i, (a, b) in enumerate(zip(said, given, strict=True)) if a != b), 0)
    return f"the order is wrong from number {place + 1} on"


FEEDBACK = {each.__name__: each for each in (countdown, mini_sudoku, number_sorting)}


def _if_arithmetic(score: Callable[..., float], answer: str, entry: Mapping[str, Any]) -> float:
    """Scores plain arithmetic only: reasoning-gym would evaluate any Python, for as long as that takes."""
    try:
        value_of(answer)
    except (ValueError, ZeroDivisionError):
        return 0.0
    return score(answer, entry)


class GymFeedback(Environment):
    """For rows of `data.source: reasoning_gym:NAME`; a turn that their own scorer finds right pays 1.

    Args:
        name: countdown, mini_sudoku or number_sorting.
    """

    repeatable, tools = True, ()

    def __init__(self, name: str) -> None:
        import reasoning_gym

        if name not in FEEDBACK:
            raise ValueError(f"name={name!r} has no feedback; use one of {', '.join(FEEDBACK)}")
        self.feedback = FEEDBACK[name]
        score: Any = reasoning_gym.get_score_answer_fn(name)
        self.score = partial(_if_arithmetic, score) if name == "countdown" else score

    def open(self, row: Mapping[str, Any], seed: int, state: Any = None) -> Answering:
        if not isinstance(row.get("entry"), Mapping):
            raise EnvironmentFault("the row has no column 'entry'; use data.source=reasoning_gym:NAME")
        return Answering(self, row["entry"])


class Answering(Episode):
    def __init__(self, owner: GymFeedback, entry: Mapping[str, Any]) -> None:
        self.owner, self.entry = owner, entry

    def step(self, turn: Turn) -> Reply:
        answer = spoken_answer(turn.text)
        score = float(self.owner.score(answer, self.entry))
        if score == 1.0:
            return Reply((), 1.0, done=True, state={})
        said = self.owner.feedback(answer, self.entry)
        return Reply(({"role": "user", "content": f"{said}. Answer again."},), 0.0, state={})
