"""A readable sample of a run's groups, from its ledger: steps evenly spread, no more than a page can hold."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import groupby, islice, zip_longest
from pathlib import Path
from typing import Any

from rl.store.ledger import Ledger
from rl.store.ledger_parse import LedgerStep
from rl.store.redact import redact, show_controls
from rl.types import Advantage, Completion, Reward, ScoredGroup

MAX_GROUPS = 60
MAX_STEPS = 20
MAX_BYTES = 2_500_000
_GROUP_TEXT = 48_000  # characters of completions in one group; each gets an equal share, at most _TEXT
_TEXT = 8_000
_PROMPT_TEXT = 4_000
_MAX_BARS = 96  # a completion's log-probs are shown as at most this many means
_MAX_COMPLETIONS = 64
_MAX_ITEMS = 12  # columns of a prompt, parts of a reward
_NUM_CANDIDATES = 24  # groups of a step from which the shown ones are chosen
_LARGEST = 1e6  # nats; beyond it a log-prob is cut
Candidate = tuple[ScoredGroup, Sequence[float] | None, list[str]]


def sample_groups(run_dir: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Up to `MAX_GROUPS` groups as JSON objects of at most `MAX_BYTES`, by step; and what could not be read.

    When size is short the first and the last step win. Long text keeps both of its ends;
    secrets are hidden, and control and bidi characters are made visible.
    """
    ledger = Ledger(run_dir)
    steps = ledger.sampled_steps(MAX_STEPS)
    quota = MAX_GROUPS // max(1, len(steps))
    per_step: dict[int, list[dict[str, Any]]] = {}
    records = ledger.sample(MAX_STEPS, _NUM_CANDIDATES)
    for turn, (step, shares) in enumerate(groupby(records, key=lambda record: record.step)):
        found = [
            candidate for tied in zip_longest(*map(_candidates, shares)) for candidate in tied if candidate
        ]
        # The ledger counts steps from 0; curves and checks name a step by how many are done.
        per_step[step + 1] = [describe_group(step + 1, *chosen) for chosen in _varied(found, quota, turn)]
    kept: list[dict[str, Any]] = []
    room = MAX_BYTES
    for step in _ends_first(sorted(per_step)):
        for group in per_step[step]:
            size = len(json_for_html(group).encode())
            if size <= room:
                room -= size
                kept.append(group)
    kept.sort(key=lambda group: group["step"])
    return kept, list(ledger.damaged)


def _candidates(record: LedgerStep) -> list[Candidate]:
    given = record.advantages or [None] * len(record.groups)
    rows = [None if row is None else [_mean(advantage) for advantage in row] for row in given]
    return [(group, row, tags_of(group, row)) for group, row in zip(record.groups, rows, strict=True)]


def _mean(advantage: Advantage) -> float:
    """Of a completion, whose tokens may have one each."""
    if isinstance(advantage, Sequence):
        return sum(advantage) / max(len(advantage), 1)
    return advantage


def json_for_html(value: Any) -> str:
    """JSON that cannot end the <script> element it stands in: <, >, &, U+2028 and U+2029 are escaped."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def tags_of(scored: ScoredGroup, advantages: Sequence[float] | None) -> list[str]:
    """What the filters of the report's browser tell groups by."""
    scores = {
        r.score for c, r in zip(scored.completions, scored.rewards, strict=True) if c.finish_reason != "abort"
    }
    tags = {
        "no spread": len(scores - {None}) < 2 and not any(advantages or ()),
        "truncated": any(c.finish_reason == "length" for c in scored.completions),
        "abstained": None in scores,
    }
    return [tag for tag, is_set in tags.items() if is_set]


def describe_group(
    step: int, scored: ScoredGroup, advantages: Sequence[float] | None, tags: list[str]
) -> dict[str, Any]:
    """A group as the report's browser reads it, the best completion first (by advantage, else by score)."""
    pairs = list(zip(scored.completions, scored.rewards, strict=True))[:_MAX_COMPLETIONS]
    budget = min(_TEXT, max(200, _GROUP_TEXT // max(1, len(pairs))))
    entries = [
        _describe_completion(c, r, None if advantages is None else advantages[i], budget)
        for i, (c, r) in enumerate(pairs)
    ]
    order = "advantage" if advantages is not None else "score"
    entries.sort(key=lambda entry: -math.inf if entry[order] is None else entry[order], reverse=True)
    return {
        "step": step,
        "id": _readable(scored.prompt.id, 200),
        "prompt": _readable(scored.prompt.text, _PROMPT_TEXT),
        "columns": {
            _readable(name, 60): _readable(value if isinstance(value, str) else json.dumps(value), 400)
            for name, value in redact(_clipped(scored.prompt.columns)).items()
        },
        "tags": tags,
        "completions": entries,
    }


def _describe_completion(
    completion: Completion, reward: Reward, advantage: float | None, budget: int
) -> dict[str, Any]:
    logprobs = completion.behavior_logprobs
    return {
        "text": _readable(completion.text, budget),
        "score": _rounded(reward.score),
        "advantage": _rounded(advantage),
        "parts": {
            _readable(name, 60): _rounded(part) for name, part in list(reward.parts.items())[:_MAX_ITEMS]
        },
        "reason": str(reward.reason),
        "detail": _readable(reward.detail, 300),
        "extracted": None if reward.extracted is None else _readable(reward.extracted, 200),
        "length": len(completion.token_ids),
        "finish": completion.finish_reason,
        "version": completion.policy_version,
        "logprobs": [round(value, 2) for value in _means(logprobs, _MAX_BARS)],
    }


def _clipped(value: Any, depth: int = 4) -> Any:
    """The first items of lists and dicts, and of those in them: what is shown of a column needs no more."""
    if isinstance(value, dict):
        return (
            {n: _clipped(item, depth - 1) for n, item in islice(value.items(), _MAX_ITEMS)} if depth else "…"
        )
    if isinstance(value, list):
        return [_clipped(item, depth - 1) for item in value[:_MAX_ITEMS]] if depth else "…"
    return value


def _readable(text: str, limit: int) -> str:
    plain = redact(text)
    if len(plain) <= limit:
        return show_controls(plain)
    half = limit // 2
    ends = show_controls(plain[:half]), show_controls(plain[-half:])
    return f"{ends[0]}\n[… {len(plain) - 2 * half:,} characters left out …]\n{ends[1]}"


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 4)


def _means(values: Sequence[float], limit: int) -> list[float]:
    size = max(1, math.ceil(len(values) / limit))
    shown = [max(-_LARGEST, min(_LARGEST, value)) for value in values]
    return [math.fsum(shown[i : i + size]) / len(shown[i : i + size]) for i in range(0, len(shown), size)]


def _varied(groups: Sequence[Candidate], quota: int, turn: int) -> list[Candidate]:
    """Up to `quota` groups, one of each kind (set of tags) before a second; `turn` picks the first."""
    kinds: dict[tuple[str, ...], list[Candidate]] = {}
    for group in groups:
        kinds.setdefault(tuple(group[2]), []).append(group)
    queues = [kinds[kind] for kind in sorted(kinds)]
    if queues:
        queues = queues[turn % len(queues) :] + queues[: turn % len(queues)]
    depth = max(map(len, queues), default=0)
    return [queue[i] for i in range(depth) for queue in queues if i < len(queue)][:quota]


def _ends_first(steps: Sequence[int]) -> list[int]:
    """First, last, then the middles of ever smaller gaps."""
    if not steps:
        return []
    order = [0, len(steps) - 1]
    gaps = [(0, len(steps) - 1)]
    while gaps:
        low, high = gaps.pop(0)
        middle = (low + high) // 2
        if high - low > 1:
            order.append(middle)
            gaps += [(low, middle), (middle, high)]
    return [steps[i] for i in dict.fromkeys(order)]
