"""What the run is doing now, how long each phase of a step took, and whether somebody asked it to stop."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

ASKS_TO_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1
REPEAT_S = 1.0
SETTLE_S = 0.05
PATIENCE_S = 5.0
SHOWN = {
    "sample": "sampling",
    "score": "graders",
    "pack": "packing",
    "train": "training",
    "sync": "the weight sync",
    "save": "the checkpoint",
    "eval": "held-out evaluation",
}


class Phases:
    """Times the phases of a step and shows the current one: `with phases("sample"): ...`."""

    def __init__(self, show: Callable[[str], AbstractContextManager[Any]]) -> None:
        self.show = show
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            with self.show(SHOWN[name]):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began

    def take(self) -> dict[str, float]:
        """Seconds per phase since the last call, as metrics `time/<name>`."""
        taken, self.seconds = self.seconds, {}
        return {f"time/{name}": seconds for name, seconds in taken.items()}


class StopSignal:
    """SIGTERM, SIGINT and SIGUSR1 ask the run to save and stop at the next safe point. The same signal again,
    at least `REPEAT_S` later, ends it at once.

    A launcher may add a SIGTERM to the SIGINT that a terminal sent to all processes: that is one request.
    So is a signal repeated at once: the kernel sends one for every thread of a launcher that dies.
    Handlers run only when torch returns from a long call, so a thread notes the time of arrival and tells
    the user by `say`. All processes stop at the same step: `any_process` combines their requests.

    Args:
        may_exit: if the second signal has not ended the program within `PATIENCE_S`, the thread ends it. That
            is like a kill: the run folder holds what is needed to resume.
    """

    def __init__(self, *, may_exit: bool = False) -> None:
        self.received: int | None = None
        self.say: Callable[[str], None] = lambda text: None
        self._may_exit = may_exit
        self._is_again = False
        self.any_process: Callable[[bool], bool] = bool
        self._previous: dict[int, Any] = {}
        self._sockets: tuple[socket.socket, ...] = ()
        self._previous_fd = -1

    def install(self) -> StopSignal:
        reader, writer = self._sockets = socket.socketpair()
        writer.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._note_arrivals, args=(reader,), name="signals", daemon=True).start()
        for number in ASKS_TO_STOP:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def restore(self) -> None:
        self._restore_handlers()
        if self._sockets:
            signal.set_wakeup_fd(self._previous_fd)
            self._sockets[1].close()  # the thread reads end of file and returns
            self._sockets = ()

    def _restore_handlers(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """The first signal, even one that has come, ends the run within the block: it has nothing to save."""
        self._is_again = True
        if self.received is not None:
            self._handle(self.received, None)
        try:
            yield
        finally:
            self._is_again = False

    def requested(self) -> bool:
        """Whether any process was asked to stop; call it equally often on all of them."""
        return self.any_process(self.received is not None)

    def exit_code(self) -> int:
        """128 + the signal, as shells and schedulers expect; 0 if there was none."""
        return 0 if self.received is None else 128 + self.received

    def _handle(self, number: int, frame: Any) -> None:
        if self.received is None:
            self.received = number
        elif self.received == number and not self._is_again:
            time.sleep(SETTLE_S)  # lets the thread note the arrival
        if self._is_again:  # even if both came during one long call, after which this handler runs once
            self._restore_handlers()
            signal.raise_signal(number)

    def _note_arrivals(self, reader: socket.socket) -> None:
        first, since = 0, 0.0
        with reader:
            while True:
                try:
                    byte = reader.recv(1)
                except TimeoutError:
                    self.say("stopped at once; the same command goes on from the newest checkpoint")
                    os._exit(128 + first)
                if not byte:
                    return
                number, now = byte[0], time.monotonic()
                if not first and number in ASKS_TO_STOP:
                    first, since = number, now
                    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
                    if self._previous and not self._is_again:  # and no handler ended the run meanwhile
                        self.say(f"stopping after this step; {name} again stops at once")
                elif number == first and now - since >= REPEAT_S:
                    self._is_again = True
                    reader.settimeout(PATIENCE_S if self._may_exit else None)


def stop_with_launcher() -> None:
    """Asks the kernel to send SIGTERM to this process when its launcher ends, however it ends (Linux only).

    `accelerate launch` ends on a SIGTERM without passing it on, which would leave an orphan that trains on.
    """
    launcher = os.environ.get("COHORT_LAUNCHED")
    launched = launcher is not None or "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if launcher is not None and os.getppid() != int(launcher):  # it ended before the call of prctl
            signal.raise_signal(signal.SIGTERM)
