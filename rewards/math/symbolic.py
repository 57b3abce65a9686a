"""The owner of the sympy process: starts it on first use, asks it, kills it when late, ends it at exit.

Threads share one process behind a lock. Every wait has a bound, and no signal is used.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import selectors
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rewards.math.tree import MathError

START_TIMEOUT_S = 30.0
LOCK_TIMEOUT_S = 60.0
PATIENCE = 5  # times the limit by the clock, while the process has worked for less
MAX_CHARS = 300
MAX_TRIES_OF_A_GOLD, MAX_SLOW_GOLDS = 2, 10_000  # a gold that is too slow twice is not asked about again
_WORKER = Path(__file__).with_name("symbolic_worker.py")
_HARMLESS = re.compile(r"[A-Za-z0-9\\{}()\[\]|<>=+\-*/^_,.;:!'&%~\s]*")
_LARGE = re.compile(r"\d{13}|\^\{?[^{}]{0,9}\^\{?[^{}]{0,9}\^|\d{4}\s*!|!\s*!|__")


class SymbolicTimeout(MathError):
    """Sympy took too long. `on_gold` is True if it had not yet read the gold."""

    def __init__(self, timeout_s: float, *, on_gold: bool) -> None:
        super().__init__(f"sympy took longer than {timeout_s} s")
        self.on_gold = on_gold


class SymbolicFault(MathError):
    """The process did not start, died twice on a question, or stayed busy: no fault of the prediction."""


def is_askable(text: str) -> bool:
    """Whether a text is small and simple enough for sympy."""
    if len(text) > MAX_CHARS or text.count("{") > 60 or not _HARMLESS.fullmatch(text):
        return False
    return _LARGE.search(text) is None


class SymbolicWorker:
    """One sympy process at a time, started at the first question."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._is_ready = False
        self._slow_golds: Counter[str] = Counter()

    def equal(self, gold: str, prediction: str, timeout_s: float) -> bool | None:
        """Whether sympy finds two LaTeX texts equal; None if it cannot read one of them.

        Raises:
            SymbolicTimeout: no verdict within `timeout_s` of its work; it is killed and later replaced.
            SymbolicFault: see its docstring.
        """
        if self._slow_golds[gold] >= MAX_TRIES_OF_A_GOLD:
            raise SymbolicTimeout(timeout_s, on_gold=True)
        if not self._lock.acquire(timeout=LOCK_TIMEOUT_S):
            raise SymbolicFault(f"the sympy process stayed busy for {LOCK_TIMEOUT_S} s")
        try:
            for _ in range(2):
                verdict = self._ask(gold, prediction, timeout_s)
                if "equal" in verdict:
                    return verdict["equal"]
                self.close()  # its pipe has ended, though it may not have been reaped yet
            raise SymbolicFault("the sympy process died twice on one question")
        finally:
            self._lock.release()

    def close(self) -> None:
        """Ends the process. Safe to call twice; a later question starts another."""
        process, self._process, self._buffer, self._is_ready = self._process, None, b"", False
        if process is None:
            return
        process.kill()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _ask(self, gold: str, prediction: str, timeout_s: float) -> dict[str, Any]:
        """The verdict; {} if the process died while it worked on the question."""
        if not self.is_running:
            self._spawn()
        process = self._process
        assert process is not None and process.stdin is not None
        if not self._is_ready:
            self._is_ready = bool((self._receive(time.monotonic() + START_TIMEOUT_S) or {}).get("ready"))
            if not self._is_ready:
                self.close()
                raise SymbolicFault(f"the sympy process was not ready within {START_TIMEOUT_S} s")
        try:
            process.stdin.write(json.dumps({"gold": gold, "prediction": prediction}).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            return {}
        deadline, read_gold = time.monotonic() + timeout_s, False
        last, enough_s = time.monotonic() + PATIENCE * timeout_s, _work_s(process.pid) + timeout_s
        while True:
            message, now = self._receive(deadline), time.monotonic()
            if message is None and now < last and (left_s := enough_s - _work_s(process.pid)) > 0:
                deadline = min(now + left_s, last)  # it waits for a processor
            elif message is None:
                self._spawn()  # so that the next question waits for less of the start
                if not read_gold and len(self._slow_golds) < MAX_SLOW_GOLDS:
                    self._slow_golds[gold] += 1
                raise SymbolicTimeout(timeout_s, on_gold=not read_gold)
            elif "read" not in message:
                return message
            else:
                read_gold = True

    def _spawn(self) -> None:
        self.close()
        kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PATH", "HOME") if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**kept, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
            start_new_session=True,  # Ctrl-C is the trainer's
        )

    def _receive(self, deadline: float) -> dict[str, Any] | None:
        """One message; {} if the process has ended, None at the deadline."""
        process = self._process
        assert process is not None and process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    return None
                chunk = os.read(process.stdout.fileno(), 65536)
                if not chunk:
                    return {}
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)


def _work_s(pid: int) -> float:
    """CPU seconds of a process so far; infinity where only the clock can tell, as outside Linux."""
    try:
        return time.clock_gettime((~pid << 3) | 2)  # as clock_getcpuclockid(3) counts them
    except OSError:
        return float("inf")


worker = SymbolicWorker()
atexit.register(worker.close)


def _forget() -> None:
    """Resets a forked child, which shares the pipe and may hold a lock that nobody will release."""
    worker._lock, worker._process, worker._buffer, worker._is_ready = threading.Lock(), None, b"", False


os.register_at_fork(after_in_child=_forget)
