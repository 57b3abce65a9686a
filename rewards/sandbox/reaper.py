"""How the zygote waits for its children and ends them."""

from __future__ import annotations

import _signal  # pyright: ignore[reportMissingImports]
import os
import signal
import socket
import time
from typing import Any

AGAIN, LAST = b"+", b"-"  # a judge is done and serves on, or ends


class Servant:
    """A judging process as the zygote sees it."""

    def __init__(self, pid: int, control: socket.socket) -> None:
        self.pid = pid
        self.socket = control
        self.alive = True

    def wait(self, deadline: float) -> dict[str, Any]:
        """Waits for its verdict, its death or the deadline, whichever is first."""
        self.socket.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            message = self.socket.recv(1)
        except TimeoutError:
            message = b""
        if message == AGAIN:
            return {"status": 0, "killed": False, "cpu_s": 0.0, "max_rss_kib": 0}
        self.alive = False
        self.socket.close()
        late = not message and time.monotonic() >= deadline
        ended = kill(self.pid) if late else wait_for(self.pid, deadline)
        return {**ended, "killed": False} if message else ended


def wait_for(pid: int, deadline: float) -> dict[str, Any]:
    """Waits until a process ends, or kills it at the deadline; returns how it ended."""
    while True:
        remaining = deadline - time.monotonic()
        late = remaining <= 0 or _signal.sigtimedwait((signal.SIGCHLD,), remaining) is None
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return _ended(status, usage, killed=False)
        if late:
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
