"""The global names that tests see: their own, Python's, the prompt's, and the solution's."""

from __future__ import annotations

import builtins
import sys
import types
from collections.abc import Callable
from typing import Any

from rewards.code_remote import Link, entry_function

MODULE = "tests"


class Namespace(dict[str, Any]):
    """Globals of the tests. A name that neither they nor Python define is looked up in the prompt, if that
    is code (HumanEval's tests use its helpers), and then in the solution (MBPP's tests use its classes).
    """

    def __init__(self, link: Link, entry_point: str, run_prompt: Callable[[Namespace], None]) -> None:
        super().__init__(__name__=MODULE, __builtins__=builtins)
        self._link = link
        self._run_prompt = run_prompt
        self._entry_point = entry_point
        self._helpers: Namespace | None = None
        if entry_point:
            super().__setitem__("candidate", entry_function(link, entry_point))
        if entry_point.isidentifier():
            super().__setitem__(entry_point, self["candidate"])

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(value, type) and value.__module__ == MODULE:
            self._link.share(name, value)
        super().__setitem__(name, value)

    def __missing__(self, name: str) -> Any:
        if name.startswith("__") or hasattr(builtins, name):
            raise KeyError(name)
        if self._helpers is None:
            self._helpers = Namespace(self._link, self._entry_point, lambda namespace: None)
            self._run_prompt(self._helpers)
        helpers = self._helpers
        value = dict.__getitem__(helpers, name) if name in helpers else self._link.look_up(name)
        super().__setitem__(name, value)
        return value

    def install_modules(self) -> None:
        """Makes `import solution` lead to the other process; `tests`, the module of the tests' classes, is
        empty.
        """
        solution = types.ModuleType("solution")
        solution.__dict__["__getattr__"] = self._link.look_up_attribute
        if self._entry_point.isidentifier():
            solution.__dict__[self._entry_point] = self["candidate"]
        sys.modules[MODULE], sys.modules["solution"] = types.ModuleType(MODULE), solution
