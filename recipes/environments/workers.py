"""An environment in killable processes: deadlines are enforced from outside, hung or dead ones replaced.

Each process holds many episodes and answers one call at a time. When it is killed, the episode of the call
abstains; its other episodes are reopened from the state of their last reply.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import selectors
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rewards.pool.grader import Grader, worker_path
from rewards.pool.log import GraderLog
from rewards.pool.worker import encode_frame
from rollout.environment import EnvironmentFault, Reply, Turn

START_S = 120.0
MAIN = "recipes.environments.worker"


class Worker:
    """A process, started when it is first called. `generation` counts how often it was started."""

    def __init__(self, hello: Mapping[str, Any], log: GraderLog | None) -> None:
        self.hello, self.log = encode_frame(hello), log
        self.lock = threading.Lock()
        self.generation = 0
        self.child: Grader | None = None
        self.is_closed = False

    def start(self) -> dict[str, Any]:
        """Starts the process, and returns what it answers about its environment.

        Raises:
            ValueError: it does not find the environment.
            EnvironmentFault: it does not start.
        """
        if self.is_closed:
            raise EnvironmentFault("the environment is closed")
        selector = selectors.DefaultSelector()
        try:
            self.child = Grader(worker_path(), self.hello, selector, self.log, main=MAIN)
        except OSError as error:
            selector.close()
            raise EnvironmentFault(f"a process of the environment does not start: {error}") from error
        self.generation += 1
        said = self._answer(self.child, START_S)
        if "error" in said:
            self.kill()
            raise ValueError(said["error"])
        return said

    def exchange(self, message: Mapping[str, Any], deadline_s: float) -> dict[str, Any]:
        """Sends a message and waits for the answer.

        Raises:
            EnvironmentFault: no answer came in time, or the process died. It is killed in either case.
        """
        assert self.child is not None
        self.child.outbox += encode_frame(message)
        self.child.flush()
        return self._answer(self.child, deadline_s)

    def _answer(self, child: Grader, deadline_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + deadline_s
        while (left := deadline - time.monotonic()) > 0:
            for key, _ in child.selector.select(left):
                key.data[1]()
            if answers := child.messages():
                return answers[0]
            if child.ended:
                raise EnvironmentFault(f"the process of the environment died ({self.kill()})")
        self.kill()
        raise EnvironmentFault(
            f"the process of the environment did not answer within {deadline_s:g} s (environment.deadline_s)"
        )

    def kill(self) -> str:
        """Kills and reaps the process and its session; returns how it ended."""
        child, self.child = self.child, None
        if child is None:
            return "closed"
        how = child.kill()
        child.selector.close()
        return how


class Workers:
    """The environment of that name in `workers` processes. It is an `Environment` itself.

    Args:
        deadline_s: of a call, from the moment that a process receives it.
        memory_bytes: address space that a process may take beyond what loading the environment took.
        log: file for what environments print.

    Raises:
        ValueError: there is no such environment, or it does not take the options.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any] | None = None,
        *,
        workers: int = 1,
        deadline_s: float = 10.0,
        memory_bytes: int = 2 << 30,
        log: Path | None = None,
    ) -> None:
        hello = {"name": name, "options": dict(options or {}), "memory_bytes": memory_bytes}
        graders_log = None if log is None else GraderLog(log)
        self.deadline_s = deadline_s
        self.workers = [Worker(hello, graders_log) for _ in range(workers)]
        self._numbers = itertools.count()
        try:
            said = self.workers[0].start()
        except EnvironmentFault as error:
            raise ValueError(f"environment.name={name!r}: {error}") from error
        self.tools, self.repeatable = said["tools"], said["repeatable"]

    def open(self, row: Mapping[str, Any], seed: int, state: Any = None) -> RemoteEpisode:
        number = next(self._numbers)
        worker = self.workers[number % len(self.workers)]
        return RemoteEpisode(self, worker, number, {"row": dict(row), "seed": seed, "state": state})

    def pids(self) -> list[int]:
        return [child.process.pid for worker in self.workers if (child := worker.child) is not None]

    def close(self) -> None:
        """Kills every process; calls that wait for one fail."""
        for worker in self.workers:
            worker.is_closed = True
            if (child := worker.child) is not None:
                with contextlib.suppress(OSError):
                    os.killpg(child.process.pid, signal.SIGKILL)
        for worker in self.workers:
            with worker.lock:
                worker.kill()


class RemoteEpisode:
    """An episode in a process of `Workers`, opened there with its first call."""

    def __init__(self, owner: Workers, worker: Worker, number: int, opening: dict[str, Any]) -> None:
        self.owner, self.worker, self.number, self.opening = owner, worker, number, opening
        self.generation = -1

    def step(self, turn: Turn) -> Reply:
        call: dict[str, Any] = {"episode": self.number, "turn": asdict(turn), "seed": self.opening["seed"]}
        with self.worker.lock:
            if self.worker.child is None:
                self.worker.start()
            if self.generation != self.worker.generation:
                if self.generation >= 0 and self.opening["state"] is None:
                    raise EnvironmentFault("its process died in a call of another episode; its state is lost")
                call["open"] = self.opening
            answer = self.worker.exchange(call, self.owner.deadline_s)
            self.generation = self.worker.generation
            if answer.get("ends"):
                self.worker.kill()
        if "fault" in answer:
            raise EnvironmentFault(str(answer["fault"]))
        try:
            reply = Reply(**answer["reply"])
        except (KeyError, TypeError) as error:
            raise EnvironmentFault(f"the process of the environment sent no valid reply: {error}") from None
        self.opening["state"] = reply.state
        return reply

    def close(self) -> None:
        with self.worker.lock:
            if self.worker.child is not None and self.generation == self.worker.generation:
                with contextlib.suppress(EnvironmentFault):
                    self.worker.exchange({"episode": self.number}, self.owner.deadline_s)
