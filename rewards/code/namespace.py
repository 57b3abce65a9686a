"""The global names that tests see: from the tests, Python, the prompt, the library and the solution."""

from __future__ import annotations

import builtins
import importlib
import re
import sys
import types
from collections.abc import Callable
from typing import Any

from rewards.code.objects import Remote
from rewards.code.remote import Link, Misuse

MODULE = "tests"
# Names that tests expect the original solution to have imported. They come from the library, because a `math`
# or `isclose` of the graded solution would judge itself.
ALIASES = {"np": "numpy", "pd": "pandas"}
FROM_LIBRARY = {
    "collections": "ChainMap Counter OrderedDict defaultdict deque namedtuple",
    "copy": "deepcopy",
    "datetime": "date datetime timedelta",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "math": "inf isclose isnan nan",
    "typing": "Any Callable Dict FrozenSet Iterable Iterator List Optional Sequence Set Tuple Union",
}
JUDGES = re.compile(r"^(?:assert|check|expect|verify|compare)|equal|close$|approx", re.IGNORECASE)
LIBRARY_OF = {name: module for module, names in FROM_LIBRARY.items() for name in names.split()}


class Namespace(dict[str, Any]):
    """Globals of the tests. A name that neither the tests nor Python define is looked up in this order: the
    prompt, if it is code (HumanEval's tests use its helpers); the standard library; the solution (MBPP's
    tests use its classes, a HumanEval completion repeats the prompt's helpers). The solution must not
    define a name that judges, such as `check_equal`.
    """

    def __init__(
        self, link: Link, entry_point: str, source: str, run_prompt: Callable[[Namespace], None]
    ) -> None:
        super().__init__(__name__=MODULE, __builtins__=builtins)
        self._link = link
        self._run_prompt = run_prompt
        self._entry_point, self._source = entry_point, source
        self._helpers: Namespace | None = None
        if entry_point:
            super().__setitem__("candidate", Remote(link, entry_point))
        if entry_point.isidentifier():
            super().__setitem__(entry_point, self["candidate"])

    def __setitem__(self, name: str, value: Any) -> None:
        if issubclass(type(value), type) and value.__module__ == MODULE:
            self._link.share(name, value)
        super().__setitem__(name, value)

    def __missing__(self, name: str) -> Any:
        if name.startswith("__") or hasattr(builtins, name):
            raise KeyError(name)
        if self._helpers is None:
            self._helpers = Namespace(self._link, self._entry_point, "", lambda namespace: None)
            self._run_prompt(self._helpers)
        helpers = self._helpers
        value = dict.__getitem__(helpers, name) if name in helpers else self._from_outside(name)
        super().__setitem__(name, value)
        return value

    def _from_outside(self, name: str) -> Any:
        if name in LIBRARY_OF:
            return getattr(importlib.import_module(LIBRARY_OF[name]), name)
        module = ALIASES.get(name, name)
        is_module = module in sys.stdlib_module_names and (self._entry_point or f"{name}." in self._source)
        if is_module or name in ALIASES:
            try:
                return importlib.import_module(module)
            except ImportError:
                raise KeyError(name) from None
        if self._entry_point and JUDGES.search(name):
            raise Misuse(f"the tests use {name!r}, which is defined nowhere in tests, prompt or library")
        return self._link.look_up(name)

    def install_modules(self) -> None:
        """Makes `import solution` reach the other process; the module of the tests' classes stays empty."""
        solution = types.ModuleType("solution")
        solution.__dict__["__getattr__"] = self._link.look_up_attribute
        if self._entry_point.isidentifier():
            solution.__dict__[self._entry_point] = self["candidate"]
        sys.modules[MODULE], sys.modules["solution"] = types.ModuleType(MODULE), solution
