"""What training complete groups while others still sample could save at most, on workload W.

    python -m tests.bench.tail [--steps 200] [--train-s 1.78] [--token-budget 4096] [--trainer-sms 0.75]

Lengths are drawn as W draws them. A decode step takes what one H200 needed for that many running completions,
and its kernels a part of that (recipes/SPEED.md, "Sampling"), interpolated between three points. A group can
be trained once all its completions are done, in micro-batches of `--token-budget` tokens, which are taken to
cost as much per token as larger ones. Two bounds are printed. On one card whose processes take turns, the
trainer gets what the engine's kernels leave idle, and delays nothing. On two it computes at full speed
meanwhile. A decode step of few completions has kernels at nearly all times, and yet uses a third of the
memory's bandwidth and hardly any arithmetic. So one card that both use at once, each with its own
multiprocessors (green contexts, or MPS), is not bounded by its idle time. For that case printed is what a
step saves if the trainer has the share `--trainer-sms` of them and their speed, and decode steps take 1,
1.25, 1.5 or 2 times as long meanwhile. `tests.bench.at_once` measures both and asks this model.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.bench.workload import STOP_SHARE, Workload

RUNNING, STEP_MS, KERNELS_MS = (30.0, 120.0, 224.0), (2.4, 3.0, 3.7), (2.2, 2.6, 3.6)
SLOWER = (1.0, 1.25, 1.5, 2.0)


@dataclass(frozen=True)
class Sharing:
    """A card that both use at once: how many times as long decode steps take meanwhile, and the trainer's
    speed as a share of that alone, for numbers of `running` completions; between them linear, beyond equal.
    """

    running: Sequence[float]
    slower: Sequence[float]
    speed: Sequence[float]


@dataclass(frozen=True)
class Hidden:
    """Seconds of a step: its sampling, its idle part, training done meanwhile on one and two cards, and what
    each `Sharing` of a card saves, which is used for a decode step only where that saves time."""

    sample: float
    idle: float
    one_card: float
    two_cards: float
    shared: tuple[float, ...]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--train-s", type=float, default=1.78)
    parser.add_argument("--token-budget", type=int, default=4096)
    parser.add_argument("--trainer-sms", type=float, default=0.75)
    asked = parser.parse_args()
    how = [Sharing([1], [slower], [asked.trainer_sms]) for slower in SLOWER]
    steps = simulated(how, asked.steps, train_s=asked.train_s, token_budget=asked.token_budget)
    sample, idle, one, two = (
        statistics.mean(getattr(s, name) for s in steps)
        for name in ("sample", "idle", "one_card", "two_cards")
    )
    total = sample + asked.train_s
    print(f"sampling {sample:.2f} s, of which kernels leave idle {idle:.2f}; training {asked.train_s:.2f} s")
    for name, hidden in (("one card, in turns", one), ("two cards", two)):
        print(f"{name}: at most {hidden:.2f} s of training hidden, {hidden / total:.1%} of sample + train")
    for slower, saved in zip(SLOWER, zip(*(s.shared for s in steps), strict=True), strict=True):
        share = statistics.mean(saved) / total
        print(f"one card, at once, decode steps {slower:.2f}x as long meanwhile: {share:.1%} saved")


def saved_at_once(how: Sharing, steps: int = 100, *, train_s: float, token_budget: int) -> float:
    """The share of sample + train that a card shared in this way saves."""
    found = simulated([how], steps, train_s=train_s, token_budget=token_budget)
    return sum(s.shared[0] for s in found) / sum(s.sample + train_s for s in found)


def simulated(how: Sequence[Sharing], steps: int, *, train_s: float, token_budget: int) -> list[Hidden]:
    draw, w = random.Random(0), Workload()
    return [simulate(w, draw, how, train_s=train_s, token_budget=token_budget) for _ in range(steps)]


def simulate(
    w: Workload, draw: random.Random, how: Sequence[Sharing], *, train_s: float, token_budget: int
) -> Hidden:
    groups = [[length(w, draw) for _ in range(w.group)] for _ in range(w.prompts)]
    ends = sorted((max(group), w.prompt_length + sum(group)) for group in groups)
    every = sorted(n for group in groups for n in group)
    per_token = train_s / sum(tokens for _, tokens in ends)
    sample = idle = one = two = 0.0
    trained, longer = [0.0] * len(how), [0.0] * len(how)
    done, at, complete = 0, 0, 0
    for token in range(1, every[-1] + 1):
        step = interpolated(len(every) - done, STEP_MS) / 1e3
        left = step - interpolated(len(every) - done, KERNELS_MS) / 1e3
        sample, idle = sample + step, idle + left
        ready = complete // token_budget * token_budget * per_token  # whole micro-batches only
        one, two = min(ready, one + left), min(ready, two + step)
        for i, sharing in enumerate(how):
            at_once = len(every) - done, sharing.running
            slower, speed = (float(np.interp(*at_once, x)) for x in (sharing.slower, sharing.speed))
            if (todo := ready - trained[i]) > 0 and speed * slower > slower - 1:
                # Of the step the part that training lasts, if less is left to train than a whole one takes.
                part = min(1.0, todo / (step * slower * speed))
                trained[i] += part * step * slower * speed
                longer[i] += part * step * (slower - 1)
        while done < len(every) and every[done] <= token:
            done += 1
        while at < len(ends) and ends[at][0] <= token:
            complete, at = complete + ends[at][1], at + 1
    return Hidden(sample, idle, one, two, tuple(t - more for t, more in zip(trained, longer, strict=True)))


def length(w: Workload, draw: random.Random) -> int:
    number = 1
    while number < w.max_length and draw.random() >= STOP_SHARE:
        number += 1
    return number


def interpolated(running: float, values: tuple[float, ...]) -> float:
    """Linear between the points and beyond the last one; the first value below the first point."""
    if running <= RUNNING[0]:
        return values[0]
    k = 1 if running <= RUNNING[1] else 2
    share = (running - RUNNING[k - 1]) / (RUNNING[k] - RUNNING[k - 1])
    return values[k - 1] + share * (values[k] - values[k - 1])


if __name__ == "__main__":
    main()
