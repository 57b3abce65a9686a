"""Requests on their way through engine and graders, in the order in which they were started.

An engine in a process of its own can sample while the trainer computes. Between `begin_overlap` and
`end_overlap` a thread collects what it finishes, hands it to the graders, which are processes too, and
refills the engine. At all other times only the caller's thread touches the engine, so no lock is needed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace

from rl.types import Call, Group, Prompt, SamplingParams, ScoredGroup, Scorer
from rollout.calls import aborted
from rollout.engine import Engine, EngineError
from rollout.prompts import sampling_seed

WAVES = 4
POLL_S = 1.0
OVERLAP_POLL_S = 0.02  # also the longest that `end_overlap` waits for its thread, when all is well


@dataclass(frozen=True, slots=True)
class GroupSampling:
    """What an engine is asked for, per prompt. The prompt's own seed comes from `seed` and its number."""

    params: SamplingParams
    group_size: int
    seed: int
    with_logprobs: bool = True


@dataclass(slots=True, eq=False)
class Request:
    """A prompt from the moment it is dealt to this process until it is trained on.

    Attributes:
        submitted: the engine has been asked for it.
        scored: not None once it is sampled; done once it is graded.
    """

    ordinal: int
    prompt: Prompt
    submitted: bool = False
    scored: Future[ScoredGroup] | None = None

    @property
    def id(self) -> str:
        """Unique, unlike the prompt's own id: a small dataset may come round while a prompt is in flight."""
        return f"{self.prompt.id} (number {self.ordinal}, attempt 0)"  # as journals on disk have it


class InFlight:
    """A queue of requests. Whatever finishes goes to the graders at once, and keeps its place in the queue.

    Args:
        limit: highest number of completions submitted and not collected, at least one group; None: no limit.
            Refills wait until a quarter of it is free, since a prefill in every decode step costs an engine
            more than a few idle places.
        timeout_s: longest wait for the engine to finish any group, or for the graders to finish any.

    Attributes:
        queue: the requests, oldest first; the caller appends new ones, and takes those it trains on.
    """

    def __init__(
        self, engine: Engine, scorer: Scorer, sampling: GroupSampling, *, limit: int | None, timeout_s: float
    ) -> None:
        self.engine, self.scorer, self.sampling = engine, scorer, sampling
        self.limit, self.timeout_s = limit, timeout_s
        self.queue: list[Request] = []
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._fault: Exception | None = None
        self._yields = False  # between a batch and its training

    def clear(self) -> None:
        """Forgets all requests, and aborts those that the engine still samples."""
        self._abort(self.queue)
        self.queue, self._yields = [], False

    def _abort(self, requests: Iterable[Request]) -> None:
        if sampled := [r for r in requests if r.submitted and r.scored is None]:
            self.engine.abort(self.call(sampled).prompts)

    def call(self, requests: Sequence[Request]) -> Call:
        asked = self.sampling
        return Call(
            tuple(replace(request.prompt, id=request.id) for request in requests),
            asked.group_size,
            asked.params,
            tuple(sampling_seed(asked.seed, request.ordinal) for request in requests),
            asked.with_logprobs,
        )

    def refill(self) -> None:
        """Submits waiting requests, oldest first."""
        waiting = [r for r in self.queue if not r.submitted and r.scored is None]
        wave = len(waiting)
        if self.limit is not None:
            size = self.sampling.group_size
            room = max(0, self.limit - self.engine.in_flight) // size
            smallest = max(1, self.limit // size // WAVES)
            wave = min(room, wave) if room >= min(smallest, wave) else 0
        if not wave:
            return
        self.engine.submit(self.call(waiting[:wave]))
        for request in waiting[:wave]:
            request.submitted = True

    def pump(self, timeout_s: float = 0.0) -> bool:
        """Refills the engine and grades what it finishes within `timeout_s`; returns whether anything was."""
        self.refill()
        finished = self.engine.collect(timeout_s=timeout_s)
        asked = {request.id: request for request in self.queue} if finished else {}
        for group in finished:
            request = asked[group.prompt.id]
            group.prompt = request.prompt
            request.scored = self.scorer.submit(group)
        return bool(finished)

    def begin_overlap(self) -> None:
        """Pumps in a thread until `end_overlap`, if the engine runs alone; the caller must not touch it.

        An engine that would only take turns with the trainer goes on until `yield_device`; graders do beyond.
        """
        self._yields = self.engine.sleeps_while_training or self.engine.held_while_training
        if self.engine.runs_alone and self._has_work() and not self._yields:
            self._stop.clear()
            self._thread = threading.Thread(target=self._overlap, name="in flight", daemon=True)
            self._thread.start()

    def yield_device(self) -> None:
        """Holds an engine that shares the trainer's device until it gets weights; one that sleeps meanwhile
        drops its weights and cache. What it has finished by then goes to the graders.
        """
        yields, self._yields = self._yields, False
        sleeps = self.engine.sleeps_while_training
        if yields and (sleeps or (self.engine.runs_alone and self._has_work())):
            self.engine.hold()
            self.pump()
            if sleeps:
                self.engine.hold(release=True)

    def end_overlap(self) -> None:
        """Ends the thread, so that the caller may use the engine again; safe to call at any time.

        Raises:
            EngineError: the engine failed meanwhile, or did not come back from a call.
        """
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join(self.timeout_s)
        if self._thread.is_alive():
            raise EngineError(
                f"engine {self.engine.name} did not hand out what it had finished within {self.timeout_s:g} s"
            )
        self._thread = None
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def _has_work(self) -> bool:
        return any(request.scored is None for request in self.queue)

    def _overlap(self) -> None:
        try:
            while self._has_work() and not self._stop.is_set():
                self.pump(OVERLAP_POLL_S)
        except Exception as error:
            self._fault = error  # `end_overlap` raises it in the caller's thread

    def wait_for_engine(self, requests: Sequence[Request]) -> None:
        """Returns when all of `requests` are sampled; other groups that finish by then are graded as well.

        If no group finishes for `timeout_s`, the missing ones are given up: their completions count as
        aborted.

        Raises:
            EngineError: all of them are missing.
        """
        last = time.monotonic()
        while True:
            late = [request for request in requests if request.scored is None]
            if self.pump(min(POLL_S, self.timeout_s) if late else 0.0):
                last = time.monotonic()
            if not late:
                return
            if time.monotonic() - last <= self.timeout_s:
                continue
            if len(late) == len(requests):
                raise EngineError(
                    f"engine {self.engine.name} finished no group for {self.timeout_s:g} s, with "
                    f"{self.engine.in_flight} completions in flight, while the run waited for prompt "
                    f"{late[0].prompt.id}; read the engine's log, or raise engine.timeout_s"
                )
            self._abort(late)
            for request in late:
                nothing = [aborted() for _ in range(self.sampling.group_size)]
                request.scored = self.scorer.submit(Group(request.prompt, nothing))

    def wait_for_graders(self, requests: Sequence[Request]) -> list[ScoredGroup]:
        """The scored groups of sampled requests.

        Raises:
            RuntimeError: no group at all was graded for `timeout_s`.
        """
        futures = [request.scored for request in requests if request.scored is not None]
        assert len(futures) == len(requests)
        last = -1
        while (graded := self._num_graded()) > last and wait(futures, self.timeout_s).not_done:
            last = graded
        slow = [r.prompt.id for r, future in zip(requests, futures, strict=True) if not future.done()]
        if slow:
            raise RuntimeError(
                f"the graders finished no group for {self.timeout_s:g} s, while the run waited for "
                f"prompts {', '.join(slow[:3])}; lower rewards.deadline_s, or raise rewards.workers"
            )
        return [future.result() for future in futures]

    def _num_graded(self) -> int:
        return sum(request.scored is not None and request.scored.done() for request in self.queue)
