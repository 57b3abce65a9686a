"""Reads a grader process's answer to one call, without trust: the process may have met hostile text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rewards.pool.calling import MAX_SCORE
from rl.types import Reason, Reward

Fault = tuple[str, str]


@dataclass(frozen=True)
class Answer:
    """The outcome of one call: per completion a reward, and the grader's fault if it had one.

    Attributes:
        fault: what ended the whole call, so that no completion has a result; None: the call returned.
    """

    items: list[tuple[Reward, Fault | None]]
    fault: Fault | None = None


def failed_call(kind: str, detail: str, num_completions: int) -> Answer:
    """The answer of a failed call: each of its completions has the fault."""
    return Answer([_failed(kind, detail)] * num_completions, (kind, detail))


def explained(answer: Answer, num_completions: int) -> Answer:
    """The answer of a call whose completions pass one by one; if it failed, its fault names the remedy."""
    if answer.fault is None or num_completions == 1:
        return answer
    kind, detail = answer.fault
    remedy = f"each of these {num_completions} completions passes alone; a function that does not compare"
    return failed_call(
        kind, f"{detail}; {remedy} completions may have the option per_completion: true", num_completions
    )


def read_answer(answer: Mapping[str, Any], num_completions: int) -> Answer:
    """A grader's answer as rewards, after checking each field again."""
    items = answer.get("items")
    if "fault" in answer or not isinstance(items, list) or len(items) != num_completions:
        kind, detail = str(answer.get("fault", "crash")), str(answer.get("detail", "an answer without items"))
        return failed_call(kind, detail, num_completions)
    return Answer([_read_item(item) for item in items])


def _failed(kind: str, detail: str) -> tuple[Reward, Fault | None]:
    return Reward(None, Reason.INFRA_ERROR, f"{kind}: {detail}"), (kind, detail)


def _read_item(item: Any) -> tuple[Reward, Fault | None]:
    try:
        if "fault" in item:
            return _failed("bad_value", str(item["detail"]))
        score = None if item["score"] is None else float(item["score"])
        if score is not None and not abs(score) <= MAX_SCORE:
            return _failed("bad_value", f"score {score}")
        extracted = None if item["extracted"] is None else str(item["extracted"])
        turns = tuple(None if turn is None else float(turn) for turn in item.get("turns", ()))
        if not all(turn is None or abs(turn) <= MAX_SCORE for turn in turns):
            return _failed("bad_value", f"turns {turns!r:.60}")
        reason, elapsed_ms = Reason(item["reason"]), float(item["elapsed_ms"])
        reward = Reward(score, reason, str(item["detail"]), extracted, elapsed_ms, turns=turns)
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        return _failed("bad_value", f"a malformed answer: {type(error).__name__}: {error}")
    if reward.score is None and reward.reason is Reason.INFRA_ERROR:
        return reward, ("infra_error", reward.detail)
    return reward, None
