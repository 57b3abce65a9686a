"""Numbers of runs with a tool: `python -m tests.bench.python_tool RUN ...`; `slow` is the tool with a delay.

For each run: held-out success before and after with 95 % intervals; mean turns, calls and failed calls of the
first and last ten steps; seconds a step by phase, and the share of sampling in which the engine waited.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from recipes.environments import load
from rl.store.rows import read_rows
from rollout.environment import Environment, Episode, Turn

EDGE = 10  # steps at each end of a run


def slow(delay_s: float = 0.2, **options: Any) -> Environment:
    """The environment `python`, each turn with calls `delay_s` later."""
    environment: Any = load("python", options)
    opened = environment.open

    def open_slowly(row: Mapping[str, Any], seed: int, state: Any = None) -> Episode:
        episode = opened(row, seed, state)
        step = episode.step

        def step_slowly(turn: Turn) -> Any:
            time.sleep(delay_s if turn.calls else 0.0)
            return step(turn)

        episode.step = step_slowly
        return episode

    environment.open = open_slowly
    return environment


def main(run: Path) -> None:
    rows = read_rows(run / "metrics.jsonl")
    held = read_rows(run / "evaluation.jsonl") if (run / "evaluation.jsonl").exists() else []
    print(f"{run}: {len(rows)} steps")
    for row in held[:1] + held[1:][-1:]:
        low, high = row["low"], row["high"]
        print(f"  step {row['step']}: {row['accuracy']:.1%} ({low:.1%} to {high:.1%}) of {row['n']} succeed")
    for name in ("reward/mean", "episode/turns", "tools/calls", "tools/failed"):
        ends = [[row[name] for row in part if name in row] for part in (rows[:EDGE], rows[-EDGE:])]
        if all(ends):
            print(
                f"  {name}: {fmean(ends[0]):.3f} in the first {EDGE} steps, {fmean(ends[1]):.3f} in the last"
            )
    # The first steps pay for what is loaded and compiled then.
    after = rows[3:] or rows
    names = [
        name
        for name in after[-1]
        if name.startswith("time/") or name in ("episode/wait_share", "tools/python/seconds")
    ]
    for name in names:
        values = [row[name] for row in after if name in row]
        print(f"  {name}: {fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})")


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        main(Path(folder))
