"""The grader process: it reads calls and answers with scores. Only JSON frames cross, in both directions.

Its owner kills it when a call passes its deadline, so no signal or thread is needed here to stop a grader.
What graders print goes to stderr, and from there to `graders.log`. Calls to async functions run concurrently
on an event loop; all others run in the main thread, one at a time.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from rewards.functions import find_function
from rewards.plugins import RewardFunction, load_reward
from rewards.pool.calling import BadValue, TrainerState, arguments, check_length, to_reward

MAX_FRAME_BYTES = 1 << 28
MAX_TEXT = 2000
PING_ID = -1
HEADER = struct.Struct(">I")


_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def encode_frame(message: Mapping[str, Any]) -> bytes:
    """The length (4 bytes, big-endian), then JSON. NaN is refused, because scores must be finite."""
    body = _encode(message).encode()
    return HEADER.pack(len(body)) + body


def take_pipes(parent_pid: int) -> tuple[BinaryIO, int]:
    """Reserves stdin and stdout for frames; prints go to stderr. Returns (requests, answer descriptor)."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.dup(1)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    # Line by line: a killed process would lose a longer buffer.
    sys.stdout = os.fdopen(1, "w", 1, "utf-8", "backslashreplace", closefd=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with(parent_pid)
    return requests, answers


def main(parent_pid: int) -> None:
    """Serves frames from stdin until it ends. The first says what to load; its answer, what was loaded."""
    requests, answers = take_pipes(parent_pid)
    faulthandler.enable()
    hello = read_frame(requests)
    if hello is None:
        return
    server = Server(answers, hello["num_steps"])
    try:
        server.rewards = [_loaded(**spec) for spec in hello["specs"]]
    except Exception as error:
        server.send({"id": 0, "error": str(error)})
        return
    limit_memory(hello["memory_bytes"])
    server.send({"id": 0, "rewards": [reward.described() for reward in server.rewards]})
    while (call := read_frame(requests)) is not None:
        server.serve(call)


def _loaded(name: str, options: Mapping[str, Any], origin: Mapping[str, Any] | None) -> RewardFunction:
    return load_reward(name if origin is None else find_function(name, origin), options, name=name)


class Server:
    """Grades calls and writes the answers. Async functions share one event loop, in a thread of its own."""

    def __init__(self, answers: int, num_steps: int) -> None:
        self.answers, self.num_steps = answers, num_steps
        self.rewards: list[RewardFunction] = []
        self.lock = threading.Lock()
        self.loop: Any = None

    def send(self, message: Mapping[str, Any]) -> None:
        frame = memoryview(encode_frame(message))
        with self.lock:
            while frame:
                frame = frame[os.write(self.answers, frame) :]

    def serve(self, call: Mapping[str, Any]) -> None:
        if call["id"] == PING_ID:
            return self.send(call)
        reward = self.rewards[call["reward"]]
        if reward.is_async:
            self._serve_async(reward, call)
            return
        start = time.perf_counter()
        try:
            values = reward.fn(**_arguments(reward, call, self.num_steps))
            answer = _answer(reward.name, values, len(call["completions"]), start)
        except BaseException as error:  # also SystemExit: a grader may raise anything
            answer = _fault_of(error)
        self.send({"id": call["id"], **answer})
        if answer.get("fault") == "memory":
            os._exit(3)  # the heap is no longer fit to grade other samples

    def _serve_async(self, reward: RewardFunction, call: Mapping[str, Any]) -> None:
        import asyncio

        if self.loop is None:
            self.loop = asyncio.new_event_loop()
            threading.Thread(target=self.loop.run_forever, daemon=True).start()

        async def run() -> None:
            start = time.perf_counter()
            try:
                asked = reward.fn(**_arguments(reward, call, self.num_steps))
                values = await asyncio.wait_for(asked, call["deadline_s"])
                answer = _answer(reward.name, values, len(call["completions"]), start)
            except TimeoutError as error:
                late = time.perf_counter() - start >= call["deadline_s"]
                answer = {"fault": "timeout", "detail": _brief(error)} if late else _fault_of(error)
            except BaseException as error:
                answer = _fault_of(error)
            self.send({"id": call["id"], **answer})

        asyncio.run_coroutine_threadsafe(run(), self.loop)


def _arguments(reward: RewardFunction, call: Mapping[str, Any], num_steps: int) -> dict[str, Any]:
    n = len(call["completions"])
    columns = {name: [value] * n for name, value in call["columns"].items()}
    extras = {
        "trainer_state": TrainerState(call["step"], num_steps),
        "completion_facts": call["completion_facts"],
    }
    prompts, said, ids = [call["prompt"]] * n, call["completions"], call["completion_ids"]
    return arguments(reward, prompts, completions=said, completion_ids=ids, columns=columns, extras=extras)


def _answer(name: str, values: Any, num_completions: int, start: float) -> dict[str, Any]:
    items: list[dict[str, Any]] = []
    elapsed_ms = (time.perf_counter() - start) * 1000 / num_completions
    for value in check_length(name, values, num_completions):
        try:
            reward = to_reward(name, value)
        except BadValue as error:
            items.append({"fault": "bad_value", "detail": _brief(error)})
            continue
        items.append(
            {
                "score": reward.score,
                "reason": str(reward.reason),
                "detail": str(reward.detail)[:MAX_TEXT],
                "extracted": None if reward.extracted is None else str(reward.extracted)[:MAX_TEXT],
                "elapsed_ms": elapsed_ms,
                "turns": list(reward.turns),
            }
        )
    return {"items": items}


def _fault_of(error: BaseException) -> dict[str, str]:
    if isinstance(error, BadValue):
        return {"fault": "bad_value", "detail": _brief(error)}
    if isinstance(error, MemoryError):
        error.__traceback__ = None  # its frames hold what filled the memory; the answer needs some
        return {"fault": "memory", "detail": "the grader passed its memory limit"}
    return {"fault": "raised", "detail": f"{type(error).__name__}: {_brief(error)}{_place(error)}"}


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return ""
    return f" ({os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno})"


def _brief(error: BaseException) -> str:
    try:
        return str(error)[:500]
    except Exception:
        return "(its message cannot be shown)"


def read_frame(requests: Any) -> dict[str, Any] | None:
    header: Sequence[int] | bytes = requests.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    (size,) = HEADER.unpack(bytes(header))
    body = requests.read(size)
    return json.loads(body) if len(body) == size else None


def die_with(parent_pid: int) -> None:
    """Has the kernel kill this process when the thread that started it ends (Linux; else stdin ends)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent_pid:
        os._exit(0)


def limit_memory(memory_bytes: int) -> None:
    """Limits the address space to what is mapped now plus `memory_bytes`; disables core dumps."""
    import resource

    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = mapped + memory_bytes if hard < 0 else min(mapped + memory_bytes, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
