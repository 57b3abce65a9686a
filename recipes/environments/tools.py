"""Environments in TRL's shape: functions as tools, and classes whose public methods are tools.

transformers makes the schemas that the model sees from names, types and docstrings, as in TRL.
"""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from recipes.environments import found
from recipes.environments.arithmetic import value_of
from recipes.environments.calls import answer_calls
from rollout.environment import Environment, EnvironmentFault, Episode, Reply, Turn

NO_TOOLS = {"reset", "get_reward", "close"}


def schemas(functions: Sequence[Callable[..., Any]]) -> list[dict[str, Any]]:
    """JSON schemas that the model is shown. Raises ValueError if a type or a docstring's line is missing."""
    from transformers.utils import get_json_schema  # its import takes seconds, and only tools need it

    return [get_json_schema(function) for function in functions]


class Functions(Environment):
    """Tools that keep no state between calls; a turn without a call ends the episode.

    Args:
        functions: as module:name, with types and a docstring in Google's form.
        repeatable: a call that was under way when a run was killed may be made again.
    """

    def __init__(self, functions: Sequence[str], *, repeatable: bool = False) -> None:
        self.functions = [found(path) if isinstance(path, str) else path for path in functions]
        self.tools, self.repeatable = schemas(self.functions), repeatable

    def open(self, row: Mapping[str, Any], seed: int, state: Any = None) -> Calling:
        return Calling({function.__name__: function for function in self.functions}, seed)


class Factory(Environment):
    """A class for TRL's `environment_factory`; each episode gets an object of it.

    `reset(**row)` starts it; text that it returns is refused, since prompts are already rendered. If there is
    a `get_reward`, it pays the finished episode. Attributes that are JSON values are the state.

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
        random.seed(seed)
        made = self._made()
        if state is None:
            wanted = inspect.signature(made.reset).parameters
            takes_all = any(p.kind is p.VAR_KEYWORD for p in wanted.values())
            hidden = {"tools"} if takes_all or "prompt" in wanted else {"tools", "prompt"}
            said = made.reset(**{name: value for name, value in row.items() if name not in hidden})
            if said:
                raise EnvironmentFault(
                    f"reset returned the text {said!r:.60}, which belongs in the prompt; put it into the "
                    "column of prompts"
                )
        else:
            made.__dict__.update(state)
        pay = getattr(made, "get_reward", None)
        return Calling(
            methods(made),
            seed,
            paid=lambda turn: None if pay is None else float(pay()),
            state=lambda: json_or_none(dict(vars(made))),
            close=getattr(made, "close", lambda: None),
        )


def methods(made: Any) -> dict[str, Callable[..., Any]]:
    """The public methods of an object that are tools."""
    pairs = inspect.getmembers(made, inspect.ismethod)
    return {name: method for name, method in pairs if not name.startswith("_") and name not in NO_TOOLS}


def json_or_none(state: dict[str, Any]) -> dict[str, Any] | None:
    """The state, or None if JSON does not give it back unchanged."""
    try:
        return state if json.loads(json.dumps(state, allow_nan=False)) == state else None
    except (TypeError, ValueError, RecursionError):
        return None


class Calling(Episode):
    """An episode that answers calls; the first turn without a call ends it and is paid by `paid`."""

    def __init__(
        self,
        tools: Mapping[str, Callable[..., Any]],
        seed: int = 0,
        *,
        paid: Callable[[Turn], float | None] = lambda turn: None,
        state: Callable[[], Any] = dict,
        close: Callable[[], Any] = lambda: None,
    ) -> None:
        self.tools, self.seed, self.paid, self.state, self.close = tools, seed, paid, state, close

    def step(self, turn: Turn) -> Reply:
        messages, counts = answer_calls(turn, self.tools, self.seed)
        reward = None if messages else self.paid(turn)
        return Reply(tuple(messages), reward, not messages, counts, self.state())


def calculator(expression: str) -> str:
    """
    Computes an arithmetic expression.

    Args:
        expression: numbers, parentheses and the operators + - * / // % and **.
    """
    return value_of(expression)


def Calculator() -> Functions:
    return Functions(["recipes.environments.tools:calculator"], repeatable=True)
