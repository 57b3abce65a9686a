"""One group on its way through the graders: completions go in one by one, rewards come back in any order."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from rewards.calling import MAX_SCORE
from rewards.compose import RewardSpec, compose
from rewards.graders import Graders
from rewards.plugins import GIVEN
from rl.types import Completion, Group, Prompt, Reason, Reward, ScoredGroup

Fault = tuple[str, str]
ABORTED = Reward(None, Reason.INFRA_ERROR, "the engine aborted this completion; it was not graded")


@dataclass(frozen=True)
class Asks:
    """What the graders found in the signature of one reward; see `rewards.plugins.RewardFunction`."""

    name: str
    required: Sequence[str]
    optional: Sequence[str]
    takes_any: bool
    is_async: bool
    groupwise: bool
    given: Collection[str]
    options: Collection[str]
    needs_ids: bool
    time_limit_s: float

    def pick(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """The columns that the reward takes."""
        named = {*self.required, *self.optional}
        barred = {*self.options, *GIVEN}
        return {k: v for k, v in columns.items() if (self.takes_any or k in named) and k not in barred}


@dataclass(frozen=True)
class Grading:
    """What all groups of a pool share: the rewards and the processes that run them."""

    specs: Sequence[RewardSpec]
    asks: Sequence[Asks]
    graders: Graders
    deadline_s: float
    count: Callable[[Prompt, Mapping[str, Fault]], None]


class Ticket:
    """A group on its way: `add` each completion when it is there, then `finish`."""

    def __init__(self, grading: Grading, prompt: Prompt) -> None:
        self._grading, self._prompt = grading, prompt
        self._columns = [
            {k: v for k, v in asks.pick(prompt.columns).items() if is_json(v)} for asks in grading.asks
        ]
        self._completions: list[Completion] = []
        self._parts: list[dict[str, Reward]] = []
        self._faults: list[dict[str, Fault]] = []
        self._missing = 0
        self._lock = threading.Lock()
        self._group: Group | None = None
        self._future: Future[ScoredGroup] = Future()

    def add(self, completion: Completion) -> None:
        """Starts every reward that looks at one completion at a time; an aborted completion is not graded."""
        aborted = completion.finish_reason == "abort"
        with self._lock:
            index = len(self._completions)
            self._completions.append(completion)
            self._parts.append({asks.name: ABORTED for asks in self._grading.asks} if aborted else {})
            self._faults.append({})
            self._missing += 0 if aborted else len(self._grading.asks)
        for number, asks in enumerate(self._grading.asks):
            if not aborted and not asks.groupwise:
                self._call(number, [index])

    def finish(self, group: Group | None = None) -> Future[ScoredGroup]:
        """Starts the group-wise rewards; the future ends when all have answered.

        The scored group is the given one, or the prompt with what was added, in that order.
        """
        live = [i for i, c in enumerate(self._completions) if c.finish_reason != "abort"]
        for number, asks in enumerate(self._grading.asks):
            if asks.groupwise and live:
                self._call(number, live)
        with self._lock:
            self._group = group or Group(self._prompt, list(self._completions))
        self._file("", [], [])
        return self._future

    def _call(self, number: int, indices: list[int]) -> None:
        asks, completions = self._grading.asks[number], [self._completions[i] for i in indices]
        chat = bool(self._prompt.messages)
        message: dict[str, Any] = {
            "reward": number,
            "prompt": None,
            "completions": [
                [{"role": "assistant", "content": c.text}] if chat else c.text for c in completions
            ],
            "completion_ids": None,
            "columns": self._columns[number],
            "deadline_s": max(self._grading.deadline_s, asks.time_limit_s) * len(indices),
        }
        if "prompts" in asks.given:
            message["prompt"] = [dict(m) for m in self._prompt.messages] if chat else self._prompt.text
        if "completion_ids" in asks.given:
            message["completion_ids"] = [c.token_ids for c in completions]
        try:
            answer = self._grading.graders.submit(
                message, deadline_s=message["deadline_s"], is_async=asks.is_async
            )
        except (TypeError, ValueError) as error:
            failed = _failed("bad_value", f"cannot be sent to a grader: {error}")
            self._file(asks.name, indices, [failed] * len(indices))
            return
        answer.add_done_callback(lambda a: self._file(asks.name, indices, _read(a.result(), len(indices))))

    def _file(
        self, name: str, indices: Sequence[int], answers: Sequence[tuple[Reward, Fault | None]]
    ) -> None:
        """Files the answers of one call; when none is missing, composes the group."""
        with self._lock:
            for index, (reward, fault) in zip(indices, answers, strict=True):
                self._parts[index][name] = reward
                self._missing -= 1
                if fault:
                    self._faults[index][name] = fault
            if self._group is None or self._missing or not self._future.set_running_or_notify_cancel():
                return
        try:
            rewards = [compose(self._grading.specs, parts) for parts in self._parts]
            for completion, faults in zip(self._completions, self._faults, strict=True):
                if completion.finish_reason != "abort":
                    self._grading.count(self._prompt, faults)
            self._future.set_result(ScoredGroup(self._group, rewards))
        except Exception as error:  # a bug; whoever waits must see it
            self._future.set_exception(error)


_encode = json.JSONEncoder(allow_nan=False).encode


def is_json(value: Any) -> bool:
    if isinstance(value, str):
        return True
    try:
        _encode(value)
    except (TypeError, ValueError):
        return False
    return True


def _failed(kind: str, detail: str) -> tuple[Reward, Fault]:
    return Reward(None, Reason.INFRA_ERROR, f"{kind}: {detail}"), (kind, detail)


def _read(answer: Mapping[str, Any], num_completions: int) -> list[tuple[Reward, Fault | None]]:
    """A grader's answer as rewards, checked again: a grader that ran hostile text may say anything."""
    items = answer.get("items")
    if "fault" in answer or not isinstance(items, list) or len(items) != num_completions:
        kind, detail = str(answer.get("fault", "crash")), str(answer.get("detail", "an answer without items"))
        return [_failed(kind, detail)] * num_completions
    return [_read_item(item) for item in items]


def _read_item(item: Any) -> tuple[Reward, Fault | None]:
    try:
        if "fault" in item:
            return _failed("bad_value", str(item["detail"]))
        score = None if item["score"] is None else float(item["score"])
        if score is not None and not abs(score) <= MAX_SCORE:
            return _failed("bad_value", f"score {score}")
        extracted = None if item["extracted"] is None else str(item["extracted"])
        reward = Reward(
            score, Reason(item["reason"]), str(item["detail"]), extracted, float(item["elapsed_ms"])
        )
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        return _failed("bad_value", f"an answer that is none: {type(error).__name__}: {error}")
    if reward.score is None and reward.reason is Reason.INFRA_ERROR:
        return reward, ("infra_error", reward.detail)
    return reward, None
