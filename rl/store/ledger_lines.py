"""Groups as the lines of JSON that the ledger keeps, and back: exact, or refused.

A line is UTF-8; a lone surrogate is written as its three bytes, so that any Python string comes back.
Behavior log-probs are base64 of little-endian float32, or float64 where one is not a float32: exact, at half
the time and size of decimals. Every field is checked for its type, since a file may come from somebody else.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import numpy as np

from rl.store.safe_read import is_nested_beyond, is_number
from rl.types import (
    Advantage,
    Completion,
    Continuation,
    FinishReason,
    Group,
    Origin,
    Prompt,
    Reason,
    Reward,
    ScoredGroup,
    Segment,
    VersionSpan,
)

MAX_DEPTH = 32  # of a column


def is_score(value: Any) -> bool:
    return value is None or is_number(value) or isinstance(value, bool)


# The fields of a record in the order of the file, and what each must be: see `fits`.
PROMPT = {
    **{"id": str, "text": str, "token_ids": [int], "messages": [dict], "columns": dict},
    "teacher_token_ids": [int],
}
COMPLETION = {
    "token_ids": [int],
    "behavior_logprobs": dict,
    "loss_mask": lambda value: value is True or isinstance(value, str),
    "finish_reason": get_args(FinishReason).__contains__,
    "version_spans": [(int, int)],
    "text": str,
    "routes": lambda value: True,
    "segments": [(get_args(Origin).__contains__, int)],
    "facts": dict,
    "continuations": [dict],
}
REWARD = {
    "score": is_score,
    "reason": str,
    "detail": str,
    "extracted": lambda value: value is None or isinstance(value, str),
    "elapsed_ms": lambda value: value is not None and is_score(value),
    "parts": lambda value: fits([*value.values()], [is_score]),
    "turns": [is_score],
}
# Left out where they are empty, as in nearly all completions; schema 1 has none of them.
OPTIONAL = {"segments": [], "facts": {}, "continuations": [], "turns": [], "teacher_token_ids": []}


def fits(value: Any, kind: Any) -> bool:
    """Whether a value of a file has the expected form.

    Args:
        kind: a type; a function that decides; [kind] for a list of any length; (kind, kind) for one of two.
    """
    if isinstance(kind, type):
        return type(value) is kind
    if callable(kind):
        return bool(kind(value))
    if not isinstance(value, list):
        return False
    if isinstance(kind, tuple):
        return len(value) == len(kind) and all(map(fits, value, kind))
    (each,) = kind
    return set(map(type, value)) <= {each} if isinstance(each, type) else all(fits(v, each) for v in value)


def checked(given: dict[str, Any], table: dict[str, Any], where: str = "") -> dict[str, Any]:
    """The fields of a record that the table names.

    Raises:
        KeyError: one is missing.
        ValueError: one has another type.
    """
    fields = {name: given.get(name, OPTIONAL[name]) if name in OPTIONAL else given[name] for name in table}
    for name, kind in table.items():
        require(fits(fields[name], kind), where + name)
    return fields


def require(is_right: bool, name: str) -> None:
    if not is_right:
        raise ValueError(f"{name} has another type than it should")


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
    assert len(rewards) == len(completions), f"{where}: {len(rewards)} rewards"
    for advantage in extra["advantages"] or ():
        for number in advantage if isinstance(advantage, Sequence) else [advantage]:
            _require_finite(number, f"{where}: advantages")
    messages = [dict(message) for message in prompt.messages]
    row = {
        **extra,
        "prompt": _row(prompt, PROMPT, messages=messages, columns=dict(prompt.columns)),
        "completions": [
            _completion_row(completion, reward, f"{where}, completion {i}")
            for i, (completion, reward) in enumerate(zip(completions, rewards, strict=True))
        ],
    }
    return encode_line(row, where)


def _row(record: Any, names: Iterable[str], **in_other_form: Any) -> dict[str, Any]:
    row = {name: getattr(record, name) for name in names} | in_other_form
    return {name: value for name, value in row.items() if value or name not in OPTIONAL}


def _completion_row(completion: Completion, reward: Reward, where: str) -> dict[str, Any]:
    for name, number in (("score", reward.score), *reward.parts.items(), *enumerate(reward.turns)):
        _require_finite(number, f"{where}: reward {name}")
    # Masks are all true except where a tool answered; a string of 0 and 1 packs well in that case.
    chosen = all(completion.loss_mask) and len(completion.loss_mask) == len(completion.token_ids)
    return _row(
        completion,
        COMPLETION,
        behavior_logprobs=_pack_floats(completion.behavior_logprobs, where),
        loss_mask=chosen or "".join("01"[bool(flag)] for flag in completion.loss_mask),
        version_spans=[[span.policy_version, span.num_tokens] for span in completion.version_spans],
        routes=_pack_routes(completion.routes),
        segments=[[segment.origin, segment.num_tokens] for segment in completion.segments],
        facts=dict(completion.facts),
        continuations=[
            {
                "prompt_token_ids": further.prompt_token_ids,
                **_completion_row(further.completion, Reward(0.0), f"{where}, continuation {i}"),
            }
            for i, further in enumerate(completion.continuations)
        ],
        reward=_row(reward, REWARD, reason=str(reward.reason), parts=dict(reward.parts)),
    )


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
    return _pack(single if (single == exact).all() else exact)


def _pack_routes(routes: Any) -> Any:
    if routes is None or isinstance(routes, list):
        return routes
    array = np.asarray(routes)
    return {**_pack(array), "shape": array.shape}


def _pack(array: np.ndarray) -> dict[str, str]:
    dtype = array.dtype.newbyteorder("<")
    return {"dtype": dtype.str, "base64": base64.b64encode(array.astype(dtype).tobytes()).decode()}


def decode_group(row: dict[str, Any], *, with_routes: bool = True) -> ScoredGroup:
    """Raises one of `rl.store.ledger.DAMAGE` where a part is missing or has another type."""
    fields, entries = checked(row["prompt"], PROMPT, "prompt."), row["completions"]
    if is_nested_beyond([fields["messages"], fields["columns"]], MAX_DEPTH):
        raise ValueError(f"prompt.columns or prompt.messages is nested more than {MAX_DEPTH} deep")
    fields |= {name: tuple(fields[name]) for name in ("token_ids", "messages", "teacher_token_ids")}
    require(fits(entries, [dict]), "completions")
    completions = [_completion(entry if with_routes else {**entry, "routes": None}) for entry in entries]
    return ScoredGroup(Group(Prompt(**fields), completions), [_reward(entry["reward"]) for entry in entries])


def decode_advantages(row: dict[str, Any]) -> list[Advantage]:
    values = row["advantages"]
    is_right = fits(values, [lambda value: is_number(value) or fits(value, [is_number])])
    require(is_right and len(values) == len(row["completions"]), "advantages")
    return values


def _completion(entry: dict[str, Any]) -> Completion:
    fields = checked(entry, COMPLETION)
    ids, mask, routes = fields["token_ids"], fields["loss_mask"], fields["routes"]
    logprobs = _unpack(fields["behavior_logprobs"], "f")
    if not np.isfinite(logprobs).all():
        raise ValueError("behavior_logprobs are not finite")
    segments = [Segment(*pair) for pair in fields["segments"]]
    require(not segments or sum(segment.num_tokens for segment in segments) == len(ids), "segments")
    # Before there were facts, the trace of a completion stood beside its other fields.
    facts = fields["facts"] | ({"trace": entry["trace"]} if "trace" in entry else {})
    if is_nested_beyond(facts, MAX_DEPTH):
        raise ValueError(f"facts are nested more than {MAX_DEPTH} deep")
    fields |= {
        "behavior_logprobs": logprobs.astype(np.float64).tolist(),
        "loss_mask": [True] * len(ids) if mask is True else [flag == "1" for flag in mask],
        "version_spans": [VersionSpan(*pair) for pair in fields["version_spans"]],
        "routes": _unpack(routes, "iub").reshape(routes["shape"]) if isinstance(routes, dict) else routes,
        "segments": segments,
        "facts": facts,
        "continuations": [_continuation(given) for given in fields["continuations"]],
    }
    return Completion(**fields)


def _continuation(given: dict[str, Any]) -> Continuation:
    fields = checked(given, {"prompt_token_ids": [int]})
    return Continuation(tuple(fields["prompt_token_ids"]), _completion(given))


def _unpack(packed: dict[str, Any], kinds: str) -> np.ndarray:
    dtype = np.dtype(packed["dtype"])
    require(dtype.kind in kinds, "dtype")
    return np.frombuffer(base64.b64decode(packed["base64"], validate=True), dtype=dtype)


def _reward(given: dict[str, Any]) -> Reward:
    fields = given | checked(given, REWARD, "reward.")
    return Reward(**{**fields, "reason": Reason(fields["reason"]), "turns": tuple(fields["turns"])})
