"""Groups of episodes of several rows, whose prompts are equal, begin each other or have nothing in common. In
half of the groups each row's prompt goes on from that of the row before.
"""

from __future__ import annotations

import random

import numpy as np

from rl.types import Completion, Continuation, Group, Prompt, Reward, ScoredGroup, VersionSpan

Drawn = tuple[list[ScoredGroup], list[list[float | list[float]]]]


def row(draw: random.Random, *, with_logprobs: bool, with_routes: bool) -> Completion:
    number, share = draw.randint(1, 7), draw.choice([0.0, 0.7, 1.0])
    mask = [draw.random() < share for _ in range(number)]
    logprobs = [draw.gauss(-4, 0.3) if chosen else 0.0 for chosen in mask] if with_logprobs else []
    ids = [draw.randrange(5, 100) for _ in range(number)]
    made = Completion(ids, logprobs, mask, "stop", [VersionSpan(0, number)])
    if with_routes and draw.random() < 0.8:
        made.routes = np.array([[[draw.randrange(8)]] for _ in ids], np.int8)
    return made


def prompt_like(draw: random.Random, base: tuple[int, ...]) -> tuple[int, ...]:
    """The base, a beginning of it, or another prompt; and something after it, or nothing."""
    kept = base[: draw.choice([0, 1, len(base) // 2, len(base) - 1, len(base), len(base), len(base)])]
    return (*kept, *(draw.randrange(5, 9) for _ in range(draw.choice([0, 0, 1, 4])))) or (5,)


def episodes(seed: int, *, with_logprobs: bool = True, with_routes: bool = False) -> Drawn:
    """Four groups of up to four completions of one to four rows; some are cut, aborted or without signal."""
    draw, groups, advantages = random.Random(seed), [], []
    given = {"with_logprobs": with_logprobs, "with_routes": with_routes}
    for p in range(4):
        base = tuple(draw.randrange(5, 9) for _ in range(draw.randint(1, 9)))
        goes_on = draw.random() < 0.5
        completions, weights = [], []
        for _ in range(draw.randint(1, 4)):
            made, last = row(draw, **given), base
            for _ in range(draw.choice([0, 0, 1, 3])):
                more = (draw.randrange(5, 9), draw.randrange(5, 9))
                last = (*last, *more) if goes_on else prompt_like(draw, base)
                made.continuations.append(Continuation(last, row(draw, **given)))
            made.finish_reason = draw.choice(["stop", "stop", "stop", "length", "abort"])
            numbers = [draw.choice([0.0, draw.gauss(0, 1)]) for one in made.rows for _ in one.token_ids]
            completions.append(made)
            weights.append(draw.choice([0.0, draw.gauss(0, 1), numbers]))
        prompt = Prompt(f"p{p}", "", base)
        groups.append(ScoredGroup(Group(prompt, completions), [Reward(0.0)] * len(completions)))
        advantages.append(weights)
    return groups, advantages
