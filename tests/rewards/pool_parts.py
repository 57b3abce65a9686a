"""Completions and groups to be graded, and what a pool says of its graders."""

from __future__ import annotations

from rl.types import Completion, Group, Prompt


def completion(text, token_ids=(1, 2, 3), finish_reason="stop"):
    return Completion(list(token_ids), [], [True] * len(token_ids), finish_reason, [], text=text)


def group(texts, *, id="p/0", messages=(), **columns):
    return Group(Prompt(id, "question", (1,), messages, columns), [completion(text) for text in texts])


def both_ready(pool):
    return [grader.ready for grader in pool._graders._graders] == [True, True]
