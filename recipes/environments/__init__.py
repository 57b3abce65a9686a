"""Environments and tools of a run, and the processes that they run in. `load` finds one by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from rewards.imports import import_fault, import_module
from rollout.environment import Environment, EnvironmentFault

BUILT_IN = {
    "guess_number": "recipes.environments.guess:GuessNumber",
    "gym": "recipes.environments.gym:GymFeedback",
    "calculator": "recipes.environments.tools:Calculator",
    "python": "recipes.environments.python:PythonSession",
    "tools": "recipes.environments.tools:Functions",
    "search": "recipes.environments.search:Search",
    "textarena": "recipes.environments.textarena:Game",
    "verifiers": "recipes.environments.verifiers:Verifiers",
    "agent": "recipes.environments.agent:Agent",
    "trl": "recipes.environments.tools:Factory",
}


def found(path: str) -> Any:
    """The object at module:name.

    Raises:
        ValueError: the path has another form, or its object cannot be found.
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"{path!r} does not say where to look; write module:name, such as my_tools:multiply")
    try:
        return getattr(import_module(module), name)
    except Exception as error:  # the user's module may raise anything
        raise ValueError(f"{path!r} is not found: {import_fault(module, error)}") from error


def load(name: str, options: Mapping[str, Any]) -> Environment:
    """The environment of that name: a built-in one, or what `module:callable` returns for the options.

    Raises:
        ValueError: it does not exist, it takes other options, or it is not an environment.
    """
    path, what = BUILT_IN.get(name, name), f"environment.name={name!r}"
    if ":" not in path:
        near = difflib.get_close_matches(name, BUILT_IN, n=2, cutoff=0.5) or list(BUILT_IN)
        raise ValueError(f"{what} is neither built in (such as {', '.join(near)}) nor module:callable")
    try:
        made = found(path)(**options)
    except Exception as error:  # the user's code may raise anything
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{what} with options {dict(options)} failed: {said}") from error
    if not all(hasattr(made, part) for part in ("open", "close", "repeatable", "tools")):
        raise ValueError(
            f"{what} makes a {type(made).__name__}; an environment must have open, close, repeatable and "
            "tools (rollout.environment)"
        )
    return made


def chat_of(row: Mapping[str, Any]) -> list[Any]:
    """The messages of a row's prompt."""
    if isinstance(row["prompt"], str):
        raise EnvironmentFault("this environment needs a chat as its prompt; use data.chat=true")
    return list(row["prompt"])
