"""How the zygote waits for its children and ends them."""

from __future__ import annotations

import _signal  # pyright: ignore[reportMissingImports]
import os
import signal
import socket
import time
from typing import Any

AGAIN, LAST = b"+", b"-"  # a judge is done and serves on, or ends
SHARE = 0.2  # of a processor; a program that takes less of one sleeps


def own_seconds(cpu_s: float, elapsed_s: float) -> float:
    """What a program has used of its time: it is not to blame where it waits for a processor that others
    keep busy. So it is processor time, or, of a program that sleeps, the clock's.
    """
    return min(cpu_s, elapsed_s) if cpu_s >= SHARE * elapsed_s else elapsed_s


class Meter:
    """The own seconds of some processes together, of `limit_s`. At most `limit_s / SHARE` by the clock."""

    def __init__(self, limit_s: float, *pids: int) -> None:
        self.limit_s = limit_s
        self.cpu_s = {pid: (found := _cpu_s(pid), found) for pid in pids}  # at the start, and now
        self.began = time.monotonic()

    def left(self) -> float:
        """Seconds that are left for sure; none for processes that are late."""
        self.cpu_s = {pid: (first, max(last, _cpu_s(pid))) for pid, (first, last) in self.cpu_s.items()}
        used = sum(last - first for first, last in self.cpu_s.values())
        return self.limit_s - own_seconds(used, time.monotonic() - self.began)


def _cpu_s(pid: int) -> float:
    """Processor time of all threads of a process; 0 if it is gone (its clock's number is the kernel's)."""
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0


class Servant:
    """A judging process as the zygote sees it."""

    def __init__(self, pid: int, control: socket.socket) -> None:
        self.pid = pid
        self.socket = control
        self.alive = True

    def wait(self, meter: Meter) -> dict[str, Any]:
        """Waits for its verdict, its death or until time is up, whichever is first."""
        message, late = b"", False
        while not late:
            self.socket.settimeout(max(0.001, meter.left()))
            try:
                message = self.socket.recv(1)
                break
            except TimeoutError:
                late = meter.left() <= 0
        if message == AGAIN:
            return {"status": 0, "killed": False, "cpu_s": 0.0, "max_rss_kib": 0}
        self.alive = False
        self.socket.close()
        ended = kill(self.pid) if late else wait_for(self.pid, meter)
        return {**ended, "killed": False} if message else ended


def wait_for(pid: int, meter: Meter) -> dict[str, Any]:
    """Waits until a process ends, or kills it when time is up; returns how it ended."""
    while True:
        remaining = meter.left()
        if remaining > 0:
            _signal.sigtimedwait((signal.SIGCHLD,), max(0.001, remaining))
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return _ended(status, usage, killed=False)
        if remaining <= 0:
            return kill(pid)


def kill(pid: int) -> dict[str, Any]:
    """Ends a process and reaps it. `killed` is False if it had ended by itself."""
    done, status, usage = os.wait4(pid, os.WNOHANG)
    if done:
        return _ended(status, usage, killed=False)
    os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    return _ended(status, usage, killed=True)


def end_group(pgid: int) -> None:
    """Ends a process group and reaps it; its orphans are children of this process, which is a subreaper."""
    try:
        os.killpg(pgid, signal.SIGKILL)
        while True:
            os.waitpid(-pgid, 0)
    except (ProcessLookupError, ChildProcessError):
        return


def _ended(status: int, usage: Any, *, killed: bool) -> dict[str, Any]:
    cpu_s = usage.ru_utime + usage.ru_stime
    return {"status": status, "killed": killed, "cpu_s": cpu_s, "max_rss_kib": usage.ru_maxrss}
