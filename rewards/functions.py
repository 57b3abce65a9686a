"""How a grader process gets a reward function that a program passes as an object, not by name.

A function of a module is imported. For a function of a script, the script is imported by its path, up to the
line that calls `recipes.grpo.run`. A function of a notebook, of `python -c` or of standard input is sent as
source code. So are the imports, functions and plain values that it uses.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import linecache
import os
import re
import symtable
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.abc import InspectLoader, Loader
from operator import attrgetter
from types import FunctionType, ModuleType
from typing import Any

from rewards.compose import RewardSpec
from rewards.imports import import_fault, import_file
from rewards.plugins import BUILT_IN

Origin = dict[str, Any]
"""`function`, its `source`, and one of `module` (its name), `file` (with `package` and `argv`) and `text`."""
Origins = Mapping[str, Origin]
STARTER = "recipes.grpo"
PRIVATE = "cohort_program"
FUTURE = "from __future__ import annotations\n"
MAX_VALUE = 1 << 20  # characters of a value that is sent


class _Started(BaseException):
    """Ends the import of a script at its call that starts training."""


class _TextLoader(InspectLoader):
    def __init__(self, text: str) -> None:
        self.text = text

    def get_source(self, fullname: str) -> str:
        return self.text


def origin_of(name: str, fn: Any) -> Origin:
    """Where a grader process finds the reward function `fn`, which a program calls `name`.

    Raises:
        ValueError: no other process can get it: a closure, a lambda, a nested function, a configured object,
            or a function that uses a value that cannot be sent.
    """
    module, qualname = str(getattr(fn, "__module__", "")), getattr(fn, "__qualname__", "")
    if refusal := _refusal(fn, qualname):
        raise ValueError(
            f"reward {name!r} is {refusal}, which a grader process cannot get: define it with `def` at the "
            "top level of the script, notebook or module, and give its settings as options"
        )
    found = {"function": qualname, "source": _source(fn) or ""}
    main = sys.modules["__main__"]
    file, code = getattr(main, "__file__", None), getattr(inspect.unwrap(fn), "__code__", None)
    if module != "__main__":
        place = {"module": module}
    elif file and os.path.isfile(file) and (code is None or _same(code.co_filename, file)):
        place = {"file": os.path.abspath(file), "package": main.__package__ or "", "argv": sys.argv[1:]}
    else:
        parts: dict[str, str] = {}
        _collect(name, qualname, value=fn, program=vars(main), parts=parts)
        return found | {"text": FUTURE + "\n".join(parts.values())}
    if attrgetter(qualname)(sys.modules[module]) is not fn:
        raise ValueError(
            f"reward {name!r}: {qualname} of {place.get('file', module)} now names another function; "
            "give each function its own name"
        )
    return found | place


def name_functions(tree: dict[str, Any], origins: Origins) -> None:
    """Makes a program's functions the rewards of a config that lists no rewards, in place.

    Raises:
        ValueError: the config's list of rewards lacks a function, or a function has a built-in's name.
    """
    section = tree["rewards"] = tree.get("rewards") or {}
    specs = section.setdefault("functions", [{"name": name} for name in origins]) if origins else []
    named = [spec.get("name") for spec in specs if isinstance(spec, Mapping)]
    for name in origins:
        if name in BUILT_IN:
            raise ValueError(f"rewards={{{name!r}: ...}} is the name of a built-in reward; use another name")
        if name not in named:
            raise ValueError(
                f"rewards={{{name!r}: ...}} is not among rewards.functions of the config, {named}; add "
                f"{{name: {name}}} there, or leave the function out"
            )


def sources_of(specs: Iterable[RewardSpec]) -> dict[str, str]:
    """Maps the name of each reward that a program handed over to a hash of its source."""
    handed = {spec.name: spec.origin for spec in specs if spec.origin is not None}
    return {
        name: f"{len(at['source'])} {hashlib.sha256(at['source'].encode()).hexdigest()}"
        for name, at in handed.items()
    }


def find_function(name: str, origin: Mapping[str, Any]) -> Any:
    """The function that an `Origin` describes; finding it runs the program's own code.

    Raises:
        ValueError: the script or module cannot be imported, or has no such function at its top level.
    """
    where = origin.get("module") or origin.get("file") or "the source that was sent"
    try:
        found: Any = _load(name, origin)
    except BaseException as error:  # a script may raise anything, SystemExit too
        raise ValueError(
            f"reward {name!r}, for a grader process: {import_fault(where, error)}; put the statements that "
            'run the script under `if __name__ == "__main__":`'
        ) from error
    for attribute in origin["function"].split("."):
        if not hasattr(found, attribute):
            raise ValueError(
                f"reward {name!r}: {where} has no {attribute!r} once it is imported; define it at the top "
                'level, outside of `if __name__ == "__main__":`'
            )
        found = getattr(found, attribute)
    return found


def _import_program(name: str, path: str, loader: Loader | None = None) -> ModuleType:
    """Imports a file as a module under a private name, up to its call of `run`."""
    if name in sys.modules:
        return sys.modules[name]
    return import_file(name, path, loader=loader, within=_starter_ends_it())


def _load(name: str, origin: Mapping[str, Any]) -> ModuleType:
    if "module" in origin:
        return importlib.import_module(origin["module"])
    if "text" in origin:
        loader = _TextLoader(origin["text"])
        return _import_program(f"{PRIVATE}_{name}".replace(".", "_"), f"<{name}>", loader)
    sys.argv[:] = [origin["file"], *origin["argv"]]
    return _import_program(f"{origin['package']}.{PRIVATE}".lstrip("."), origin["file"])


@contextmanager
def _starter_ends_it() -> Iterator[None]:
    """Within the block, a call into `STARTER` raises `_Started`; the real one would load torch."""

    def ends(*_: Any, **__: Any) -> None:
        raise _Started

    def attribute(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return ends

    stand_in = ModuleType(STARTER)
    stand_in.__getattr__ = attribute  # type: ignore[method-assign]
    parent, _, leaf = STARTER.rpartition(".")
    package = importlib.import_module(parent)
    before = sys.modules.get(STARTER, stand_in)
    sys.modules[STARTER] = stand_in
    setattr(package, leaf, stand_in)
    try:
        with suppress(_Started):
            yield
    finally:
        sys.modules[STARTER] = before
        setattr(package, leaf, before)


def _refusal(fn: Any, qualname: str) -> str:
    """Why no other process can get a function; "" if one can."""
    if not callable(fn) or not qualname or getattr(fn, "__self__", None) is not None:
        return f"a configured object ({type(fn).__name__})"
    if qualname.endswith("<lambda>"):
        return "a lambda"
    if "<" not in qualname:
        return ""
    cells = getattr(getattr(fn, "__code__", None), "co_freevars", ())
    return f"a closure over {', '.join(cells)}" if cells else "a nested function"


def _source(thing: Any) -> str | None:
    """The source of a function or class, if it can be found."""
    file = getattr(getattr(inspect.unwrap(thing), "__code__", None), "co_filename", "")
    if file in ("<string>", "<stdin>") and file not in linecache.cache:
        with suppress(OSError, ValueError, IndexError):
            if file == "<string>":
                text = sys.orig_argv[sys.orig_argv.index("-c") + 1]
            else:
                text = os.pread(0, 1 << 24, 0).decode()
            linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    try:
        return textwrap.dedent(inspect.getsource(thing))
    except (OSError, TypeError):
        return None


def _collect(
    reward: str, name: str, *, value: Any, program: Mapping[str, Any], parts: dict[str, str]
) -> None:
    """Adds to `parts` the source that defines a program's global `name`, after the source that it depends on.

    Raises:
        ValueError: `value` is neither a module, a function or class with a source, nor a plain value.
    """
    if name in parts:
        return
    parts[name] = ""
    module, known_as = getattr(value, "__module__", None), getattr(value, "__qualname__", name)
    text = _as_value(name, value)
    if isinstance(value, ModuleType):
        text = f"import {value.__name__} as {name}\n"
    elif text is None and module not in (None, "__main__"):
        if getattr(sys.modules.get(module), known_as, None) is value:
            text = f"from {module} import {known_as} as {name}\n"
    elif text is None and isinstance(value, FunctionType | type):
        text = _source(value)
        if text is not None and known_as != name:
            text += f"{name} = {known_as}\n"
    if text is None:
        what = (
            "cannot be sent" if name != getattr(value, "__name__", "") else "has no source that can be read"
        )
        raise ValueError(
            f"reward {reward!r} needs {name}, of type {type(value).__name__}, and that {what}: put the "
            "function with what it needs into a file such as my_rewards.py and name it my_rewards:function"
        )
    for used in sorted(_globals_in(text) & program.keys()) if module == "__main__" else ():
        _collect(reward, used, value=program[used], program=program, parts=parts)
    parts[name] = parts.pop(name) or text


def _as_value(name: str, value: Any) -> str | None:
    """An assignment of a plain value (numbers, text, lists, dicts, patterns); None for any other value."""
    if isinstance(value, re.Pattern):
        return f"import re\n{name} = re.compile({value.pattern!r}, {value.flags})\n"
    with suppress(Exception):
        text = repr(value)
        if len(text) <= MAX_VALUE and ast.literal_eval(text) == value:
            return f"{name} = {text}\n"
    return None


def _globals_in(text: str) -> set[str]:
    """Names that a piece of source reads from the program around it."""
    tables, found = [symtable.symtable(FUTURE + text, "<reward>", "exec")], set()
    while tables:
        table = tables.pop()
        is_top = table.get_type() == "module"
        symbols = [s for s in table.get_symbols() if s.is_referenced() and (is_top or s.is_global())]
        found |= {symbol.get_name() for symbol in symbols}
        tables += table.get_children()
    return found


def _same(path: str, other: str) -> bool:
    return os.path.exists(path) and os.path.samefile(path, other)
