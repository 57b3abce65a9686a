"""Runs source code as a script: as `__main__`, with stdin, stdout, threads, exit handlers, an exit status."""

from __future__ import annotations

import _thread
import atexit
import builtins
import contextlib
import sys
import threading
import types
from typing import Any, cast

SPECIAL_FILES = {"/dev/stdin": 0, "/dev/fd/0": 0, "/proc/self/fd/0": 0, "/dev/stdout": 1, "/dev/stderr": 2}
NUM_OWN_EXIT_HANDLERS = atexit._ncallbacks()  # pyright: ignore[reportAttributeAccessIssue]
_open = builtins.open


def open_special(file: Any, *arguments: Any, **keywords: Any) -> Any:
    """`open` that finds the standard streams by descriptor, because a confined process opens no path."""
    if type(file) is str and file in SPECIAL_FILES:
        file = SPECIAL_FILES[file]
        keywords["closefd"] = False
    return _open(file, *arguments, **keywords)


def module_named(name: str) -> types.ModuleType:
    """A fresh module registered under its name, where `dataclasses` and `typing` look it up."""
    module = types.ModuleType(name)
    module.__dict__["__builtins__"] = builtins
    sys.modules[name] = module
    return module


def report_exception() -> None:
    with contextlib.suppress(BaseException):
        sys.excepthook(*sys.exc_info())  # pyright: ignore[reportArgumentType]


def main(source: bytes) -> int:
    """Runs `source`; returns 0, 1 after an exception, or the status given to `sys.exit`."""
    builtins.open = open_special
    module, status = module_named("__main__"), 0
    try:
        exec(compile(source, "<solution>", "exec", dont_inherit=True), module.__dict__)
    except SystemExit as leaving:
        code = 0 if leaving.code is None else leaving.code
        status = code & 0xFF if isinstance(code, int) else 1
        if not isinstance(code, int):
            print(code, file=sys.stderr)
    except BaseException:
        report_exception()
        status = 1
    try:
        if _thread._count():
            threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
        if atexit._ncallbacks() != NUM_OWN_EXIT_HANDLERS:  # pyright: ignore[reportAttributeAccessIssue]
            atexit._run_exitfuncs()
        if not sys.stdout.closed:
            sys.stdout.flush()
        module.__dict__.clear()  # this flushes files that the program left open
        if not cast(Any, sys.__stdout__).closed:
            cast(Any, sys.__stdout__).flush()
    except BaseException:
        report_exception()
        status = status or 120  # as the interpreter does when it cannot flush
    with contextlib.suppress(BaseException):
        sys.stderr.flush()
    return status
