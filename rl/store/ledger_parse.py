"""A file of the ledger back into groups: all of it for a run that goes on, the first groups for a reader.

Every field is checked for its type, since the file may come from somebody else, and what is read of it is
bounded before it is decompressed: a kilobyte of gzip can hold a megabyte.
"""

from __future__ import annotations

import base64
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from rl.store.safe_read import bounded_lines, is_nested_beyond, is_number, open_regular
from rl.types import (
    Advantage,
    Completion,
    Continuation,
    Group,
    Origin,
    Prompt,
    Reason,
    Reward,
    ScoredGroup,
    Segment,
    VersionSpan,
)

SCHEMA = 2  # 1, which is read too, has neither segments, facts, continuations nor rewards per turn
MAX_RECORD_BYTES = 4 << 30  # of a record that is read whole, decompressed
MAX_GLANCE_BYTES = 16 << 20  # of a record of which some groups are shown
MAX_GROUP_BYTES = 16 << 20  # of a group that is shown: a million tokens
MAX_PARTS = 1_000_000  # lists and dicts of a group that is shown: the smallest takes 72 bytes and two in JSON
MAX_DEPTH = 32  # of a column
DAMAGE = (
    gzip.BadGzipFile,
    EOFError,
    zlib.error,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
)


@dataclass(frozen=True, slots=True)
class LedgerStep:
    """What one process consumed in one step.

    Attributes:
        cursor_before, cursor_after: the source's cursor around the step, as it was given.
        policy_version: of the weights the step began with; a completion's own versions are in its spans.
        groups: what was trained on.
        rejected: what the source sampled and threw away.
        advantages: per group of `groups`, one per completion; None if they were not recorded.
        counts: what the source counted while it sampled.
    """

    step: int
    rank: int
    world_size: int
    policy_version: int
    cursor_before: Any
    cursor_after: Any
    groups: list[ScoredGroup]
    rejected: list[ScoredGroup] = field(default_factory=list)
    advantages: list[list[Advantage]] | None = None
    counts: dict[str, float] = field(default_factory=dict)


def read_record(path: Path) -> tuple[LedgerStep, list[str]]:
    """The whole record, and no faults.

    Raises:
        one of DAMAGE: a part of it is missing, has another type or is too large.
    """
    with open_regular(path) as raw, gzip.GzipFile(fileobj=raw) as file:
        data = file.read(MAX_RECORD_BYTES + 1)
    if len(data) > MAX_RECORD_BYTES:
        raise ValueError(f"more than {MAX_RECORD_BYTES >> 30} GiB when decompressed")
    first, *lines = data.removesuffix(b"\n").split(b"\n")
    header = _header(first)
    if header["rows"] != len(lines):
        raise ValueError(f"{len(lines)} rows, the header says {header['rows']}")
    rows = [json.loads(line) for line in lines]
    _require(_is_list_of([row["kept"] for row in rows], bool), "kept")
    kept, rejected = ([_group(row) for row in rows if row["kept"] is wanted] for wanted in (True, False))
    advantages = [_advantages(row) for row in rows if row["kept"]] if header["has_advantages"] else None
    return _step(header, kept, rejected, advantages), []


def glance(path: Path, max_groups: int) -> tuple[LedgerStep, list[str]]:
    """The first groups that were trained on, without their expert routes, and what was left out of them.

    Raises:
        one of DAMAGE: not even the header can be read.
    """
    groups: list[ScoredGroup] = []
    advantages: list[list[Advantage]] = []
    bad: Counter[str] = Counter()
    room, faults = MAX_GLANCE_BYTES, []
    with open_regular(path) as raw, gzip.GzipFile(fileobj=raw) as file:
        lines = bounded_lines(file, MAX_GROUP_BYTES)
        header = _header(_bounded(next(lines, b"")))
        try:
            while len(groups) < max_groups and room > 0 and bad.total() < max_groups:
                if not (line := _bounded(next(lines, b""))):
                    break
                room -= len(line)
                try:
                    found = _shown_group(line, header["has_advantages"])
                except DAMAGE as error:
                    bad[f"{type(error).__name__}: {brief(error)}"] += 1
                    continue
                if found is None:
                    break
                groups.append(found[0])
                advantages.append(found[1])
        except DAMAGE as error:
            faults.append(f"damaged after {len(groups)} groups ({type(error).__name__}: {brief(error)})")
    faults += [f"{count} of its groups left out ({why})" for why, count in bad.most_common(3)]
    return _step(header, groups, [], advantages if header["has_advantages"] else None), faults


def brief(error: BaseException) -> str:
    return str(error)[:200]


def _bounded(line: bytes | None) -> bytes:
    if line is None:
        raise ValueError(f"a line of more than {MAX_GROUP_BYTES >> 20} MiB")
    return line


def _shown_group(line: bytes, has_advantages: bool) -> tuple[ScoredGroup, list[Advantage]] | None:
    """A group and its advantages; None for one that the source threw away, as are all that follow it."""
    if line.count(b"[") + line.count(b"{") > MAX_PARTS:
        raise ValueError(f"more than {MAX_PARTS:,} lists and objects")
    row = json.loads(line)
    _require(isinstance(row["kept"], bool), "kept")
    if not row["kept"]:
        return None
    for entry in row["completions"]:
        entry["routes"] = None
    group = _group(row)
    return group, _advantages(row) if has_advantages else []


def _header(line: bytes) -> dict[str, Any]:
    header = json.loads(line)
    if header["schema"] not in (1, SCHEMA):
        raise ValueError(f"schema {header['schema']!r}, this version of cohort reads 1 and {SCHEMA}")
    for name in ("step", "rank", "world_size", "policy_version", "rows"):
        _require(type(header[name]) is int, name)
    _require(isinstance(header["counts"], dict), "counts")
    return header


def _step(
    header: dict[str, Any],
    groups: list[ScoredGroup],
    rejected: list[ScoredGroup],
    advantages: list[list[Advantage]] | None,
) -> LedgerStep:
    return LedgerStep(
        step=header["step"],
        rank=header["rank"],
        world_size=header["world_size"],
        policy_version=header["policy_version"],
        cursor_before=header["cursor_before"],
        cursor_after=header["cursor_after"],
        groups=groups,
        rejected=rejected,
        advantages=advantages,
        counts=header["counts"],
    )


def _require(is_right: bool, name: str) -> None:
    if not is_right:
        raise ValueError(f"{name} has another type than it should")


def _is_list_of(value: Any, kind: type | Callable[[Any], bool]) -> bool:
    if not isinstance(value, list):
        return False
    return set(map(type, value)) <= {kind} if isinstance(kind, type) else all(map(kind, value))


def _advantages(row: dict[str, Any]) -> list[Advantage]:
    values = row["advantages"]
    is_advantage = lambda x: is_number(x) or _is_list_of(x, is_number)  # noqa: E731
    _require(_is_list_of(values, is_advantage) and len(values) == len(row["completions"]), "advantages")
    return values


def _group(row: dict[str, Any]) -> ScoredGroup:
    given, entries = row["prompt"], row["completions"]
    _require(isinstance(given["id"], str) and isinstance(given["text"], str), "prompt.id or prompt.text")
    _require(_is_list_of(given["token_ids"], int), "prompt.token_ids")
    _require(_is_list_of(given["messages"], dict), "prompt.messages")
    _require(isinstance(given["columns"], dict), "prompt.columns")
    if is_nested_beyond([given["messages"], given["columns"]], MAX_DEPTH):
        raise ValueError(f"prompt.columns or prompt.messages is nested more than {MAX_DEPTH} deep")
    prompt = Prompt(
        id=given["id"],
        text=given["text"],
        token_ids=tuple(given["token_ids"]),
        messages=tuple(given["messages"]),
        columns=given["columns"],
    )
    _require(_is_list_of(entries, dict), "completions")
    completions, rewards = [_completion(e) for e in entries], [_reward(e["reward"]) for e in entries]
    return ScoredGroup(Group(prompt, completions), rewards)


def _completion(entry: dict[str, Any]) -> Completion:
    ids, mask, routes = entry["token_ids"], entry["loss_mask"], entry["routes"]
    spans = entry["version_spans"]
    _require(_is_list_of(ids, int), "token_ids")
    _require(mask is True or isinstance(mask, str), "loss_mask")
    _require(entry["finish_reason"] in ("stop", "length", "abort"), "finish_reason")
    _require(_is_list_of(spans, lambda span: _is_list_of(span, int) and len(span) == 2), "version_spans")
    _require(isinstance(entry["text"], str), "text")
    return Completion(
        token_ids=ids,
        behavior_logprobs=_logprobs(entry["behavior_logprobs"]),
        loss_mask=[True] * len(ids) if mask is True else [flag == "1" for flag in mask],
        finish_reason=entry["finish_reason"],
        version_spans=[VersionSpan(version, count) for version, count in spans],
        text=entry["text"],
        routes=_unpack(routes, "iub").reshape(routes["shape"]) if isinstance(routes, dict) else routes,
        segments=[Segment(*pair) for pair in _segments(entry.get("segments", []), len(ids))],
        facts=_facts(entry),
        continuations=[_continuation(given) for given in entry.get("continuations", [])],
    )


def _segments(given: Any, num_tokens: int) -> list[Any]:
    origins = get_args(Origin)
    is_segment = lambda pair: isinstance(pair, list) and len(pair) == 2 and pair[0] in origins  # noqa: E731
    _require(_is_list_of(given, is_segment) and _is_list_of([n for _, n in given], int), "segments")
    _require(not given or sum(n for _, n in given) == num_tokens, "segments")
    return given


def _facts(entry: dict[str, Any]) -> dict[str, Any]:
    """What is known of a completion; before there were facts, its trace stood beside the other fields."""
    facts = entry.get("facts", {})
    _require(isinstance(facts, dict), "facts")
    facts = facts | ({"trace": entry["trace"]} if "trace" in entry else {})
    if is_nested_beyond(facts, MAX_DEPTH):
        raise ValueError(f"facts are nested more than {MAX_DEPTH} deep")
    return facts


def _continuation(given: dict[str, Any]) -> Continuation:
    _require(_is_list_of(given["prompt_token_ids"], int), "prompt_token_ids")
    return Continuation(tuple(given["prompt_token_ids"]), _completion(given))


def _logprobs(packed: dict[str, Any]) -> list[float]:
    values = _unpack(packed, "f").astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("behavior_logprobs are not finite")
    return values.tolist()


def _unpack(packed: dict[str, Any], kinds: str) -> np.ndarray:
    dtype = np.dtype(packed["dtype"])
    _require(dtype.kind in kinds, "dtype")
    return np.frombuffer(base64.b64decode(packed["base64"], validate=True), dtype=dtype)


def _reward(given: dict[str, Any]) -> Reward:
    turns = tuple(given.get("turns", ()))
    reward = Reward(**{**given, "reason": Reason(given["reason"]), "turns": turns})
    numbers = [reward.score, *reward.parts.values(), *turns]
    _require(all(number is None or _is_finite(number) for number in numbers), "reward.score or reward.parts")
    _require(isinstance(reward.detail, str) and isinstance(reward.extracted, str | None), "reward.detail")
    _require(_is_finite(reward.elapsed_ms), "reward.elapsed_ms")
    return reward


def _is_finite(number: Any) -> bool:
    return is_number(number) or isinstance(number, bool)
