"""Rewards that a random tiny model has spread in: shares of words."""

from __future__ import annotations

import os
import signal
import time

from rewards.plugins import per_completion


def low_words(prompts, completions, **columns):
    """Share of the completion's words that are w0 to w39."""
    return [_share(text, {f"w{i}" for i in range(40)}) for text in completions]


def even_words(prompts, completions, **columns):
    """1 if more than half of the words are even-numbered."""
    return [float(_share(text, {f"w{i}" for i in range(0, 80, 2)}) > 0.5) for text in completions]


def _share(text, wanted):
    text = text if isinstance(text, str) else text[-1]["content"]
    words = text.replace("w", " w").split()
    return sum(word in wanted for word in words) / max(len(words), 1)


def broken(prompts, completions, **columns):
    raise KeyError("no such thing")


def constant(prompts, completions, **columns):
    return [1.0] * len(completions)


def three(prompts, completions, **columns):
    return [3.0] * len(completions)


def minus_one(prompts, completions, **columns):
    return [-1.0] * len(completions)


def longer_than_one(prompts, completions, completion_ids, **columns):
    return [float(len(ids) > 1) for ids in completion_ids]


_calls = []


@per_completion
def broken_once(prompts, completions, **columns):
    """Raises on the third completion of its process and scores all others."""
    _calls.append(1)
    if len(_calls) == 3:
        raise RuntimeError("only once")
    return low_words(prompts, completions)


@per_completion
def slow(prompts, completions, **columns):
    time.sleep(0.05)
    return low_words(prompts, completions)


def stuck(prompts, completions, stuck_s=60, **columns):
    print("stuck")
    time.sleep(stuck_s)
    return low_words(prompts, completions)


@per_completion
def stops_the_trainer(prompts, completions, **columns):
    """Scores, and sends the trainer SIGTERM at the second evaluation, of w70 to w72."""
    if any(f"w{i}" in str(prompts) for i in (70, 71, 72)):
        _calls.append(1)
        if len(_calls) == 4:
            os.kill(os.getppid(), signal.SIGTERM)
    return low_words(prompts, completions)


@per_completion
def kills_the_trainer(prompts, completions, **columns):
    """Scores; where TOY_KILL names a file that is there, kills one trainer with -9 at the 30th completion."""
    _calls.append(1)
    order = os.environ.get("TOY_KILL", "")
    if len(_calls) == 30 and os.path.exists(order):
        os.remove(order)
        os.kill(os.getppid(), signal.SIGKILL)
    return even_words(prompts, completions)


@per_completion
def takes_away(prompts, completions, **columns):
    """Scores; at the 20th completion renames the path that TOY_TAKE names, as a user might."""
    _calls.append(1)
    if len(_calls) == 20:
        os.rename(os.environ["TOY_TAKE"], os.environ["TOY_TAKE"] + "-elsewhere")
    return low_words(prompts, completions)
