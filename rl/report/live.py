"""Rebuilds the report of a run while it runs: `python -m rl.report.live RUN_DIR`, a process beside the run.

Training does not wait for it. It works until its standard input is closed or says "end", which happens when
the run ends, even by a kill. It then builds the report of the ended run once more.
"""

from __future__ import annotations

import math
import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from rl.report.report import write_report
from rl.report.shelf import Shelf

FIRST_S = 30.0  # a shorter run has its report at the end
LEAST_S = 30.0  # between two reports
READ_S = 5.0  # for reading new groups, in one report
LAST_S = 120.0  # likewise in the last report, for which the run and its other processes wait
SHARE = 0.1  # of a CPU core; the pauses between reports ensure it


class LiveReport:
    """Starts and ends the process that keeps the report of this run up to date."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._began = time.monotonic()
        self._child: subprocess.Popen[bytes] | None = None

    def tick(self) -> None:
        """Starts the process beside the run once the run has lasted long enough; never raises."""
        if self._child is not None or time.monotonic() - self._began < FIRST_S:
            return
        command = [sys.executable, "-m", "rl.report.live", str(self.run_dir.resolve())]
        null = subprocess.DEVNULL
        try:
            self._child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=null, stderr=null, start_new_session=True
            )
        except OSError:  # no memory or no process left: the report comes at the end
            self._began = math.inf

    def finish(self) -> Path:
        """Builds the last report, of the run as it stands, and returns its path."""
        if self._child is not None:
            try:
                self._child.communicate(b"end", LAST_S + READ_S)  # a fork may keep open what we close
            except subprocess.TimeoutExpired:
                self._child.kill()
            if self._child.wait() == 0:
                return self.run_dir / "report.html"
        return _last(Shelf(self.run_dir, self.run_dir / "report"))

    def close(self) -> None:
        """After a failed run, lets the process build its last page and end; nobody waits for it."""
        if self._child is not None and self._child.stdin is not None:
            with suppress(OSError, ValueError):  # it has ended, or was told already
                self._child.stdin.write(b"end")
                self._child.stdin.close()


def main(run_dir: Path) -> None:
    os.nice(10)
    shelf = Shelf(run_dir, run_dir / "report")
    pause, has_ended = LEAST_S, False
    while not has_ended:
        began = time.monotonic()
        write_report(shelf, run_dir / "report.html", seconds=READ_S, live_s=round(pause))
        pause = max(LEAST_S, (time.monotonic() - began) / SHARE)
        has_ended = bool(select.select([sys.stdin], [], [], pause)[0])
    _last(shelf)


def _last(shelf: Shelf) -> Path:
    return write_report(shelf, shelf.run_dir / "report.html", seconds=LAST_S)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
