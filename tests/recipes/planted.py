"""Words that are planted into prompts, and texts of them."""

from __future__ import annotations

LONG = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
]


def text(*words: str) -> str:
    return " ".join(words)
