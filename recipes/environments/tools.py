"""Environments in TRL's shape: functions as tools, and classes whose public methods are tools.

The schemas that the model sees are made of names, types and docstrings by transformers, as in TRL.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from recipes.environments.calls import answer_calls
from rewards.plugins import import_module
from rollout.environment import EnvironmentFault, Reply, Turn

NO_TOOLS = {"reset", "get_reward", "close"}


def found(path: str) -> Any:
    """The object at module:name."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def schemas(functions: Sequence[Callable[..., Any]]) -> list[dict[str, Any]]:
    """What the model is told of them.

    Raises:
        ValueError: a type or a line of the docstring is missing.
    """
    from transformers.utils import get_json_schema  # it takes seconds, and only tools need it

    return [get_json_schema(function) for function in functions]


class Functions:
    """Tools that keep nothing between calls; a turn without a call ends the episode.

    Args:
        functions: as module:name, with types and a docstring in Google's form.
        repeatable: a call that was under way when a run was killed may be made again.
    """

    def __init__(self, functions: Sequence[str], *, repeatable: bool = False) -> None:
        self.functions = [found(path) if isinstance(path, str) else path for path in functions]
        self.tools, self.repeatable = schemas(self.functions), repeatable

    def open(self, row: Mapping[str, Any], seed: int, state: Any = None) -> Calling:
        return Calling({function.__name__: function for function in self.functions})

    def close(self) -> None:
        return


class Factory:
    """A class of TRL's `environment_factory`: an object for each episode.

    `reset(**row)` begins it; a text that it returns is refused, since prompts are rendered before. If there
    is `get_reward`, it pays the episode once it is over. Attributes that are JSON values are the state.

    Args:
        factory: as module:name.
        options: arguments of the factory.
    """

    def __init__(
        self, factory: str, options: Mapping[str, Any] | None = None, *, repeatable: bool = False
    ) -> None:
        self.factory, self.options = found(factory), dict(options or {})
        self.tools, self.repeatable = schemas(list(methods(self._made()).values())), repeatable

    def _made(self) -> Any:
        return self.factory(**self.options)

    def open(self, row: Mapping[str, Any], seed: int, state: Any = None) -> Calling:
        made = self._made()
        if state is None:
            said = made.reset(**{name: value for name, value in row.items() if name != "tools"})
            if said:
                raise EnvironmentFault(
                    f"reset returned the text {said!r:.60}, which belongs into the prompt; put it into the "
                    "column of prompts"
                )
        else:
            made.__dict__.update(state)
        return Calling(methods(made), made)

    def close(self) -> None:
        return


def methods(made: Any) -> dict[str, Callable[..., Any]]:
    """The public methods of an object that are tools."""
    pairs = inspect.getmembers(made, inspect.ismethod)
    return {name: method for name, method in pairs if not name.startswith("_") and name not in NO_TOOLS}


class Calling:
    """An episode: calls are answered; the first turn without one ends it, and is paid by `get_reward`."""

    def __init__(self, tools: Mapping[str, Callable[..., Any]], made: Any = None) -> None:
        self.tools, self.made = tools, made

    def step(self, turn: Turn) -> Reply:
        messages, counts = answer_calls(turn.text, self.tools)
        reward = getattr(self.made, "get_reward", None)
        if messages:
            return Reply(tuple(messages), None, facts=counts, state=self._state())
        return Reply(
            (), None if reward is None else float(reward()), done=True, facts=counts, state=self._state()
        )

    def _state(self) -> Any:
        if self.made is None:
            return {}
        try:
            state = dict(vars(self.made))
            is_kept = json.loads(json.dumps(state, allow_nan=False)) == state
        except (TypeError, ValueError, RecursionError):
            return None
        return state if is_kept else None

    def close(self) -> None:
        if (close := getattr(self.made, "close", None)) is not None:
            close()


def calculator(expression: str) -> str:
    """
    Computes an arithmetic expression.

    Args:
        expression: numbers, parentheses and the operators + - * / // % and **.
    """
    from recipes.environments.arithmetic import value_of

    return value_of(expression)


def Calculator() -> Functions:
    return Functions(["recipes.environments.tools:calculator"], repeatable=True)
