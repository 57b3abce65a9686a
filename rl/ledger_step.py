"""A step of the ledger as lines of JSON and back, bit for bit."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from rl.types import Completion, Group, Prompt, Reason, Reward, ScoredGroup, Trace, VersionSpan

SCHEMA = 1


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
    advantages: list[list[float]] | None = None
    counts: dict[str, float] = field(default_factory=dict)


def encode_line(value: Any, where: str) -> bytes:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"ledger, {where}: {error}; prompts, columns and cursors hold JSON values only: finite numbers, "
            "strings, lists, dicts, None (convert arrays with .tolist(), dates with .isoformat())"
        ) from None
    return text.encode("utf-8", "surrogatepass") + b"\n"


def encode_group(scored: ScoredGroup, step: int, extra: dict[str, Any]) -> bytes:
    prompt, completions, rewards = scored.prompt, scored.completions, scored.rewards
    where = f"step {step}, prompt {prompt.id!r}"
    if len(rewards) != len(completions):
        raise ValueError(f"ledger, {where}: {len(rewards)} rewards for {len(completions)} completions")
    for number in extra["advantages"] or ():
        _require_finite(number, f"{where}: advantages")
    row = {
        **extra,
        "prompt": {
            "id": prompt.id,
            "text": prompt.text,
            "token_ids": prompt.token_ids,
            "messages": [dict(message) for message in prompt.messages],
            "columns": dict(prompt.columns),
        },
        "completions": [
            _completion_row(completion, reward, f"{where}, completion {i}")
            for i, (completion, reward) in enumerate(zip(completions, rewards, strict=True))
        ],
    }
    return encode_line(row, where)


def _completion_row(completion: Completion, reward: Reward, where: str) -> dict[str, Any]:
    for name, number in (("score", reward.score), *reward.parts.items()):
        _require_finite(number, f"{where}: reward {name}")
    # Masks are all true but where a tool answered; a string of 0 and 1 packs well in that case.
    chosen = all(completion.loss_mask) and len(completion.loss_mask) == len(completion.token_ids)
    return {
        "token_ids": completion.token_ids,
        "behavior_logprobs": _pack_floats(completion.behavior_logprobs, where),
        "loss_mask": chosen or "".join("01"[bool(flag)] for flag in completion.loss_mask),
        "finish_reason": completion.finish_reason,
        "version_spans": [[span.policy_version, span.num_tokens] for span in completion.version_spans],
        "text": completion.text,
        "routes": _pack_routes(completion.routes),
        **({} if completion.trace is None else {"trace": asdict(completion.trace)}),
        "reward": {
            "score": reward.score,
            "reason": str(reward.reason),
            "detail": reward.detail,
            "extracted": reward.extracted,
            "elapsed_ms": reward.elapsed_ms,
            "parts": dict(reward.parts),
        },
    }


def _require_finite(number: float | None, where: str) -> None:
    if number is not None and not math.isfinite(number):
        raise ValueError(
            f"ledger, {where} is {number}; graders and advantages give finite numbers or abstain"
        )


def _pack_floats(values: Sequence[float], where: str) -> dict[str, str]:
    exact = np.asarray(values, dtype="<f8")
    if not np.isfinite(exact).all():
        at = int(np.flatnonzero(~np.isfinite(exact))[0])
        raise ValueError(
            f"ledger, {where}: behavior_logprobs[{at}] is {values[at]}; a sampled token has a finite one, "
            "so the engine's weights or its sampling parameters are broken"
        )
    with np.errstate(over="ignore"):
        single = exact.astype("<f4")
    dtype, array = ("<f4", single) if (single == exact).all() else ("<f8", exact)
    return {"dtype": dtype, "base64": base64.b64encode(array.tobytes()).decode()}


def _pack_routes(routes: Any) -> Any:
    if routes is None or isinstance(routes, list):
        return routes
    array = np.ascontiguousarray(routes)
    return {
        "dtype": array.dtype.newbyteorder("<").str,
        "shape": array.shape,
        "base64": base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode(),
    }


def _unpack(packed: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed["base64"], validate=True), dtype=packed["dtype"])


def parse_step(header: dict[str, Any], rows: list[dict[str, Any]]) -> LedgerStep:
    """The record; a damaged one raises ValueError, KeyError, TypeError or AttributeError."""
    if header["schema"] != SCHEMA:
        raise ValueError(f"schema {header['schema']!r}, this version of cohort reads {SCHEMA}")
    if header["rows"] != len(rows):
        raise ValueError(f"{len(rows)} rows, the header says {header['rows']}")
    return LedgerStep(
        step=header["step"],
        rank=header["rank"],
        world_size=header["world_size"],
        policy_version=header["policy_version"],
        cursor_before=header["cursor_before"],
        cursor_after=header["cursor_after"],
        groups=[_parse_group(row) for row in rows if row["kept"]],
        rejected=[_parse_group(row) for row in rows if not row["kept"]],
        advantages=[row["advantages"] for row in rows if row["kept"]] if header["has_advantages"] else None,
        counts=header["counts"],
    )


def _parse_group(row: dict[str, Any]) -> ScoredGroup:
    prompt = Prompt(
        id=row["prompt"]["id"],
        text=row["prompt"]["text"],
        token_ids=tuple(row["prompt"]["token_ids"]),
        messages=tuple(row["prompt"]["messages"]),
        columns=row["prompt"]["columns"],
    )
    completions = [_parse_completion(entry) for entry in row["completions"]]
    rewards = [Reward(**{**e["reward"], "reason": Reason(e["reward"]["reason"])}) for e in row["completions"]]
    return ScoredGroup(Group(prompt, completions), rewards)


def _parse_completion(entry: dict[str, Any]) -> Completion:
    mask, routes = entry["loss_mask"], entry["routes"]
    return Completion(
        token_ids=entry["token_ids"],
        behavior_logprobs=_unpack(entry["behavior_logprobs"]).astype(np.float64).tolist(),
        loss_mask=[True] * len(entry["token_ids"]) if mask is True else [flag == "1" for flag in mask],
        finish_reason=entry["finish_reason"],
        version_spans=[VersionSpan(version, count) for version, count in entry["version_spans"]],
        text=entry["text"],
        routes=_unpack(routes).reshape(routes["shape"]) if isinstance(routes, dict) else routes,
        trace=Trace(**entry["trace"]) if "trace" in entry else None,
    )
