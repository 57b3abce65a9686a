"""One group on its way through the graders. Rewards come back in any order."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rewards.answers import Answer, Fault, explained, failed_call, read_answer
from rewards.compose import RewardSpec, compose
from rewards.plugins import RewardFunction
from rewards.pool.graders import Graders
from rl.types import Completion, Group, Prompt, Reason, Reward, ScoredGroup

ABORTED = Reward(None, Reason.INFRA_ERROR, "the engine aborted this completion; it was not graded")


@dataclass(frozen=True)
class Grading:
    """The rewards of a pool and the processes that run them, shared by all groups."""

    specs: Sequence[RewardSpec]
    asks: Sequence[RewardFunction]
    graders: Graders
    deadline_s: float
    count: Callable[[Prompt, Mapping[str, Fault]], None]


class Ticket:
    """A group being graded; `start` it once."""

    def __init__(self, grading: Grading, group: Group) -> None:
        self._grading, self._group = grading, group
        self._columns = [
            {k: v for k, v in asks.pick(group.prompt.columns).items() if is_json(v)} for asks in grading.asks
        ]
        self._live = [i for i, c in enumerate(group.completions) if c.finish_reason != "abort"]
        self._parts: list[dict[str, Reward]] = [
            {asks.name: _ungraded(c) for asks in grading.asks} if c.finish_reason == "abort" else {}
            for c in group.completions
        ]
        self._faults: list[dict[str, Fault]] = [{} for _ in group.completions]
        self._missing = len(self._live) * len(grading.asks)
        self._lock = threading.Lock()
        self._future: Future[ScoredGroup] = Future()

    def start(self) -> Future[ScoredGroup]:
        """Calls every reward; the future ends when all have answered. Aborted completions are not graded."""
        if not self._live:
            self._file("", [], Answer([]))
        for number, asks in enumerate(self._grading.asks):
            if asks.groupwise and self._live:
                self._call(number, self._live, partial(self._take_group, number, self._live))
            for index in () if asks.groupwise else self._live:
                self._call(number, [index], partial(self._file, asks.name, [index]))
        return self._future

    def _take_group(self, number: int, indices: list[int], answer: Answer) -> None:
        """Records the answer of a group call. If it failed, each completion is graded alone to find those at
        fault. One more group call without them scores the others.

        Scores from calls alone would be wrong for a function that compares completions.
        """
        name, alone = self._grading.asks[number].name, {}
        if answer.fault is None or len(indices) == 1:
            return self._file(name, indices, answer)

        def take_one(index: int, found: Answer) -> None:
            with self._lock:
                alone[index] = found
                if len(alone) < len(indices):
                    return
            rest = [i for i in indices if alone[i].fault is None]
            if rest:
                self._call(number, rest, lambda again: self._file(name, rest, explained(again, len(rest))))
            for i in indices:
                if i not in rest:
                    self._file(name, [i], alone[i])

        for index in indices:
            self._call(number, [index], partial(take_one, index))

    def _call(self, number: int, indices: list[int], then: Callable[[Answer], None]) -> None:
        """Calls a reward with these completions; `then` gets the answer, in another thread."""
        asks, completions = self._grading.asks[number], [self._group.completions[i] for i in indices]
        prompt, chat = self._group.prompt, bool(self._group.prompt.messages)
        message: dict[str, Any] = {
            "reward": number,
            "prompt": None,
            "completions": [
                [{"role": "assistant", "content": c.text}] if chat else c.text for c in completions
            ],
            "completion_ids": None,
            "completion_facts": None,
            "columns": self._columns[number],
            "step": max((span.policy_version for c in completions for span in c.version_spans), default=0),
            "deadline_s": max(self._grading.deadline_s, asks.time_limit_s) * len(indices),
        }
        if "prompts" in asks.given:
            message["prompt"] = [dict(m) for m in prompt.messages] if chat else prompt.text
        if "completion_ids" in asks.given:
            message["completion_ids"] = [c.token_ids for c in completions]
        if "completion_facts" in asks.given:
            message["completion_facts"] = [dict(c.facts) for c in completions]
        try:
            deadline_s, submit = message["deadline_s"], self._grading.graders.submit
            answer = submit(message, deadline_s=deadline_s, is_async=asks.is_async)
        except (TypeError, ValueError) as error:
            return then(failed_call("bad_value", f"cannot be sent to a grader: {error}", len(indices)))
        answer.add_done_callback(lambda a: then(read_answer(a.result(), len(indices))))

    def _file(self, name: str, indices: Sequence[int], answer: Answer) -> None:
        """Records the answer of one call; whoever records the last one composes the rewards."""
        with self._lock:
            for index, (reward, fault) in zip(indices, answer.items, strict=True):
                self._parts[index][name] = reward
                self._missing -= 1
                if fault:
                    self._faults[index][name] = fault
            if self._missing or not self._future.set_running_or_notify_cancel():
                return
        try:
            rewards = [compose(self._grading.specs, parts) for parts in self._parts]
            for index in self._live:
                self._grading.count(self._group.prompt, self._faults[index])
            self._future.set_result(ScoredGroup(self._group, rewards))
        except Exception as error:  # a bug, which the waiting caller must see
            self._future.set_exception(error)


def _ungraded(aborted: Completion) -> Reward:
    """The verdict on a completion that its environment failed, or else the engine aborted."""
    fault = aborted.facts.get("fault")
    return replace(ABORTED, detail=f"the environment failed: {fault}") if fault else ABORTED


_encode = json.JSONEncoder(allow_nan=False).encode


def is_json(value: Any) -> bool:
    if isinstance(value, str):
        return True
    try:
        _encode(value)
    except (TypeError, ValueError):
        return False
    return True
