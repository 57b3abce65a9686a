"""Ends completions at stop strings: on the sampled ids, which are never tokenised again.

A completion is sampled on to its end id or length, and cut here. So every engine cuts alike, and nothing that
the sampler computes depends on text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rl.types import Completion, VersionSpan


def cut_at_stop(tokenizer: Any, completions: Sequence[Completion], stop: Sequence[str]) -> list[bool]:
    """Cuts each completion behind the token that completes the first of the stop strings; which ones had one.

    The string and the rest of that token stay in it. What the engine failed to sample stays as it is.
    """
    return [bool(stop) and _cut(c, _num_until(c, tokenizer, stop)) for c in completions]


def _num_until(c: Completion, tokenizer: Any, stop: Sequence[str]) -> int | None:
    """The fewest tokens whose text holds one of the strings, by bisection; None if the whole has none."""

    def holds(num: int) -> bool:
        text = tokenizer.decode(c.token_ids[:num], skip_special_tokens=False)
        return any(string in text for string in stop)

    none, some = 0, len(c.token_ids)
    if c.finish_reason == "abort" or not holds(some):
        return None
    while some - none > 1:
        middle = (none + some) // 2
        none, some = (none, middle) if holds(middle) else (middle, some)
    return some


def _cut(c: Completion, num_kept: int | None) -> bool:
    if num_kept is None:
        return False
    spans, room = [], num_kept
    for span in c.version_spans:
        if room > 0:
            spans.append(VersionSpan(span.policy_version, min(span.num_tokens, room)))
        room -= span.num_tokens
    c.token_ids, c.loss_mask = c.token_ids[:num_kept], c.loss_mask[:num_kept]
    c.behavior_logprobs = c.behavior_logprobs[:num_kept]
    c.version_spans, c.finish_reason = spans, "stop"
    return True
