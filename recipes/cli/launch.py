"""Starts the processes of a run on this machine, and ends them together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from tempfile import TemporaryFile
from typing import IO, Any

import torch

from recipes.cli.command import BOOT, pass_signals_on
from rl.phases import ASKS_TO_STOP
from rl.report.safe_stream import say
from rl.store.redact import safe_text
from rl.world import LOOPBACK, STORE_FD, listen_on_loopback, loopback_environment

Child = subprocess.Popen[Any]
PATIENCE_S = 15.0
ENDING_S = 600.0
POLL_S = 0.1


def launch(recipe: Sequence[str], num_processes: int, program: str = "recipes.grpo") -> int:
    """Runs `main` of `program` with the arguments `recipe` in several processes; returns one exit code.

    SIGTERM, SIGINT and SIGUSR1 are passed on; the run may take as long as its step needs to save and stop.
    When a process fails, the others would wait for it, so they are killed after `PATIENCE_S`. Only rank 0
    prints. If another rank fails first, its last lines are shown.
    """
    with ExitStack() as stack:
        meeting = stack.enter_context(listen_on_loopback())
        environment = _environment(num_processes, meeting.getsockname()[1])
        logs = [stack.enter_context(TemporaryFile("w+", errors="replace")) for _ in range(1, num_processes)]
        children: list[Child] = []
        words = [program, *recipe]
        stack.callback(_end, children)
        heard = pass_signals_on(children)
        for rank, log in enumerate([None, *logs]):
            own = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                STORE_FD: str(-1 if rank else meeting.fileno()),
            }
            children.append(_start(words, environment | own, log, () if rank else (meeting.fileno(),)))
        meeting.close()
        first_failed = _wait(children)
        _end(children)
        if first_failed >= 0 and -children[first_failed].returncode not in heard:
            killed = _killed(children[first_failed].returncode)
            said = _last_words(logs[first_failed - 1]) if first_failed else ""
            said = f":\n{safe_text(said)}" if said else ""
            if killed or said:
                say(f"process {first_failed} failed first{killed}{said}", sys.stderr)
    codes = [child.returncode for child in (*children[max(first_failed, 0) :], *children)]
    code = next(filter(None, codes), 0)
    return 128 - code if code < 0 else code


def _environment(num_processes: int, port: int) -> dict[str, str]:
    world = {
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "COHORT_LAUNCHED": str(os.getpid()),
    }
    if not torch.cuda.is_available():
        world["ACCELERATE_USE_CPU"] = "1"
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    return {"OMP_NUM_THREADS": str(threads), **loopback_environment(), **os.environ, **world}


def _start(
    recipe: Sequence[str], environment: dict[str, str], log: IO[str] | None, descriptors: Sequence[int]
) -> Child:
    # In a session of its own: Ctrl-C reaches only the launcher, which passes it on once.
    return subprocess.Popen(
        [sys.executable, "-P", "-c", BOOT, json.dumps(sys.path), *recipe],
        env=environment,
        stdout=log,
        stderr=log,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=descriptors,
    )


def _wait(children: Sequence[Child]) -> int:
    """Waits for all ranks to end and returns the one that failed first, or -1.

    A rank killed by a signal is blamed before ranks that only lost contact with it, which may end sooner.
    Once one rank has ended, the others have `ENDING_S` left, or `PATIENCE_S` if it failed.
    """
    well = {None, 0, *(128 + number for number in ASKS_TO_STOP)}
    failed: list[int] = []
    deadline = float("inf")
    while True:
        codes = [child.poll() for child in children]
        failed += [r for r, code in enumerate(codes) if code not in well and r not in failed]
        if None not in codes or time.monotonic() > deadline:
            break
        if any(code is not None for code in codes):
            deadline = min(deadline, time.monotonic() + (PATIENCE_S if failed else ENDING_S))
        time.sleep(POLL_S)
    return min(failed, key=lambda rank: children[rank].returncode > 0, default=-1)


def _end(children: Sequence[Child]) -> None:
    for child in children:
        child.kill()
        child.wait()


def _killed(code: int) -> str:
    """What is said of a process that a signal ended, which has no words of its own."""
    if code >= 0:
        return ""
    out_of_memory = "; the host's memory may have run out" if code == -signal.SIGKILL else ""
    return f" ({signal.strsignal(-code)}{out_of_memory})"


def _last_words(log: IO[str]) -> str:
    log.seek(0)
    lines = [line.rstrip() for line in log if line.strip()]
    return "\n".join([line for line in lines if line.startswith("cohort: ")] or lines[-20:])
