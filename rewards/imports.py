"""Imports modules that a config names, and says where and why an import failed."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from importlib.abc import Loader
from traceback import extract_tb
from types import ModuleType
from typing import Any

OURS = frozenset({"recipes", "rewards", "rl", "rollout"})


def import_fault(name: str, error: BaseException) -> str:
    """Where and why the import of the module `name` failed: it is missing, or a line of a file raised."""
    if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
        where = "be installed, or lie in the working directory or beside the config file"
        return f"there is no module {error.name!r}; it must {where}"
    lines = [(f.filename, f.lineno) for f in extract_tb(error.__traceback__) if f.name == "<module>"]
    said = str(error)
    if isinstance(error, SyntaxError):
        lines, said = [(error.filename or "", error.lineno)], error.msg
    if isinstance(error, AttributeError) and not lines:  # of a module that was imported
        return said
    at = "{}, line {}: ".format(*lines[-1]) if lines else ""
    return f"importing {name} failed: {at}{type(error).__name__}: {said}"


def import_module(name: str) -> ModuleType:
    """The module that a config names. `./NAME.py` takes precedence, even over an installed module or a
    package of Cohort: the file is then loaded under a private name.

    Raises:
        ImportError: there is no such module, or a package of Cohort hides its folder.
    """
    if (file := _file_of_user(name)) is None:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            hidden = name.replace(".", "/") + ".py"
            if name.partition(".")[0] in OURS and os.path.exists(hidden):
                raise ImportError(f"a package of Cohort hides ./{hidden}; rename its folder") from None
            raise
    private = f"_cohort_{name}"
    if getattr(sys.modules.get(private), "__file__", None) == file:
        return sys.modules[private]
    return import_file(private, file)


def import_file(
    name: str, path: str, *, loader: Loader | None = None, within: AbstractContextManager[Any] | None = None
) -> ModuleType:
    """Imports a file as the module `name`, inside the context `within`; a failed one leaves no module."""
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        with within or nullcontext():
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _file_of_user(name: str) -> str | None:
    """`NAME.py` of the working directory, or a file of any `sys.path` folder that a package of ours hides;
    None where a plain import finds it.
    """
    folders = [os.getcwd(), *(sys.path if name in OURS else ())]
    files = (os.path.join(os.path.abspath(folder), f"{name}.py") for folder in folders)
    file = next(filter(os.path.isfile, files), None)
    try:
        spec = None if file is None else importlib.util.find_spec(name)
    except ValueError:  # a module that was put into sys.modules by hand
        spec = None
    return None if spec and spec.origin and file and os.path.samefile(spec.origin, file) else file
