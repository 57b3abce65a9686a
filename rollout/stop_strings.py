"""Ends completions at stop strings: on the sampled ids, which are never tokenised again.

A completion is sampled up to its end id or length limit, and then cut here. So every engine cuts alike, and
nothing that the sampler computes depends on text.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from rl.types import Completion, VersionSpan


def cut_at_stop(c: Completion, tokenizer: Any, stop: Sequence[str]) -> bool:
    """Cuts a completion after the token that completes its first stop string; returns whether it was cut.

    The string and the rest of that token stay. An aborted completion is left as it is.
    """

    def holds(num: int) -> bool:
        text = tokenizer.decode(c.token_ids[:num], skip_special_tokens=False)
        return any(string in text for string in stop)

    if not stop or c.finish_reason == "abort" or not holds(len(c.token_ids)):
        return False
    # The fewest tokens whose text holds one of the strings.
    num_kept = bisect_left(range(len(c.token_ids)), True, lo=1, key=holds)
    spans, room = [], num_kept
    for span in c.version_spans:
        if room > 0:
            spans.append(VersionSpan(span.policy_version, min(span.num_tokens, room)))
        room -= span.num_tokens
    c.token_ids, c.loss_mask = c.token_ids[:num_kept], c.loss_mask[:num_kept]
    c.behavior_logprobs = c.behavior_logprobs[:num_kept]
    c.routes = None if c.routes is None else c.routes[:num_kept]
    c.version_spans, c.finish_reason = spans, "stop"
    return True
