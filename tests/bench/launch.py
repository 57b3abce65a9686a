"""Runs of other modules: their output in a file, and none a second time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def launch(log: Path, module: str, arguments: Sequence[str], timeout_s: float | None = None) -> int:
    """The exit status of `python -m module`, whose output is added to `log`.

    Raises:
        subprocess.TimeoutExpired: it was killed after `timeout_s`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as sink:
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            stdout=sink,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        ).returncode


def last_lines(log: Path) -> str:
    return f"the last lines of {log}:\n" + "\n".join(log.read_text().splitlines()[-15:])


def launch_or_exit(log: Path, module: str, arguments: Sequence[str], timeout_s: float | None = None) -> None:
    """`launch`, and the end of this program if it fails."""
    if code := launch(log, module, arguments, timeout_s):
        sys.exit(f"{module} ended with {code}; {last_lines(log)}")


def once(folder: Path, settings: Sequence[str], work: Callable[[], None]) -> None:
    """Does the work whose result `folder` is, unless it is there with the same settings; what is there of
    another is removed.
    """
    mark, text = folder.with_suffix(".done"), "\n".join(settings)
    if mark.exists() and mark.read_text() == text:
        return
    mark.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    work()
    mark.write_text(text)
