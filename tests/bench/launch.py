"""Runs of other modules: their output in a file, and none a second time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil


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


def run_within(timeout_s: float, command: Sequence[str], log: Path, watch: Callable[[], object] = int) -> int:
    """The exit status of a command whose output goes to `log`; 124 after `timeout_s`, when all of its
    processes were killed: one that hangs would hold the GPU of what is measured next.

    Args:
        watch: is called five times a second; once it returns something true, all is killed and 0 returned.
    """
    end = time.monotonic() + timeout_s
    with log.open("w") as sink:
        process = psutil.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONUNBUFFERED": "1"}
        )
        while process.poll() is None:
            done = watch()
            time.sleep(0.2)
            if done or time.monotonic() > end:
                killed = [process, *process.children(recursive=True)]
                for one in killed:
                    with suppress(psutil.NoSuchProcess):
                        one.kill()
                process.wait()
                psutil.wait_procs(killed, timeout=30)  # each holds its memory on the GPU until it is gone
                return 0 if done else 124
        return process.wait()


def last_lines(log: Path) -> str:
    return f"the last lines of {log}:\n" + "\n".join(log.read_text().splitlines()[-15:])


def launch_or_exit(log: Path, module: str, arguments: Sequence[str], timeout_s: float | None = None) -> None:
    """`launch`, and the end of this program if it fails or takes too long."""
    try:
        code = launch(log, module, arguments, timeout_s)
    except subprocess.TimeoutExpired:
        sys.exit(f"{module} was ended after {timeout_s:g} s; {last_lines(log)}")
    if code:
        sys.exit(f"{module} ended with {code}; {last_lines(log)}")


def once(folder: Path, settings: Sequence[str], work: Callable[[], None], *, goes_on: bool = False) -> None:
    """Does the work whose result `folder` is, unless it is there with the same settings.

    What is there of other settings is removed; what is unfinished too, unless the work `goes_on` from it.
    """
    begun, done = folder.with_suffix(".begun"), folder.with_suffix(".done")
    text = "\n".join(settings)
    if _holds(done, text):
        return
    if not (goes_on and _holds(begun, text)):
        shutil.rmtree(folder, ignore_errors=True)
    done.unlink(missing_ok=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    begun.write_text(text)
    work()
    done.write_text(text)


def _holds(file: Path, text: str) -> bool:
    return file.exists() and file.read_text() == text
