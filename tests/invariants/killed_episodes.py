"""Runs, kills between turns, and resumes whole runs with an environment, each in a fork of this process.

`python killed_episodes.py OUT NAME=CONFIG:SIGNAL:APPEND ...`: the run gets the signal once its journal has
been appended to for the APPEND-th time; 0: never. OUT/NAME.json: exit codes, and answers in the journal then.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

from killed_runs import PR_SET_CHILD_SUBREAPER, in_forks

import recipes.grpo
from recipes.environments.journal import FileJournal


def run(config: str, folder: Path, number: int, nth: int) -> int:
    os.environ["CALLS"] = str(folder)
    original, appended, answered = FileJournal.append, 0, 0

    def append(self, entries):
        nonlocal appended, answered
        original(self, entries)
        appended += 1
        answered += sum("reply" in entry for entry in entries)
        if appended == nth:
            Path(f"{folder}.answered").write_text(str(answered))
            calls = Path(f"{folder}.calls")
            Path(f"{folder}.before").write_text(calls.read_text() if calls.exists() else "")
            os.kill(os.getpid(), number)

    FileJournal.append = append
    options = f"environment.options.file={folder}.calls"
    return recipes.grpo.main([config, f"run_dir={folder}", options])


def main(out: str, *runs: str) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    for one in runs:
        name, _, how = one.partition("=")
        config, kind, nth = how.split(":")
        folder, number = Path(out) / name, int(getattr(signal, kind))
        codes = in_forks(lambda _, c=config, f=folder, s=number, n=nth: run(c, f, s, int(n)))[0]
        if int(nth):
            codes += in_forks(lambda _, c=config, f=folder: run(c, f, 0, 0))[0]
        Path(f"{folder}.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(*sys.argv[1:])
