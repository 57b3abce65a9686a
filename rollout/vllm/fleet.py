"""vLLM servers as one core: a dead one's completions go on elsewhere, and none samples unproved.

A server that is *up* has proved that it holds the current weights. A *suspect* one does not answer; nothing
new goes there. Completions of a *dead* one go on elsewhere, from the tokens that they have. A *stale* one
answers, but has yet to get and to prove the current weights. Whoever asks for answers also judges the
servers; a thread takes lost ones back while nobody asks. Streams and health checks have threads of their own.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from threading import Event, RLock, Thread
from typing import Any

import torch
from torch import Tensor

from rl.types import SamplingParams
from rollout.engine import WEIGHTS_UNKNOWN, EngineError
from rollout.fingerprint import HeldTensor
from rollout.vllm.broadcast import WeightBroadcast
from rollout.vllm.control import Control, Layouts, check_alike, check_held
from rollout.vllm.core import Answer, SleepingPart, Stream, in_turn
from rollout.vllm.member import TICK_S, Member, Paused, State, each, free_member, meet, same_canary
from rollout.vllm.served import Server
from rollout.vllm.weight_files import Push, WeightFiles, noting

LOOK_S = 2.0  # between looks at the servers while nobody asks
MAX_TRIES = 8  # of a completion; it is an "abort" then


class Fleet:
    """A `Core` of servers.

    Args:
        connect: url -> a `Control` of a server that is fit for the run. It raises ValueError for one that is
            not, and EngineError for one that does not answer.
        files: what servers hold -> what writes or sends their weights; None: another process does.
        tolerance: largest mean gap of the canary's log-probs between two servers, nats.
        timeout_s: longest wait for a server's answer, and for any server to be up.
        note: is told when a server is lost, and when it is up again.
        run: names the run whose servers these are, while they do not serve another one.
        waits: nothing that a server sampled is handed out before `prompt_logprobs` has compared its canary.

    Raises:
        ValueError, EngineError: a server is not fit, or two differ; or none answers.
    """

    runs_alone = True
    is_on_cpu = True  # or on a GPU that is not the trainer's: in either case the two take no turns
    seeds_are_free = True
    sleeps = False  # its memory is not the trainer's

    def __init__(
        self,
        urls: Sequence[str],
        token: str | None,
        *,
        connect: Callable[[str], Control],
        files: Callable[[Mapping[str, HeldTensor]], WeightFiles | WeightBroadcast] | None,
        tolerance: float,
        timeout_s: float,
        note: Callable[[str], None],
        run: str = "",
        waits: bool = True,
    ) -> None:
        self.connect, self.tolerance, self.timeout_s, self.note = connect, tolerance, timeout_s, note
        self.device, self.run, self.routes = torch.device("cpu"), run, False
        self.files: WeightFiles | WeightBroadcast | None = None
        self._answered: SimpleQueue[tuple[Server, Stream]] = SimpleQueue()
        own = {"salt": secrets.token_hex(16), "sink": self._answered, "sends": files is not None, "run": run}
        self.members = [Member(Server(url, token, **own), waits) for url in urls]
        self._waiting: deque[list[Stream]] = deque()
        self._finished: list[Answer] = []
        self._layouts: Layouts = {}  # the first one stands for all outside
        self._expected: dict[int, dict[str, int]] = {}  # of each: fingerprints of what was sent
        self._canary: tuple[list[int], list[float]] | None = None
        self._down_since: float | None = None
        self._version, self.vocab_size = WEIGHTS_UNKNOWN, 0
        self._turn, self._is_closed, self._is_held = RLock(), Event(), False
        try:
            meet(self.members, connect, self._met, lose=self._lose, timeout_s=timeout_s, note=note)
            if not self._layouts:
                raise EngineError(f"no server can be used: {self._said()}")
            self.files = files and files(self.describe())
            Thread(target=self._watch, name="fleet", daemon=True).start()
        except BaseException:
            self.close()
            raise

    def _met(self, member: Member, control: Control) -> None:
        fits = partial(check_alike, layouts=self._layouts, proved=self._expected, routes=self.routes)
        member.meet(control, fits, self.run)
        self.vocab_size = control.facts().vocab_size or 0

    @in_turn
    def add(
        self,
        token_ids: list[int],
        sampling: SamplingParams,
        *,
        ids: Sequence[str],
        seeds: Sequence[int | None],
        with_logprobs: bool,
        with_prompt_logprobs: bool = False,
    ) -> None:
        if with_prompt_logprobs:
            found = self._scored(token_ids)
            self._finished.append(Answer(ids[0], [], [], [], "length", prompt_logprobs=found))
            return
        pairs = zip(ids, seeds, strict=True)
        own = (with_logprobs, self.routes)
        self._waiting.append([Stream(name, token_ids, sampling, seed, *own) for name, seed in pairs])
        self._dispatch()

    @in_turn
    def abort(self, ids: Sequence[str]) -> None:
        given_up = set(ids)
        for member in self.members:
            member.server.cancel([member.streams.pop(name).id for name in given_up & member.streams.keys()])
        left = ([stream for stream in group if stream.id not in given_up] for group in self._waiting)
        self._waiting = deque(group for group in left if group)
        self._finished = [answer for answer in self._finished if answer.request_id not in given_up]

    def answers(self, *, timeout_s: float, waiting_for: str) -> list[Answer]:
        deadline = time.monotonic() + timeout_s
        while True:
            with self._turn:
                self._look()
                self._dispatch()
                self._take_in(0.0 if self._finished else min(TICK_S, max(0.0, deadline - time.monotonic())))
                if self._finished or time.monotonic() >= deadline:
                    found, self._finished = self._finished, []
                    return found
                self._check_any_up(waiting_for)

    @in_turn
    def pause(self) -> None:
        """If another process sends the weights, that one holds the servers, and here nothing begins."""
        self._is_held = self.files is None
        if self.files is not None:
            self._hold(self._up())
        for member in self.members if self._is_held else ():
            member.server.stand_still()

    def sleep(self) -> None:
        raise EngineError("servers do not sleep: a trainer could not use their memory")

    def wake(self, part: SleepingPart) -> None:
        raise EngineError(f"servers never sleep, so there is no {part} to wake")

    @in_turn
    def resume(self, version: int) -> None:
        if self.files is not None:
            self._each(self._up(), "the resumption", lambda member: member.control.resume)
            return
        self._canary = self._canary if version == self._version else None
        self._version, self._is_held = version, False
        self._prove([member for member in self.members if member.link is not None], None, lost=State.STALE)

    @in_turn
    def load(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Writes the weights once. Every server that answers loads them, and goes on only when it has shown
        their fingerprints; one that fails is left out.

        Raises:
            EngineError: no server holds them; the message has what each one said.
        """
        assert self.files is not None
        self._look()
        self._version, self._canary = WEIGHTS_UNKNOWN, None
        self._expected = {workers: {} for workers in self._layouts}
        self._hold(self._up())
        self._take_in(0.0)  # while each holds the weights that sampled it
        for workers, held in self._layouts.items():
            weights = noting(weights, held, version, self._expected[workers])
        push = self.files.write(weights, version=version)
        self._version = version
        self._prove(self._up(), push, lost=State.STALE)  # one that lacks the base gets them whole
        self._join([member for member in self.members if member.state is State.STALE], at_once=True)
        if not self._up():
            self._version = WEIGHTS_UNKNOWN
            raise EngineError(f"no server holds version {version}: {self._said()}")
        self.files.commit()

    def describe(self) -> Mapping[str, HeldTensor]:
        return next(iter(self._layouts.values()))

    def fingerprints(self) -> Mapping[str, int]:
        """The fingerprints that all servers that are up have shown."""
        return next(iter(self._expected.values()), {}) if self._up() else {}

    @in_turn
    def close(self) -> None:
        self._is_closed.set()
        for member in self.members:
            member.server.close()  # first, or it might renew the lease
            member.give_back(self.run)
        if self.files is not None:
            self.files.close()

    def _up(self) -> list[Member]:
        return [member for member in self.members if member.is_up]

    def _said(self) -> str:
        return "; ".join(f"{m.server.url} is {m.state}: {m.fault or 'it answers'}" for m in self.members)

    def _watch(self) -> None:
        """Takes servers back that answer again, so that they sample as soon as somebody asks."""
        while not self._is_closed.wait(LOOK_S):
            with self._turn, suppress(EngineError, ValueError, OSError):  # which the next to ask meets, too
                if not self._is_closed.is_set() and len(self._up()) < len(self.members):
                    self._look()
                    self._dispatch()

    def _look(self) -> None:
        """Judges every server by its health; gives a stale one the current weights."""
        for member in self.members:
            state, fault = member.judged(self._version)
            if fault != member.fault:
                self._lose(member, state, fault)
            if member.has_changed:
                member.close()
            member.state = state
            member.follow_metrics()
        if self._version != WEIGHTS_UNKNOWN:
            self._join([member for member in self.members if member.state is State.STALE])

    def _lose(self, member: Member, state: State, fault: str) -> None:
        """Lets its completions go on elsewhere. Those of a dead one keep what is sure if its canary was
        compared. One that answers, but could not prove its weights, may have had others: what it sampled is
        dropped.
        """
        if fault != member.fault:
            left = len(member.streams)
            self.note(f"server {member.server.url} is {state} with {left} completions: {fault}")
        member.state, member.fault, member.lost_at = state, fault, time.monotonic()
        member.server.give_up(keep=state is State.DEAD and member.is_compared)
        self._take_in(0.0)
        for stream in list(member.streams.values()):
            self._take(member, stream)

    def _take_in(self, wait_s: float) -> None:
        """Takes what has finished; waits at most `wait_s` for the first."""
        found: list[tuple[Server, Stream]] = []
        with suppress(Empty):
            while True:
                found.append(self._answered.get(timeout=wait_s) if wait_s else self._answered.get_nowait())
                wait_s = 0.0
        for member in self.members:
            streams = [stream for server, stream in found if server is member.server]
            if self.files is not None:
                member.confirm([one for one in streams if one.reason is not None and one.said is None])
            for stream in member.ready(streams):
                self._take(member, stream)

    def _take(self, member: Member, stream: Stream) -> None:
        """Hands a completion out, or lets it go on elsewhere."""
        if member.streams.pop(stream.id, None) is not stream:
            return
        if not member.streams:
            member.idle_since = time.monotonic()
        if not member.is_compared:  # and it may never be
            stream.drop()
        answer = stream.answer()
        if answer.finish_reason != "abort" or stream.tries >= MAX_TRIES:
            self._finished.append(answer)
        else:
            self._waiting.appendleft([stream])
        if (refusal := member.server.refusal) is not None:
            raise EngineError(f"server {member.server.url} refuses what it is asked: {refusal}")

    def _dispatch(self) -> None:
        """Sends all completions of a prompt to one server, which caches it."""
        waiting = () if self._is_held else self._waiting
        while waiting and (member := free_member(self.members, len(waiting[0]))) is not None:
            group = self._waiting.popleft()
            member.streams |= {stream.id: stream for stream in group}
            member.server.start(group)

    def _check_any_up(self, waiting_for: str) -> None:
        self._down_since = None if self._up() else self._down_since or time.monotonic()
        if self._down_since is not None and time.monotonic() - self._down_since > self.timeout_s:
            what = f"no server was up for timeout_s={self.timeout_s:g} while {waiting_for}"
            raise EngineError(f"{what}: {self._said()}")

    def _each(self, members: Sequence[Member], *work: Any, **lost: State) -> None:
        each(members, *work, lose=self._lose, timeout_s=self.timeout_s, **lost)

    def _hold(self, members: Sequence[Member]) -> None:
        self._each(members, "the pause", lambda member: member.hold, lost=State.STALE)

    def _prove(self, members: Sequence[Member], push: Push | None, *, lost: State = State.DEAD) -> None:
        """Loads weights into paused servers, each of which goes on only if it shows their fingerprints. If
        `push` is None, another process has done so, and the servers say whether.
        """

        def judge(member: Member, found: tuple[str, dict[str, int], Paused]) -> None:
            label, prints, paused = found
            expected = self._expected.get(member.control.facts().num_workers, {})
            check_held(label, prints, version=self._version, expected=expected)
            member.server.holds(self._version, label, paused)
            if push is not None:
                member.control.resume()
            if self._canary is not None:
                ids, others = self._canary
                logprobs = member.wait(member.server.score(ids), "the canary", self.timeout_s)
                same_canary(member, logprobs, others, self.tolerance)
            member.state, member.fault = State.UP, ""

        own = (push, self.files and self.files.bring, self.run)
        self._each(members, f"version {self._version}", lambda one: partial(one.load, *own), judge, lost=lost)

    def _join(self, members: Sequence[Member], *, at_once: bool = False) -> None:
        """Gives the current weights, whole, to servers that answer, or checks that another process has."""
        ready = [member for member in members if member.may_join(at_once)]
        new = [member for member in ready if member.link is None]
        reach = lambda one: partial(self.connect, one.server.url)  # noqa: E731
        self._each(new, "its first answer", reach, self._met, lost=State.STALE)  # it may fit the next weights
        ready = [member for member in ready if member.link is not None]
        if self.files is not None:
            self._hold(ready)
            ready = [member for member in ready if member.state is State.STALE]
        if ready:
            self._prove(ready, self.files and self.files.whole())
        for member in [member for member in ready if member.is_up]:
            self.note(f"server {member.server.url} is up and holds version {self._version}")

    def _scored(self, token_ids: list[int]) -> list[float]:
        """The canary's log-probs of the first server that is up; one whose own differ from these is lost."""
        self._canary = None

        def compare(member: Member, logprobs: list[float]) -> None:
            self._canary = self._canary or (token_ids, logprobs)
            same_canary(member, logprobs, self._canary[1], self.tolerance)

        self._each(self._up(), "the canary", lambda one: one.server.score(token_ids).result, compare)
        if self._canary is None:
            raise EngineError(f"no server computed the canary's log-probs: {self._said()}")
        return self._canary[1]
