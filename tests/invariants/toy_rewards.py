"""Rewards that a random tiny model has spread in: shares of words."""

from __future__ import annotations


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
