"""How every command starts and ends: standard streams, limits, a fault as one safe line, the exit code."""

from __future__ import annotations

import argparse
import atexit
import os
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from subprocess import Popen
from typing import Any, NoReturn, cast

from rewards.score import take_flags_anywhere
from rl.phases import ASKS_TO_STOP
from rl.report.safe_stream import say, settle
from rl.store.durable import with_remedy
from rl.store.redact import safe_text

OPEN_FILES = 256
"""File descriptors that a run may need: four per grader, and some dozens for vLLM and datasets."""
OPEN_FILES_MOST = 65_536
# `python -m recipes.grpo` would import a ./recipes.py of the working directory. `stop_with_launcher` comes
# first, because the launcher may be killed during the seconds that a program's imports take.
BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv.pop(1)); from importlib import import_module; "
    "from rl.phases import stop_with_launcher; stop_with_launcher(); "
    "from recipes.cli.command import leave; "
    "program = import_module(sys.argv.pop(1)); leave(program.main(sys.argv[1:]))"
)


def run_command(work: Callable[[], int], *, in_words: Callable[[str], str] = str) -> int:
    """Returns the exit code of `work`, or 1 after a fault, whose message goes to stderr without secrets.

    A fault that the user can fix is one sentence; any other comes with its traceback. A closed or full
    standard output does not change the exit code. With COHORT_DEBUG=1, faults are raised.

    Args:
        in_words: rewrites a message of the library in this command's words.
    """
    _open_standard_streams()
    try:
        return work()
    except Exception as error:
        if os.environ.get("COHORT_DEBUG"):
            raise
        expected = isinstance(error, ValueError | RuntimeError | OSError)
        say_fault(in_words(with_remedy(error)) if expected else "".join(traceback.format_exception(error)))
        return 1
    finally:
        settle()


def leave(code: int) -> NoReturn:
    """Ends this process as `sys.exit(code)` does, but does not run the destructors of libraries.

    Destructors of C++ threads sometimes abort the process after all is done ("terminate called without an
    active exception", exit code 134). This was seen with TRL and datasets loaded.
    """
    cast(Any, threading)._shutdown()  # joins threads that are not daemons
    cast(Any, atexit)._run_exitfuncs()
    settle()
    os._exit(code)


def pass_signals_on(children: Sequence[Popen[Any]]) -> list[int]:
    """Passes signals that ask to stop on to the processes that `children` holds when they come; returns the
    signals that came, a list that grows.
    """
    heard: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        heard.append(number)
        for child in children:
            child.send_signal(number)

    for number in ASKS_TO_STOP:
        signal.signal(number, pass_on)
    return heard


def add_config(
    parser: argparse.ArgumentParser, *, such: str, example: str = "recipes/configs/quickstart.yaml"
) -> None:
    """Adds the arguments that name a config; key=value words may follow flags."""
    parser.add_argument("config", help=f"a YAML file, such as {example}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"such as {such}")
    take_flags_anywhere(parser)


def say_fault(text: str) -> None:
    say(f"cohort: {safe_text(text)}", sys.stderr)


def raise_open_files() -> None:
    """Raises the soft limit on open files to the hard one.

    Raises:
        ValueError: the hard limit is too low for a run.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES_MOST if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES_MOST)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < OPEN_FILES:
        raise ValueError(
            f"this process may open only {most} files (ulimit -n), but a run needs up to {OPEN_FILES}; raise "
            "the limit before the start: ulimit -n 4096, or LimitNOFILE=4096 in a systemd unit"
        )


def _open_standard_streams() -> None:
    """Opens closed standard streams on /dev/null: else the next opened file would receive their output."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
