"""A server as a fleet sees it: its state, what it samples, and how much more it may get."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any, TypeVar

import torch

from rollout.engine import WEIGHTS_UNKNOWN, EngineError
from rollout.vllm.control import RECEIVER, Control, ServerDead
from rollout.vllm.core import Stream, in_thread
from rollout.vllm.lock import LOCK
from rollout.vllm.served import POLL_S, Server
from rollout.vllm.weight_files import Push

DEAD_S = 20.0  # of failing health checks
FIRST_CAP = 256
FULL_CACHE = 0.95
PATIENCE = 3  # consecutive metrics with waiting requests
RETRY_S = 10.0  # before one that failed to join may try again
LEAVE_S = 10.0  # for a server to hear that it is free
TICK_S = 0.1
Paused = list[tuple[Stream, int | None]]
T = TypeVar("T")


class State(StrEnum):
    UP = "up"
    SUSPECT = "suspect"
    DEAD = "dead"
    STALE = "stale"


@dataclass(slots=True, eq=False)
class Member:
    """A server of a fleet.

    Attributes:
        link: its `Control`; None before it has answered, and after another process has taken its place.
        fault: why it is not up.
        started: when the process that was proved began, by its own metrics.
        streams: what it samples, by id.
        cap: highest number of completions that it is given.
        idle_since: `time.monotonic()` when it ran out of work.
        lost_at: `time.monotonic()` when it was lost; for `RETRY_S` it is not asked to join again.
        waits: nothing that it sampled is handed out before the canary of its weights is compared.
        is_compared: that has been done, by this process.
        early: completions that have ended, and wait for it.
    """

    server: Server
    waits: bool = True
    link: Control | None = None
    state: State = State.STALE
    fault: str = "it has not answered yet"
    started: float | None = None
    streams: dict[str, Stream] = field(default_factory=dict)
    cap: int = FIRST_CAP
    idle_since: float = 0.0
    lost_at: float = -RETRY_S
    is_compared: bool = False
    early: list[Stream] = field(default_factory=list)
    _preemptions: float = 0.0
    _num_waits: int = 0
    _seen: Any = None

    @property
    def control(self) -> Control:
        if self.link is None:
            raise EngineError("another process has taken its place")
        return self.link

    @property
    def is_up(self) -> bool:
        return self.state in (State.UP, State.SUSPECT)

    @property
    def loss(self) -> str | None:
        """Why waiting for it is pointless, or None."""
        since = self.server.failing_since
        is_lost = self.server.is_gone or (since is not None and time.monotonic() - since > DEAD_S)
        return (self.server.fault or "it does not answer") if is_lost else None

    @property
    def has_changed(self) -> bool:
        """Whether another process has taken the place of the one that was proved."""
        now = (self.server.gauges or {}).get("started")
        return None not in (self.started, now) and now != self.started

    def judged(self, version: int) -> tuple[State, str]:
        """(its state by its health, why it is not up), if servers should hold `version`."""
        if (fault := self.loss) is not None:
            return State.DEAD, fault
        if self.has_changed:
            return State.STALE, "another process has taken its place"
        if self.state is State.DEAD and self.server.answered > self.lost_at:
            return State.STALE, self.fault
        if self.is_up and version not in (WEIGHTS_UNKNOWN, self.server.version):
            return State.STALE, self.server.doubt
        if self.is_up:
            return State.SUSPECT if self.server.failing_since else State.UP, ""
        return self.state, self.fault

    def close(self) -> None:
        """Forgets the process that it talked to; another one may join at once."""
        if self.link is not None:
            self.link.close()
        self.link, self.started, self.lost_at = None, None, -RETRY_S

    def meet(self, control: Control, check: Callable[[Control], None], run: str) -> None:
        """Talks to it from now on; but one that `check` refuses is given back."""
        self.link = control
        try:
            check(control)
        except BaseException:
            self.give_back(run)
            raise

    def give_back(self, run: str) -> None:
        """Lets other runs have it, if this process leased it, and forgets the one that it talked to."""
        if run and self.server.sends and self.link is not None and self.server.fault is None:
            with suppress(EngineError, ValueError, TimeoutError):
                in_thread(partial(self.control.lease, run, 0.0)).result(LEAVE_S)
        self.close()

    def may_join(self, at_once: bool) -> bool:
        """Whether it answers, and has not just failed to join."""
        is_time = at_once or time.monotonic() >= self.lost_at + RETRY_S
        return is_time and self.server.fault is None and self.server.gauges is not None

    def hold(self) -> None:
        """Pauses it, and asks how much it has sampled of each stream, and with what.

        Raises:
            EngineError: weights that nobody has proved.
        """
        self.control.pause()
        self.server.mark(self.control.sampled(self.server.label))
        self.confirm(sampled := list(self.streams.values()))
        if sampled and self.server.version == WEIGHTS_UNKNOWN:
            raise EngineError(self.server.doubt)

    def wait(self, answer: Future[T], what: str, timeout_s: float) -> T:
        """The result of a call to the server, waited for while it is alive. A call may have to wait until
        completions have ended: its time begins anew whenever one of these gets a token.

        Raises:
            ServerDead: it is dead, or has not answered in time.
        """
        deadline, before = 0.0, -1
        while not wait_for([answer], TICK_S).done:
            if (now := sum(len(stream.token_ids) for stream in list(self.streams.values()))) != before:
                deadline, before = time.monotonic() + timeout_s, now
            if (fault := self.loss) is not None:
                raise ServerDead(f"{what}: {fault}")
            if time.monotonic() > deadline:
                raise ServerDead(f"{what}: no answer within timeout_s={timeout_s:g}")
        return answer.result()

    def load(
        self, push: Push | None, bring: Callable[[Member, Push], None] | None, run: str
    ) -> tuple[str, dict[str, int], Paused]:
        """Loads weights while it is paused; its label for them, and their fingerprints. If `push` is None,
        another process has done so: last comes how much other weights had sampled before.

        Raises:
            EngineError, ValueError: it did not; or it serves another run now.
        """
        self.started = (self.server.gauges or {}).get("started")
        if run:
            self.control.lease(run)
        self.is_compared = not self.waits
        if push is None or bring is None:
            if self.streams and self.server.version == WEIGHTS_UNKNOWN:
                raise EngineError(self.server.doubt)
            label, before, streams = self.control.holds(), self.server.label, list(self.streams.values())
            if label == before or not streams:
                return label, {}, []
            counts = self.control.sampled(before, "GET")
            return label, {}, [(stream, counts.get(stream.asked_as)) for stream in streams]
        bring(self, push)
        self.control.load(push)
        return push.content, self.control.fingerprints(push.version), []

    def ready(self, ended: list[Stream]) -> list[Stream]:
        """Completions to be handed out, or to go on elsewhere: all that have not to wait for the canary."""
        ended = self.early + ended
        waits = self.is_up and not self.is_compared
        self.early = [stream for stream in ended if waits and stream.reason is not None]
        return [stream for stream in ended if stream not in self.early]

    def confirm(self, streams: Sequence[Stream]) -> None:
        """Drops what streams have brought, and do not say what sampled it, if the server does not hold the
        proved weights.
        """
        if not streams:
            return
        try:
            link = self.control
            holds = self.wait(in_thread(link.holds), "what it holds", link.timeout_s)
        except (EngineError, ValueError) as error:
            holds = str(error)
        self.server.settle(holds, {stream: len(stream.token_ids) for stream in streams})

    def follow_metrics(self) -> None:
        """Lowers the cap to what runs if the cache is full, or if requests are preempted or wait. Raises it
        while it is reached and none waits.
        """
        gauges = self.server.gauges
        if gauges is self._seen or not gauges or "running" not in gauges:
            return
        preemptions = gauges.get("preemptions", 0.0)
        is_full = gauges.get("cache", 0.0) > FULL_CACHE or preemptions > self._preemptions
        self._num_waits = self._num_waits + 1 if gauges.get("waiting") else 0
        if self._seen is not None and (is_full or self._num_waits >= PATIENCE):
            self.cap = max(1, int(gauges["running"]))
        elif len(self.streams) >= self.cap and not self._num_waits:
            self.cap += max(1, self.cap // 4)
        self._seen, self._preemptions = gauges, preemptions


def free_member(members: Sequence[Member], number: int) -> Member | None:
    """The server for so many completions: that with the fewest, or of several idle ones the longest idle."""
    ready = [m for m in members if m.state is State.UP and m.server.fault is None]
    free = [m for m in ready if not m.streams or len(m.streams) + number <= m.cap]
    return min(free, key=lambda m: (len(m.streams), m.idle_since), default=None)


Lose = Callable[[Member, State, str], None]


def each(
    members: Sequence[Member],
    what: str,
    work: Callable[[Member], Callable[[], T]],
    then: Callable[[Member, T], Any] = lambda member, found: None,
    *,
    lose: Lose,
    timeout_s: float,
    lost: State = State.DEAD,
) -> None:
    """Does `work` for all members at the same time, in threads of their own, and calls `then` with each
    result. A member for which either fails is lost; `what` names what it was waited for.
    """
    for member, found in [(member, in_thread(work(member))) for member in members]:
        try:
            then(member, member.wait(found, what, timeout_s))
        except (EngineError, ValueError) as error:
            lose(member, State.DEAD if isinstance(error, ServerDead) else lost, str(error))


def meet(
    members: Sequence[Member],
    connect: Callable[[str], Control],
    met: Callable[[Member, Control], None],
    *,
    lose: Lose,
    timeout_s: float,
    note: Callable[[str], None],
) -> None:
    """Connects to all servers, and calls `met` with each. While none can be used, those that have never
    answered are tried again, for `timeout_s` at most. All others are lost, and may join later.
    """
    deadline, is_said, faults = time.monotonic() + timeout_s, False, dict[Member, str]()
    missing = silent = members
    while True:
        # A lost one is asked by its health checks alone: a call to a port that says nothing stays open.
        asked = [member for member in missing if member not in faults or member.loss is None]
        for member, found in [(member, in_thread(partial(connect, member.server.url))) for member in asked]:
            faults.pop(member, None)
            try:
                met(member, member.wait(found, "its first answer", timeout_s))
                member.server.asked.wait(timeout_s)
            except EngineError as error:
                faults[member] = str(error)
        missing = [member for member in silent if member in faults]
        silent = [member for member in missing if not member.server.answered]
        if not missing or len(faults) < len(members):
            break
        if time.monotonic() > deadline:
            faults |= {m: f"no answer within timeout_s={timeout_s:g}: {faults[m]}" for m in missing}
            break
        if not is_said:
            whys = [(m.server.url, faults[m].removeprefix(f"server {m.server.url}: ")) for m in missing]
            where = ", ".join(f"{url} ({why})" for url, why in whys)
            note(f"nobody answers yet at {where}; waiting for a server for timeout_s={timeout_s:g} at most")
            is_said = True
        time.sleep(POLL_S)
    for member, fault in faults.items():
        lose(member, State.DEAD, fault)


def connect(
    url: str, token: str, *, dtype: torch.dtype, max_model_len: int, timeout_s: float, run: str = ""
) -> Control:
    """A `Control` of a server that is fit for a run whose longest sequence has `max_model_len` tokens.

    Args:
        run: names the run that takes the server (`Control.lease`); empty: it is shared by agreement.

    Raises:
        ValueError: it is not fit; the message says which vLLM options would make it so. Or others have it.
        EngineError: it does not answer.
    """
    control = Control(url, token, timeout_s=timeout_s)
    try:
        facts, wanted = control.facts(), str(dtype).removeprefix("torch.")
        faults = {
            "--enable-scale-out, for token ids in and out": not facts.has_generate,
            f"--worker-extension-cls {RECEIVER}, for weights and their proof": not facts.has_receiver,
            f"--middleware {LOCK}, for its token and what it has sampled": not facts.has_lock,
            "--logprobs-mode processed_logprobs": facts.logprobs_mode != "processed_logprobs",
            f"--dtype {wanted} (it has {facts.dtype})": facts.dtype != wanted,
            f"--max-model-len {max_model_len} or more": facts.max_model_len < max_model_len,
        }
        if lacks := [fault for fault, is_true in faults.items() if is_true]:
            is_asked = facts.dtype != wanted and facts.dtype in ("bfloat16", "float32")
            other = f", or train with engine.dtype={facts.dtype}" if is_asked else ""
            remedy = f"start it again with that, best by `cohort serve`{other}"
            raise ValueError(f"server {url} lacks {'; '.join(lacks)}: {remedy}")
        control.describe()
        if run:
            control.lease(run)
    except BaseException:
        control.close()
        raise
    return control


def same_canary(member: Member, logprobs: Sequence[float], others: Sequence[float], tolerance: float) -> None:
    """Notes that a server's canary is compared.

    Raises:
        EngineError: its log-probs of fixed tokens differ from another one's.
    """
    mean = sum(abs(a - b) for a, b in zip(logprobs, others, strict=True)) / len(others)
    if not mean <= tolerance:
        raise EngineError(
            f"server {member.server.url} holds the policy's weights but computes differently: its canary's "
            f"log-probs are {mean:.3g} nats from another server's on average, more than {tolerance:g}"
        )
    member.is_compared = True
