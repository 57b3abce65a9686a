"""Runs, kills and resumes whole training runs, each in a fork of this freshly imported process.

`python killed_runs.py CONFIG OUT PHASE:ENTRY ...`: OUT/whole is undisturbed; OUT/PHASE is killed with SIGKILL
on entering PHASE for the ENTRY-th time and then started again with the same command; term-PHASE gets a
SIGTERM instead. Writes OUT/report.json.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

import recipes.grpo
from rl.phases import Phases

PR_SET_CHILD_SUBREAPER = 36


def in_fork(work: Callable[[], int]) -> int:
    """The exit code of a fork that does `work`; minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = work()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if left := survivors():
        raise RuntimeError(f"processes outlived their run (exit {code}): {left}")
    return code


def survivors(patience_s: float = 10.0) -> list[str]:
    """Command lines of what the fork left behind: orphans come to this process, a subreaper."""
    deadline = time.monotonic() + patience_s
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        children = psutil.Process().children(recursive=True)
        if not children or time.monotonic() > deadline:
            return [" ".join(child.cmdline()) for child in children]
        time.sleep(0.05)


def run(config: str, run_dir: Path, before_phase: Callable[[str, int], None] | None = None) -> int:
    entries: dict[str, int] = {}
    original = Phases.__call__

    def entering(self: Phases, name: str):
        entries[name] = entries.get(name, 0) + 1
        if before_phase is not None:
            before_phase(name, entries[name])
        return original(self, name)

    Phases.__call__ = entering
    return recipes.grpo.main([config, f"run_dir={run_dir}"])


def main(config: str, out: str, *kills: str) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    codes: dict[str, list[int]] = {"whole": [in_fork(lambda: run(config, Path(out) / "whole"))]}
    for kill in kills:
        phase, _, nth = kill.partition(":")
        number = signal.SIGTERM if phase.startswith("term-") else signal.SIGKILL

        def strike(name: str, entry: int, phase: str = phase, nth: str = nth, number: int = number) -> None:
            if name == phase.removeprefix("term-") and entry == int(nth):
                os.kill(os.getpid(), number)

        folder = Path(out) / phase
        first = in_fork(lambda folder=folder, strike=strike: run(config, folder, strike))
        codes[phase] = [first, in_fork(lambda folder=folder: run(config, folder))]
    Path(out, "report.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(*sys.argv[1:])
