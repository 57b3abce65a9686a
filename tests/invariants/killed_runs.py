"""Runs, kills and resumes whole training runs, each in forks of this freshly imported process.

`python killed_runs.py CONFIG OUT [--processes=N] PHASE:ENTRY ...`: OUT/whole is undisturbed; in OUT/PHASE the
last process is killed with SIGKILL on entering PHASE for the ENTRY-th time, and then all are started again
with the same command; term-PHASE gets a SIGTERM instead. Writes OUT/report.json, exit codes of the last
process, and OUT/ends.json: those of all, and by how many seconds one outlived the first that ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import psutil
from torch.distributed import TCPStore

import recipes.grpo
from rl.phases import Phases

PR_SET_CHILD_SUBREAPER = 36
LAST_WAIT_S = 60.0
Ends = tuple[list[int], float]


def in_forks(work: Callable[[int], int], number: int = 1) -> Ends:
    """Exit codes of forks that do `work(rank)`, minus the signal that ended one, and the seconds between the
    first end and the last. What outlives the first by `LAST_WAIT_S` is killed.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = {fork(lambda rank=rank: work(rank), rank, number, store.port): rank for rank in range(number)}
    codes, first, pending = [0] * number, float("inf"), set(ranks)
    while pending:
        for pid in tuple(pending):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                pending.discard(pid)
                codes[ranks[pid]] = os.waitstatus_to_exitcode(status)
                first = min(first, time.monotonic())
            elif time.monotonic() - first > LAST_WAIT_S:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    last = time.monotonic()
    if left := survivors():
        raise RuntimeError(f"processes outlived their run (exit {codes}): {left}")
    return codes, last - first


def fork(work: Callable[[], int], rank: int, size: int, port: int) -> int:
    if pid := os.fork():
        return pid
    code = 99
    try:
        if size > 1:
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": size, "RANK": rank}
            own = {"LOCAL_RANK": rank, "TORCHELASTIC_USE_AGENT_STORE": True, "ACCELERATE_USE_CPU": 1}
            os.environ |= {name: str(value) for name, value in (shared | own).items()}
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def survivors(patience_s: float = 60.0) -> list[str]:
    """Command lines of what the forks left behind: orphans come to this process, a subreaper."""
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
    number = 1
    if kills and kills[0].startswith("--processes="):
        number, kills = int(kills[0].partition("=")[2]), kills[1:]
    ends: dict[str, list[Ends]] = {"whole": [in_forks(lambda rank: run(config, Path(out) / "whole"), number)]}
    for kill in kills:
        phase, _, nth = kill.partition(":")
        signal_number = signal.SIGTERM if phase.startswith("term-") else signal.SIGKILL

        def strike(
            name: str, entry: int, phase: str = phase, nth: str = nth, sent: int = signal_number
        ) -> None:
            if name == phase.removeprefix("term-") and entry == int(nth):
                os.kill(os.getpid(), sent)

        def struck(rank: int, phase: str = phase, strike: Callable[[str, int], None] = strike) -> int:
            return run(config, Path(out) / phase, strike if rank == number - 1 else None)

        first = in_forks(struck, number)
        ends[phase] = [first, in_forks(lambda rank, phase=phase: run(config, Path(out) / phase), number)]
    last = {name: [codes[-1] for codes, _ in found] for name, found in ends.items()}
    Path(out, "report.json").write_text(json.dumps(last))
    Path(out, "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main(*sys.argv[1:])
