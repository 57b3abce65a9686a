"""A group of the ledger as the report's page reads it: a row of the list, and its texts. Both are JSON.

Long text keeps both of its ends; secrets are hidden, and control and bidi characters are made visible.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import compress, islice
from typing import Any

from rl.store.redact import redact, show_controls
from rl.types import Advantage, Completion, Prompt, Reward, ScoredGroup

_GROUP_TEXT = 200_000  # characters of completions in one group; each gets an equal share, at most MAX_TEXT
MAX_TEXT = 20_000
_WORDS = 90  # characters of a prompt in the list
_MAX_BARS = 96  # a completion's log-probs are shown as at most this many means
_MAX_COMPLETIONS = 64
_MAX_ITEMS = 12  # columns of a prompt, parts of a reward
_LARGEST = 1e6  # nats; beyond it a log-prob is cut


def json_for_html(value: Any) -> str:
    """JSON that cannot end the <script> element it stands in: <, >, &, U+2028 and U+2029 are escaped."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def describe_row(scored: ScoredGroup, advantages: Sequence[Advantage] | None) -> list[Any]:
    """[id, first words, mean reward, its standard deviation, tags as bits, number of completions]."""
    pairs = list(zip(scored.completions, scored.rewards, strict=True))
    scores = [r.score for c, r in pairs if c.finish_reason != "abort"]
    known = [float(score) for score in scores if score is not None and abs(score) < 1e100]
    mean = math.fsum(known) / len(known) if known else None
    spread = math.sqrt(math.fsum((x - mean) ** 2 for x in known) / len(known)) if mean is not None else None
    has_signal = any(any(a) if isinstance(a, Sequence) else a for a in advantages or ())
    tags = (
        len({*scores} - {None}) < 2 and not has_signal,
        any(c.finish_reason == "length" for c in scored.completions),
        None in scores,
        any(_count(c, "malformed") or _count(c, "tool_errors") for c in scored.completions),
    )
    bits = sum(1 << i for i, is_set in enumerate(tags) if is_set)
    words = _readable(_words(scored.prompt)[:_WORDS], _WORDS)
    return [_readable(scored.prompt.id, 200), words, _rounded(mean), _rounded(spread), bits, len(pairs)]


def describe_group(scored: ScoredGroup, advantages: Sequence[Advantage] | None) -> dict[str, Any]:
    """The texts of a group, the best completion first (by advantage, else by score)."""
    pairs = list(zip(scored.completions, scored.rewards, strict=True))[:_MAX_COMPLETIONS]
    budget = min(MAX_TEXT, max(200, _GROUP_TEXT // max(1, len(pairs))))
    entries = [
        _entry(c, r, None if advantages is None else _mean(advantages[i], c), budget)
        for i, (c, r) in enumerate(pairs)
    ]
    order = "advantage" if advantages is not None else "score"
    entries.sort(key=lambda entry: -math.inf if entry[order] is None else entry[order], reverse=True)
    return {
        "prompt": _readable(scored.prompt.text, MAX_TEXT),
        "columns": {
            _readable(name, 60): _readable(
                value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), 400
            )
            for name, value in redact(_clipped(scored.prompt.columns)).items()
        },
        "completions": entries,
    }


def _entry(completion: Completion, reward: Reward, advantage: float | None, budget: int) -> dict[str, Any]:
    chosen = [*compress(completion.behavior_logprobs, completion.loss_mask)]
    return {
        "text": _readable(_conversation(completion.facts, reward) or completion.text, budget),
        "score": _rounded(reward.score),
        "advantage": _rounded(advantage),
        "parts": {
            _readable(name, 60): _rounded(part) for name, part in list(reward.parts.items())[:_MAX_ITEMS]
        },
        "reason": str(reward.reason),
        "detail": _readable(reward.detail, 300),
        "extracted": None if reward.extracted is None else _readable(reward.extracted, 200),
        "length": completion.num_sampled,
        "finish": completion.finish_reason,
        "logprobs": [round(value, 2) for value in _means(chosen, _MAX_BARS)],
    }


def _conversation(facts: Mapping[str, Any], reward: Reward) -> str:
    """What was said in an episode: turns with their rewards, and the answers of tools and users."""
    parts, turn = [], 0
    said = facts.get("said")
    for message in said if isinstance(said, list) else ():
        role, content = (
            (message.get("role"), message.get("content")) if isinstance(message, dict) else ("", "")
        )
        head = str(role)
        if role == "assistant":
            paid = reward.turns[turn] if turn < len(reward.turns) else None
            turn += 1
            head = f"turn {turn}" + ("" if paid is None else f", reward {paid:g}")
        parts.append(f"[{head}]\n{content}")
    ends = {"limit": "cut by its limit of", "fault": "failed:", "interrupted": "interrupted:"}
    parts += [f"[{how} {facts[name]}]" for name, how in ends.items() if parts and facts.get(name)]
    counts = facts.get("counts")
    for name, number in counts.items() if parts and isinstance(counts, dict) else ():
        tool = name.removeprefix("seconds/")
        parts.append(f"[{tool}: {number:.2f} s]" if tool != name else f"[{name}: {number:g}]")
    return "\n".join(parts)


def _count(completion: Completion, name: str) -> float:
    """What an environment counted in an episode; 0 if it did not, or the record is damaged."""
    counts = completion.facts.get("counts")
    found = counts.get(name, 0) if isinstance(counts, dict) else 0
    return found if isinstance(found, int | float) else 0


def _words(prompt: Prompt) -> str:
    """What was asked: the last message of a chat, without what its template puts around it."""
    said = prompt.messages[-1].get("content") if prompt.messages else None
    return " ".join((said if isinstance(said, str) else prompt.text)[: 4 * _WORDS].split())


def _mean(advantage: Advantage, completion: Completion) -> float:
    """Mean advantage of the tokens that the policy chose. They may have one each, and others then have 0."""
    if isinstance(advantage, Sequence):
        return sum(advantage) / max(completion.num_sampled, 1)
    return advantage


def _clipped(value: Any, depth: int = 4) -> Any:
    """The first items of lists and dicts, nested ones included: no more of a column is shown."""
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
    means = (math.fsum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size))
    return [max(-_LARGEST, min(_LARGEST, mean)) for mean in means]
