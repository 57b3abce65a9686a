"""A small real engine on a clock of its own: a tick is one token for every completion that runs.

Its completions depend on their seeds and not on the weights, so that what two sources sample for the same
prompts can be compared; lengths of 1 to 200 with a heavy tail. Versions are recorded as a real engine does.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from rl.types import Completion, Group, Prompt, Reward, ScoredGroup, VersionSpan
from rollout.engine import EngineError
from rollout.fingerprint import HeldTensor
from rollout.sampler import completion_seed

MAX_LENGTH = 200


def length_of(seed: int, index: int) -> int:
    """Log-normal: median 8, 5 % above 90."""
    draw = random.Random(completion_seed(seed, index))
    return min(MAX_LENGTH, max(1, round(8 * math.exp(1.5 * draw.gauss(0, 1)))))


@dataclass(eq=False)
class Started:
    """One group: its completions by index, as they end."""

    prompt: Prompt
    seed: int
    size: int
    done: dict[int, Completion] = field(default_factory=dict)

    @property
    def group(self) -> Group:
        return Group(self.prompt, [self.done[i] for i in range(self.size)])


@dataclass(eq=False)
class Running:
    started: Started
    index: int
    length: int
    versions: list[int] = field(default_factory=list)


class TickEngine:
    """`concurrency` completions run at once, first come first served. `lag`: versions it is behind, a fault.

    Attributes:
        ticks: time passed.
        waves: groups in each call of `submit`.
        seeds: (prompt id, seed) of everything submitted.
    """

    name = "tick"
    runs_alone = held_while_training = sleeps_while_training = False

    def __init__(self, *, concurrency: int = 10_000, lag: int = 0) -> None:
        self.concurrency, self.lag, self.version, self.ticks = concurrency, lag, 0, 0
        self.tensors = {"w": HeldTensor((1,), torch.float32, torch.device("cpu"), "w")}
        self.waves: list[int] = []
        self.seeds: list[tuple[str, int]] = []
        self.most_in_flight = 0
        self._waiting: deque[Running] = deque()
        self._running: list[Running] = []
        self._open: list[Started] = []

    @property
    def in_flight(self) -> int:
        return sum(started.size for started in self._open)

    def submit(self, call):
        self.waves.append(len(call.prompts))
        num_completions = call.num_completions
        for prompt, seed in zip(call.prompts, call.seeds, strict=True):
            self.seeds.append((prompt.id, seed))
            self._open.append(started := Started(prompt, seed, num_completions))
            self._waiting += [Running(started, i, length_of(seed, i)) for i in range(num_completions)]
        self.most_in_flight = max(self.most_in_flight, self.in_flight)

    def collect(self, *, timeout_s):
        """Time passes only while the caller waits; `run` lets it pass while the trainer computes."""
        while timeout_s and self._open and not self._finished():
            self.run(1)
        finished = self._finished()
        self._open = [started for started in self._open if started not in finished]
        return [started.group for started in finished]

    def abort(self, prompts):
        names = {prompt.id for prompt in prompts}
        gone = [started for started in self._open if started.prompt.id in names]
        self._open = [started for started in self._open if started not in gone]
        self._waiting = deque(r for r in self._waiting if r.started not in gone)
        self._running = [r for r in self._running if r.started not in gone]

    def generate(self, call):
        others, self._open = self._open, []
        self.submit(call)
        asked, self._open = self._open, others
        while any(len(started.done) < started.size for started in asked):
            self.run(1)
        return [started.group for started in asked]

    def _finished(self) -> list[Started]:
        return [started for started in self._open if len(started.done) == started.size]

    def run(self, ticks: int) -> None:
        for _ in range(ticks):
            while self._waiting and len(self._running) < self.concurrency:
                self._running.append(self._waiting.popleft())
            self.ticks += 1
            for running in self._running:
                running.versions.append(self.version - self.lag)
                if len(running.versions) == running.length:
                    self._end(running)
            self._running = [r for r in self._running if len(r.versions) < r.length]

    def update_weights(self, weights, *, version):
        self.version = version

    def close(self):
        pass

    def _end(self, running: Running) -> None:
        n = running.length
        spans = [VersionSpan(v, running.versions.count(v)) for v in sorted(set(running.versions))]
        started = running.started
        ids = [(started.seed + running.index + t) % 97 for t in range(n)]
        reason = "length" if n == MAX_LENGTH else "stop"
        started.done[running.index] = Completion(ids, [-1.0] * n, [True] * n, reason, spans)


class AloneEngine(TickEngine):
    """Ticks by itself, a thousand times a second, and allows one caller at a time, as a real client does."""

    runs_alone = True

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.lock, self.caller = threading.Lock(), threading.Lock()
        self.is_broken = self.is_closed = False
        threading.Thread(target=self._tick, daemon=True).start()

    def _tick(self):
        while not self.is_closed:
            time.sleep(0.001)
            with self.lock:
                self.run(1)

    @contextmanager
    def _called(self):
        assert self.caller.acquire(blocking=False), "two threads call the engine at once"
        try:
            if self.is_broken:
                raise EngineError("the engine's process is dead")
            yield
        finally:
            self.caller.release()

    def submit(self, call):
        with self._called(), self.lock:
            super().submit(call)

    def collect(self, *, timeout_s):
        with self._called():
            deadline = time.monotonic() + timeout_s
            while not self._finished() and time.monotonic() < deadline:
                time.sleep(0.001)
            with self.lock:
                return super().collect(timeout_s=0.0)

    def update_weights(self, weights, *, version):
        with self._called(), self.lock:
            super().update_weights(weights, version=version)

    def close(self):
        self.is_closed = True


class OneWeight:
    """The stream of a policy with one weight."""

    def __iter__(self):
        yield "w", torch.ones(1)

    def canary(self):
        return [0, 1], [-1.0]


class ThreadScorer:
    """Grades in another thread: 1 for the first completion of a group if its first token is even, else 0."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1)
        self.on_submit = lambda: None

    def submit(self, group: Group) -> Future[ScoredGroup]:
        self.on_submit()
        return self.pool.submit(self._grade, group)

    def score(self, groups):
        return [self._grade(group) for group in groups]

    def close(self):
        self.pool.shutdown()

    def _grade(self, group: Group) -> ScoredGroup:
        scores = [
            float(i == 0 and c.token_ids[:1] != [] and c.token_ids[0] % 2 == 0)
            for i, c in enumerate(group.completions)
        ]
        return ScoredGroup(group, [Reward(score) for score in scores])
