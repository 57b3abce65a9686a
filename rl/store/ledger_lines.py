"""Groups as the lines of JSON that the ledger keeps: exact, or refused. `ledger_parse` reads them."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rl.types import Completion, Reward, ScoredGroup


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
    for advantage in extra["advantages"] or ():
        for number in advantage if isinstance(advantage, Sequence) else [advantage]:
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
    for name, number in (("score", reward.score), *reward.parts.items(), *enumerate(reward.turns)):
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
        **_of_episodes(completion, where),
        "reward": {
            "score": reward.score,
            "reason": str(reward.reason),
            "detail": reward.detail,
            "extracted": reward.extracted,
            "elapsed_ms": reward.elapsed_ms,
            "parts": dict(reward.parts),
            **({"turns": reward.turns} if reward.turns else {}),
        },
    }


def _of_episodes(completion: Completion, where: str) -> dict[str, Any]:
    """Fields that are left out where they are empty, as they are in nearly all completions."""
    fields: dict[str, Any] = {}
    if completion.segments:
        fields["segments"] = [[segment.origin, segment.num_tokens] for segment in completion.segments]
    if completion.facts:
        fields["facts"] = dict(completion.facts)
    if completion.continuations:
        fields["continuations"] = [
            {
                "prompt_token_ids": further.prompt_token_ids,
                **_completion_row(further.completion, Reward(0.0), f"{where}, continuation {i}"),
            }
            for i, further in enumerate(completion.continuations)
        ]
    return fields


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
