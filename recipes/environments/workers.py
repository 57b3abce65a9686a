"""An environment in killable processes: deadlines are kept from outside, and what hangs or dies is replaced.

Each process holds many episodes and answers one call at a time. When it is killed, the call abstains; the
other episodes that it held are opened anew from the state of their last reply.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewards.environment import grader_environment
from rewards.pool.grader import worker_path
from rewards.pool.log import GraderLog
from rewards.pool.worker import HEADER, encode_frame
from rollout.environment import EnvironmentFault, Reply, Turn

START_S = 120.0
MAX_FRAME_BYTES = 16 << 20
BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from recipes.environments.worker import main; main(int(sys.argv[2]))"
)


class Worker:
    """A process, started when it is first called. `generation` counts those that were started."""

    def __init__(self, hello: Mapping[str, Any], log: GraderLog | None) -> None:
        self.hello, self.log = hello, log
        self.lock = threading.Lock()
        self.generation = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.is_closed = False

    def start(self) -> dict[str, Any]:
        """Starts the process, and gives what it says of its environment.

        Raises:
            ValueError: it does not find the environment.
            EnvironmentFault: it does not start.
        """
        if self.is_closed:
            raise EnvironmentFault("the environment is closed")
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", BOOT, json.dumps(worker_path()), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,  # Ctrl-C is the trainer's; and the session is killed whole
                env={**grader_environment(), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
            )
        except OSError as error:
            raise EnvironmentFault(f"a process of the environment does not start: {error}") from error
        self.generation += 1
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
        said = self.exchange(self.hello, START_S)
        if "error" in said:
            self.kill()
            raise ValueError(said["error"])
        return said

    def exchange(self, message: Mapping[str, Any], deadline_s: float) -> dict[str, Any]:
        """Sends a frame and waits for the answer.

        Raises:
            EnvironmentFault: there is none in time, or the process died; it is gone then.
        """
        process, frame, inbox = self.process, bytearray(encode_frame(message)), bytearray()
        assert process and process.stdin and process.stdout and process.stderr
        deadline, said = time.monotonic() + deadline_s, bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdin, selectors.EVENT_WRITE)
            selector.register(process.stdout, selectors.EVENT_READ)
            selector.register(process.stderr, selectors.EVENT_READ)
            while (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    if key.fileobj is process.stdin:
                        with contextlib.suppress(BlockingIOError, BrokenPipeError):
                            del frame[: os.write(key.fd, frame[: 1 << 16])]
                        if not frame:
                            selector.unregister(process.stdin)
                    elif key.fileobj is process.stderr:
                        data = os.read(key.fd, 1 << 16)
                        said += data
                        if not data:
                            selector.unregister(process.stderr)
                        if self.log is not None:
                            self.log.take(said)
                        del said[:-4000]
                    else:
                        inbox += (data := os.read(key.fd, 1 << 18))
                        if not data:
                            raise self._died(f"died ({self.kill()})")
                if len(inbox) >= HEADER.size:
                    (size,) = HEADER.unpack_from(inbox)
                    if size > MAX_FRAME_BYTES:
                        raise self._died(f"answered {size:,} bytes, and {MAX_FRAME_BYTES:,} are allowed")
                    if len(inbox) >= HEADER.size + size:
                        return self._read(bytes(inbox[HEADER.size :]))
        raise self._died(f"did not answer within {deadline_s:g} s (environment.deadline_s)")

    def _read(self, body: bytes) -> dict[str, Any]:
        with contextlib.suppress(ValueError):
            if isinstance(message := json.loads(body), dict):
                return message
        raise self._died("answered what is not JSON")

    def _died(self, how: str) -> EnvironmentFault:
        self.kill()
        return EnvironmentFault(f"the process of the environment {how}")

    def kill(self) -> str:
        """Kills and reaps the process and its session; how it ended."""
        process, self.process = self.process, None
        if process is None:
            return "closed"
        ended = process.poll()
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        for stream in filter(None, (process.stdin, process.stdout, process.stderr)):
            with contextlib.suppress(OSError):
                stream.close()
        code = process.returncode if ended is None else ended
        return signal.Signals(-code).name if code and code < 0 else f"exit {code}"


class Workers:
    """The environment of that name in `workers` processes: an `Environment` itself.

    Args:
        deadline_s: of a call, from the moment that a process gets it.
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
        return [process.pid for worker in self.workers if (process := worker.process) is not None]

    def close(self) -> None:
        """Kills every process; calls that wait for one fail."""
        for worker in self.workers:
            worker.is_closed = True
            if (process := worker.process) is not None:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
        for worker in self.workers:
            with worker.lock:
                worker.kill()


class RemoteEpisode:
    """An episode in a process of `Workers`, opened there with its first call."""

    def __init__(self, owner: Workers, worker: Worker, number: int, opening: dict[str, Any]) -> None:
        self.owner, self.worker, self.number, self.opening = owner, worker, number, opening
        self.generation = -1

    def step(self, turn: Turn) -> Reply:
        call: dict[str, Any] = {"episode": self.number, "turn": {"number": turn.number, "text": turn.text}}
        with self.worker.lock:
            if self.worker.process is None:
                self.worker.start()
            if self.generation != self.worker.generation:
                if self.generation >= 0 and self.opening["state"] is None:
                    raise EnvironmentFault("its process died under another episode, and its state is lost")
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
            raise EnvironmentFault(f"the process of the environment answered no reply: {error}") from None
        self.opening["state"] = reply.state
        return reply

    def close(self) -> None:
        with self.worker.lock:
            if self.worker.process is not None and self.generation == self.worker.generation:
                with contextlib.suppress(EnvironmentFault):
                    self.worker.exchange({"episode": self.number}, self.owner.deadline_s)
