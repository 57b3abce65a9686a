"""One group on its way through the graders. Completions go in one by one; rewards come back in any order."""

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
    """A group being graded: `add` each completion as it arrives, then `finish`."""

    def __init__(self, grading: Grading, prompt: Prompt) -> None:
        self._grading, self._prompt = grading, prompt
        self._columns = [
            {k: v for k, v in asks.pick(prompt.columns).items() if is_json(v)} for asks in grading.asks
        ]
        self._completions: list[Completion] = []
        self._parts: list[dict[str, Reward]] = []
        self._faults: list[dict[str, Fault]] = []
        self._missing = 1  # answers to come, and the call of `finish`
        self._lock = threading.Lock()
        self._group: Group | None = None
        self._future: Future[ScoredGroup] = Future()

    def add(self, completion: Completion) -> None:
        """Starts every reward that grades single completions; an aborted completion is not graded."""
        aborted = completion.finish_reason == "abort"
        with self._lock:
            index = len(self._completions)
            self._completions.append(completion)
            fault = completion.facts.get(
                "fault"
            )  # a fault of its environment; otherwise the engine aborted it
            verdict = replace(ABORTED, detail=f"the environment failed: {fault}") if fault else ABORTED
            self._parts.append({asks.name: verdict for asks in self._grading.asks} if aborted else {})
            self._faults.append({})
            self._missing += 0 if aborted else len(self._grading.asks)
        for number, asks in enumerate(self._grading.asks):
            if not aborted and not asks.groupwise:
                self._call(number, [index], partial(self._file, asks.name, [index]))

    def finish(self, group: Group | None = None) -> Future[ScoredGroup]:
        """Starts the rewards that get a whole group; the future ends when all have answered.

        The scored group is `group`, or else the prompt with the added completions in their order.
        """
        live = [i for i, c in enumerate(self._completions) if c.finish_reason != "abort"]
        for number, asks in enumerate(self._grading.asks):
            if asks.groupwise and live:
                self._call(number, live, partial(self._take_group, number, live))
        self._file("", [], Answer([]), group=group or Group(self._prompt, list(self._completions)))
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
        asks, completions = self._grading.asks[number], [self._completions[i] for i in indices]
        chat = bool(self._prompt.messages)
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
            message["prompt"] = [dict(m) for m in self._prompt.messages] if chat else self._prompt.text
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

    def _file(self, name: str, indices: Sequence[int], answer: Answer, *, group: Group | None = None) -> None:
        """Records the answer of one call, or the group; whoever records the last one composes the rewards."""
        with self._lock:
            for index, (reward, fault) in zip(indices, answer.items, strict=True):
                self._parts[index][name] = reward
                self._missing -= 1
                if fault:
                    self._faults[index][name] = fault
            if group is not None:
                self._group, self._missing = group, self._missing - 1
            if self._missing or not self._future.set_running_or_notify_cancel():
                return
        try:
            rewards = [compose(self._grading.specs, parts) for parts in self._parts]
            for completion, faults in zip(self._completions, self._faults, strict=True):
                if completion.finish_reason != "abort":
                    self._grading.count(self._prompt, faults)
            assert self._group is not None
            self._future.set_result(ScoredGroup(self._group, rewards))
        except Exception as error:  # a bug, which the waiting caller must see
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
