"""The owner's side of one grader process: starts it, moves bytes to and from it, kills it."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rewards.environment import grader_environment
from rewards.pool.log import GraderLog
from rewards.pool.worker import HEADER, MAX_FRAME_BYTES, PING_ID, encode_frame

MAX_BESIDE = 64  # async calls that run concurrently
MAX_AHEAD, AHEAD_S = 16, 0.004  # calls that wait in a process for their turn, and the work that they may hold
TAIL_BYTES = 4000
PING = encode_frame({"id": PING_ID})  # comes back as it is: the process lived until here
BOOT = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from %s import main; main(int(sys.argv[2]))"


@dataclass(slots=True, eq=False)
class Call:
    """One call in flight. `alone` is set when its process died: it is then retried once by itself.

    `started`: when its turn came, on the monotonic clock; 0 while it waits behind another call. `lost`: how
        often a process died before it could try the call alone.
    """

    id: int
    frame: bytes
    deadline_s: float
    is_async: bool
    future: Future[dict[str, Any]] = field(default_factory=Future)
    started: float = 0.0
    alone: bool = False
    lost: int = 0

    def answer(self, message: dict[str, Any]) -> None:
        if not self.future.done():
            self.future.set_result(message)

    def fail(self, fault: str, detail: str) -> None:
        self.answer({"fault": fault, "detail": detail})


def worker_path() -> list[str]:
    """`sys.path` for graders: that of this process, then this library's folder and the working directory."""
    here, ours = os.getcwd(), str(Path(__file__).parents[2])
    return list(dict.fromkeys([*(entry or here for entry in sys.path), ours, here]))


class Grader:
    """A process, the bytes in transit and the calls that it holds. One thread starts and uses it.

    Calls are answered in the order in which they were sent, except async ones, which run concurrently. A few
    short calls are sent ahead, so that the process need not wait; a call's clock starts when the one before
    it is answered.

    Attributes:
        calls: by id, in the order in which they were sent.
        ready: it has loaded its rewards.
        ended: its output is closed or broke the protocol; no more answers will come.
        usual_s: how long recent calls took.
        met_alone: it answered the ping sent before a lone call, so it has received that call.
    """

    def __init__(
        self,
        path: Sequence[str],
        hello: bytes,
        selector: selectors.BaseSelector,
        log: GraderLog | None = None,
        *,
        main: str = "rewards.pool.worker",
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", BOOT % main, json.dumps(path), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the trainer; and the whole session can be killed
            env={"OMP_NUM_THREADS": "1", **grader_environment(), "PYTHONHASHSEED": "0"},
        )
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.stdin, self.stdout, self.stderr = self.process.stdin, self.process.stdout, self.process.stderr
        self.selector, self.born = selector, time.monotonic()
        self.log, self.line = log, bytearray()
        self.outbox, self.inbox, self.tail = bytearray(), bytearray(), bytearray()
        self.calls: dict[int, Call] = {}
        self.ready = self.ended = self.is_writing = self.met_alone = False
        self.usual_s = 1.0
        for stream in (self.stdin, self.stdout, self.stderr):
            os.set_blocking(stream.fileno(), False)
        selector.register(self.stdout, selectors.EVENT_READ, (self, self.read_answers))
        selector.register(self.stderr, selectors.EVENT_READ, (self, self.read_stderr))
        self.outbox += hello
        self.flush()

    def has_room_for(self, call: Call) -> bool:
        """Whether it is idle, runs async calls and is offered another, or will finish its calls soon."""
        if not self.calls or not self.ready:
            return self.ready
        last = next(reversed(self.calls.values()))
        if call.alone or last.alone or call.is_async != last.is_async:
            return False
        limit = MAX_BESIDE if call.is_async else min(MAX_AHEAD, AHEAD_S / self.usual_s)
        return len(self.calls) < limit

    def take(self, call: Call) -> None:
        """Queues a call for this process; `flush` sends it."""
        call.started = time.monotonic() if call.is_async or not self.calls else 0.0
        self.calls[call.id] = call
        self.met_alone = False
        self.outbox += PING + call.frame if call.alone else call.frame

    def answered(self, call_id: int) -> Call | None:
        """Removes and returns the call that was answered; the clock of the next call starts."""
        call = self.calls.pop(call_id, None)
        if call is not None and not call.is_async:
            now = time.monotonic()
            self.usual_s += (now - call.started - self.usual_s) / 4
            if self.calls:
                next(iter(self.calls.values())).started = now
        return call

    def flush(self) -> None:
        if self.outbox and not self.is_writing:
            self.write_some()
            if self.outbox:
                self.is_writing = True
                self.selector.register(self.stdin, selectors.EVENT_WRITE, (self, self.write_some))

    def write_some(self) -> None:
        """Writes a part of the outbox; called while stdin accepts bytes."""
        try:
            del self.outbox[: os.write(self.stdin.fileno(), bytes(self.outbox[: 1 << 16]))]
        except BlockingIOError:
            return
        except OSError:
            self.outbox.clear()  # the process is dying; its stdout will end soon
        if self.is_writing and not self.outbox:
            self.is_writing = False
            self._forget(self.stdin)

    def read_stderr(self) -> None:
        with contextlib.suppress(BlockingIOError):
            data = os.read(self.stderr.fileno(), 1 << 16)
            self.tail += data
            del self.tail[:-TAIL_BYTES]
            if self.log is not None:
                self.line += data
                self.log.take(self.line, ended=not data)
            if not data:
                self._forget(self.stderr)

    def read_answers(self) -> None:
        with contextlib.suppress(BlockingIOError):
            data = os.read(self.stdout.fileno(), 1 << 18)
            self.inbox += data
            self.ended = self.ended or not data

    def _forget(self, stream: IO[bytes]) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self.selector.unregister(stream)

    def messages(self) -> list[dict[str, Any]]:
        """The complete frames that have arrived. Bytes that are not a frame end the process."""
        found: list[dict[str, Any]] = []
        while len(self.inbox) >= HEADER.size:
            (size,) = HEADER.unpack_from(self.inbox)
            if size > MAX_FRAME_BYTES:
                self.ended = True
            if (self.ended and size > MAX_FRAME_BYTES) or len(self.inbox) < HEADER.size + size:
                break
            try:
                message = json.loads(self.inbox[HEADER.size : HEADER.size + size])
            except ValueError:
                message = None
            del self.inbox[: HEADER.size + size]
            if not isinstance(message, dict):
                self.ended = True
                break
            found.append(message)
        return found

    def kill(self) -> str:
        """Kills and reaps the process and its session; how it ended, and the last of its stderr."""
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        self.read_stderr()
        if self.log is not None:
            self.log.take(self.line, ended=True)
        for stream in (self.stdin, self.stdout, self.stderr):
            self._forget(stream)
            with contextlib.suppress(OSError):
                stream.close()
        code = self.process.returncode
        how = f"exit {code}"
        with contextlib.suppress(ValueError, TypeError):
            how = signal.Signals(-(code or 0)).name
        said = self.tail.decode(errors="replace").strip().splitlines()
        return f"{how}: {' | '.join(said[-4:])[:500]}" if said else how
