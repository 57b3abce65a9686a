"""Grader processes. Deadlines are enforced from outside; a stuck or dying process is killed and replaced.

One thread owns the processes and moves all bytes. A call goes to an idle process; calls to async functions
share one. The answer is a dict with `items`, or with `fault` ("timeout", "crash", ...) and `detail`. A future
always gets an answer and never raises.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from rewards.pool.grader import Call, Grader, worker_path
from rewards.pool.log import GraderLog
from rewards.pool.worker import PING_ID, encode_frame

START_S = 120.0
GRACE_S = 1.0
LOOK_S = 0.05
MAX_FAILED_STARTS = 3


class Graders:
    """`num_processes` processes that load the same rewards. They end with `close` or with the program.

    Their output goes to the file `log`.
    """

    def __init__(self, hello: Mapping[str, Any], num_processes: int, log: Path | None = None) -> None:
        self._log = None if log is None else GraderLog(log)
        self._hello, self._path, self._num_processes = encode_frame(hello), worker_path(), num_processes
        self._waiting: deque[Call] = deque()
        self._waiting_async: deque[Call] = deque()
        self._graders: list[Grader] = []
        self._selector = selectors.DefaultSelector()
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        self._lock = threading.Lock()
        self._first: Future[dict[str, Any]] = Future()
        self._failed_starts, self._next_id, self._looked = 0, 0, 0.0
        self._closing, self._why_ended = False, ""
        self._owner = os.getpid()
        self._thread = threading.Thread(target=self._run, name="graders", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def loaded(self) -> list[dict[str, Any]]:
        """One description per reward, from the first process to load them. Waits at most `START_S`.

        Raises:
            ValueError: a reward cannot be found, imported or configured.
            RuntimeError: no process could be started in time.
        """
        try:
            answer = self._first.result(timeout=START_S + 5)
        except TimeoutError:
            raise RuntimeError(f"waited {START_S:g} s for a grader process to load its rewards") from None
        if "error" in answer:
            raise ValueError(answer["error"])
        if "detail" in answer:
            raise RuntimeError(answer["detail"])
        return answer["rewards"]

    def submit(
        self, message: Mapping[str, Any], *, deadline_s: float, is_async: bool
    ) -> Future[dict[str, Any]]:
        """Queues one call. Its deadline counts from the moment that a process starts on it.

        Raises:
            TypeError, ValueError: the message holds something that is not a JSON value.
        """
        with self._lock:
            self._next_id += 1
            call_id = self._next_id
        call = Call(call_id, encode_frame({"id": call_id, **message}), deadline_s, is_async)
        queue = self._waiting_async if is_async else self._waiting
        with self._lock:
            was_empty = not queue
            if not self._why_ended:
                queue.append(call)
        if self._why_ended:
            call.fail("crash", self._why_ended)
        elif was_empty:  # otherwise the thread knows of the queue, and an answer will wake it
            self._wake()
        return call.future

    def pids(self) -> list[int]:
        """Process ids of the living graders."""
        return [grader.process.pid for grader in list(self._graders)]

    def close(self) -> None:
        """Kills all processes; calls in flight end with a fault. Safe to call twice and in a fork."""
        if os.getpid() != self._owner:
            return
        self._closing = True
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=10)
        atexit.unregister(self.close)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # a full pipe wakes it anyway; a closed one has no reader
            self._wake_sender.send(b"x")

    def _run(self) -> None:
        self._selector.register(self._wake_receiver, selectors.EVENT_READ, None)
        why = "the reward pool is closed"
        try:
            while not self._closing:
                self._start_missing()
                self._dispatch()
                for key, _ in self._selector.select(self._next_look()):
                    if key.data is None:
                        self._wake_receiver.recv(4096)
                    elif key.data[0] in self._graders:
                        key.data[1]()
                self._receive_all()
                self._end_late()
            why = self._why_ended or why
        except Exception as error:
            why = f"the thread of the graders failed: {type(error).__name__}: {error}"
            raise
        finally:
            self._shut(why)

    def _shut(self, why: str) -> None:
        with self._lock:
            self._why_ended = why
            left = [*self._waiting, *self._waiting_async]
        left += [call for grader in self._graders for call in grader.calls.values()]
        for call in left:
            call.fail("crash", why)
        if not self._first.done():
            self._first.set_result({"detail": why})
        for grader in list(self._graders):
            self._kill(grader)
        self._selector.close()
        self._wake_receiver.close()
        self._wake_sender.close()

    def _start_missing(self) -> None:
        while len(self._graders) < self._num_processes:
            try:
                self._graders.append(Grader(self._path, self._hello, self._selector, self._log))
            except OSError as error:  # out of memory, processes or descriptors, which may pass
                return self._count_failed_start(str(error))

    def _dispatch(self) -> None:
        """Gives waiting calls, in order, to the least busy process. Async calls join busy processes only
        while no other call waits.
        """
        for queue in (self._waiting, self._waiting_async):
            while queue:
                free = [grader for grader in self._graders if grader.has_room_for(queue[0])]
                grader = min(free, key=lambda grader: len(grader.calls), default=None)
                if grader is None or (queue is self._waiting_async and self._waiting and grader.calls):
                    break
                with self._lock:
                    call = queue.popleft()
                grader.take(call)
        for grader in self._graders:
            grader.flush()

    def _receive_all(self) -> None:
        for grader in list(self._graders):
            for message in grader.messages():
                self._receive(grader, message)
            if grader.ended:
                self._bury(grader)

    def _receive(self, grader: Grader, message: dict[str, Any]) -> None:
        if message.get("id") == 0:
            grader.ready = "error" not in message
            if not self._first.done():
                self._first.set_result(message)
            if grader.ready:
                self._failed_starts = 0
            else:
                grader.tail += f"\n{message['error']}".encode()
        elif message.get("id") == PING_ID:
            grader.met_alone = True
        elif (call := grader.answered(message.get("id", -1))) is not None:
            call.answer(message)

    def _bury(self, grader: Grader) -> None:
        """Handles a process that died by itself. Calls that it was grading are retried once, each alone. A
        call that was already alone is at fault, unless the process died before receiving it, which is
        accepted once per process. Calls that waited for their turn go back to the queue.
        """
        how = self._kill(grader)
        if not grader.ready:
            self._count_failed_start(how)
        for call in reversed(grader.calls.values()):
            if call.alone and (grader.met_alone or call.lost == self._num_processes):
                call.fail("crash", f"the grader died ({how})")
                continue
            call.lost += call.alone
            call.alone = call.alone or call.started > 0
            with self._lock:
                self._waiting.appendleft(call)

    def _count_failed_start(self, how: str) -> None:
        self._failed_starts += 1
        if self._failed_starts == MAX_FAILED_STARTS:
            self._why_ended, self._closing = f"grader processes do not start ({how})", True

    def _kill(self, grader: Grader) -> str:
        self._graders.remove(grader)
        return grader.kill()

    def _next_look(self) -> float:
        """Seconds to wait for bytes: to the next deadline, at most 0.25 while a process is busy, else 5."""
        running = [call for g in self._graders for call in g.calls.values() if call.started]
        ends = [call.started + call.deadline_s for call in running]
        ends += [grader.born + START_S for grader in self._graders if not grader.ready]
        return max(LOOK_S, min([end - time.monotonic() for end in ends] + [0.25 if ends else 5.0]))

    def _end_late(self) -> None:
        """Kills processes past a deadline; notices a dead process whose children keep its pipes open."""
        now = time.monotonic()
        if now < self._looked + LOOK_S:
            return
        self._looked = now
        for grader in list(self._graders):
            running = [call for call in grader.calls.values() if call.started]
            late = [c for c in running if now - c.started > c.deadline_s + GRACE_S * c.is_async]
            if late:
                self._kill(grader)
                for call in late:
                    if len(running) == 1:
                        call.fail("timeout", f"no answer within {call.deadline_s:g} s; the grader was killed")
                    call.alone = True  # of several, only a retry alone shows which one blocked
                again = [call for call in reversed(grader.calls.values()) if not call.future.done()]
                with self._lock:
                    for call in again:
                        beside = call.is_async and not call.alone
                        (self._waiting_async if beside else self._waiting).appendleft(call)
            elif not grader.ready and now - grader.born > START_S:
                self._bury(grader)
            elif grader.process.poll() is not None:
                grader.read_answers()
                for message in grader.messages():
                    self._receive(grader, message)
                self._bury(grader)
