"""Environments and tools of a run, and the processes that they run in. `load` finds one by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from rewards.plugins import import_module
from rollout.environment import Environment

BUILT_IN = {
    "guess_number": "recipes.environments.guess:GuessNumber",
    "gym": "recipes.environments.gym:GymFeedback",
    "calculator": "recipes.environments.tools:Calculator",
    "python": "recipes.environments.python:PythonSession",
    "tools": "recipes.environments.tools:Functions",
    "trl": "recipes.environments.tools:Factory",
}


def load(name: str, options: Mapping[str, Any]) -> Environment:
    """The environment of that name: built in, or what `module:callable` makes of the options.

    Raises:
        ValueError: there is none, it takes other options, or it makes something else.
    """
    path = BUILT_IN.get(name, name)
    if ":" not in path:
        near = difflib.get_close_matches(name, BUILT_IN, n=2, cutoff=0.5) or list(BUILT_IN)
        raise ValueError(
            f"environment.name={name!r} is neither built in (such as {', '.join(near)}) nor module:callable"
        )
    module, _, attribute = path.partition(":")
    try:
        made = getattr(import_module(module), attribute)(**options)
    except Exception as error:  # code of the user's may raise anything
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"environment.name={name!r} with options {dict(options)} failed: {said}") from error
    if not all(hasattr(made, part) for part in ("open", "close", "repeatable", "tools")):
        raise ValueError(
            f"environment.name={name!r} makes a {type(made).__name__}, and an environment has open, close, "
            "repeatable and tools (rollout.environment)"
        )
    return made
