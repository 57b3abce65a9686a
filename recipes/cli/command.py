"""How every command begins and ends: its streams, its limits, a fault as one safe line, its exit code."""

from __future__ import annotations

import atexit
import os
import resource
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, cast

from rl.report.safe_stream import say, settle
from rl.store.durable import with_remedy
from rl.store.redact import safe_text

OPEN_FILES = 256
"""Descriptors that a run may need: graders have four each, vLLM and datasets some dozens."""
OPEN_FILES_MOST = 65_536
# `python -m recipes.grpo` would take ./recipes.py of the working directory for ours. The imports of a program
# take seconds, in which its launcher may be killed.
BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv.pop(1)); from importlib import import_module; "
    "from rl.phases import stop_with_launcher; stop_with_launcher(); "
    "from recipes.cli.command import leave; "
    "program = import_module(sys.argv.pop(1)); leave(program.main(sys.argv[1:]))"
)


def run_command(work: Callable[[], int], *, in_words: Callable[[str], str] = str) -> int:
    """The exit code of `work`; 1 for a fault, which is said on stderr without secrets and escape sequences.

    What a user can mend is one sentence; anything else comes with its traceback. Standard output that is
    closed or full changes no exit code. COHORT_DEBUG=1 lets faults through.

    Args:
        in_words: puts a sentence of the library into the words of this command.
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
    """Ends this process as `sys.exit(code)` does, except for the destructors of libraries.

    Those of threads in C++ abort the process now and then after all is done ("terminate called without an
    active exception", exit code 134: seen with TRL and datasets loaded).
    """
    cast(Any, threading)._shutdown()  # joins threads that are not daemons
    cast(Any, atexit)._run_exitfuncs()
    settle()
    os._exit(code)


def say_fault(text: str) -> None:
    say(f"cohort: {safe_text(text)}", sys.stderr)


def raise_open_files() -> None:
    """Raises the soft limit of open files to the hard one.

    Raises:
        ValueError: the hard limit is too low for a run.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES_MOST if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES_MOST)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < OPEN_FILES:
        raise ValueError(
            f"this process may have {most} files open (ulimit -n), and a run needs up to {OPEN_FILES}; raise "
            "the limit before the start: ulimit -n 4096, or LimitNOFILE=4096 in a systemd unit"
        )


def _open_standard_streams() -> None:
    """Where a descriptor below 3 is closed, the next file opened would get it, and with it others' output."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
