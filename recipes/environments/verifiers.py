"""Environments of the package verifiers (0.1.6 to 0.1.9), not imported here: `load_environment()` makes an
object with `is_completed`, `env_response`, a rubric, and perhaps `setup_state` and `oai_tools`.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from recipes.environments import chat_of, found
from recipes.environments.calls import calls_of, openai_calls
from recipes.environments.tools import json_or_none
from rollout.environment import Environment, Episode, Reply, Turn


class Verifiers(Environment):
    """What `module:load_environment` returns for the options; its rubric pays an episode once it is over.

    `rows` makes the prompts: data.source=recipes.environments.verifiers:rows, with the same options.
    """

    def __init__(self, load: str, *, repeatable: bool = False, **options: Any) -> None:
        self.inner, self.repeatable = _made(load, options), repeatable
        self.tools = list(getattr(self.inner, "oai_tools", None) or ())
        self.loop = asyncio.new_event_loop()
        self.rewards = list(_rewards(self.inner.rubric))
        if any({"states", "completions"} & set(inspect.signature(f).parameters) for f, _, _ in self.rewards):
            raise ValueError("the rubric has a function that scores groups, but episodes are paid singly")

    def run(self, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        made = function(*given, **named)
        return self.loop.run_until_complete(made) if inspect.isawaitable(made) else made

    def open(self, row: Mapping[str, Any], seed: int, state: Any = None) -> Playing:
        if state is None:
            state = {"answer": "", "task": "default", **row, "completion": [], "trajectory": []}
            state |= {"prompt": chat_of(row), "timing": {"start_time": 0.0}}
            state["info"] = json.loads(info) if isinstance(info := row.get("info") or {}, str) else info
            state = self.run(getattr(self.inner, "setup_state", lambda made: made), state) or state
        return Playing(self, state)

    def close(self) -> None:
        self.loop.close()


class Playing(Episode):
    def __init__(self, owner: Verifiers, state: dict[str, Any]) -> None:
        self.owner, self.state = owner, state

    def step(self, turn: Turn) -> Reply:
        calls, made = calls_of(turn), openai_calls(turn)
        wrong = [call for call in calls if call.fault]
        said: dict[str, Any] = {"role": "assistant", "content": turn.text}
        said |= {"tool_calls": made} if made else {}
        before = [*self.state["prompt"], *self.state["completion"]]
        self.state["completion"].append(said)
        self.state["trajectory"].append({"prompt": before, "completion": [said], "extras": {}})
        facts = {"calls": len(calls), "malformed": len(wrong)}
        told: list[Any] = [{"role": "tool", "name": c.name, "content": f"error: {c.fault}"} for c in wrong]
        if made or not wrong:
            if self.owner.run(self.owner.inner.is_completed, self.state):
                return self._paid(facts)
            told = [*self.owner.run(self.owner.inner.env_response, [*before, said], self.state), *told]
        self.state["completion"] += told
        if self.state.get("final_env_response") is not None:
            return self._paid(facts)
        kept = [{k: m[k] for k in ("role", "name", "content") if k in m} for m in told]
        return Reply(tuple(kept), facts=facts, state=json_or_none(self.state))

    def _paid(self, facts: Mapping[str, Any]) -> Reply:
        """The rubric's weighted sum. verifiers would pay 0 where a function raises; here that is a fault."""
        total, scores = 0.0, {}
        for function, weight, objects in self.owner.rewards:
            wanted = inspect.signature(function).parameters
            given = {**self.state, **objects, "state": self.state}
            if all(p.kind is not p.VAR_KEYWORD for p in wanted.values()):
                given = {name: value for name, value in given.items() if name in wanted}
            name = getattr(function, "__name__", type(function).__name__)
            scores[name] = float(self.owner.run(function, **given))
            total += weight * scores[name]
        return Reply((), total, True, {**scores, **facts}, {})


def _rewards(rubric: Any) -> Iterator[tuple[Callable[..., Any], float, Mapping[str, Any]]]:
    """(function, weight, objects that it may take) of a rubric, or of all rubrics of a group."""
    for inner in getattr(rubric, "rubrics", ()):
        yield from _rewards(inner)
    for function, weight in zip(rubric.funcs, rubric.weights or [1.0] * len(rubric.funcs), strict=True):
        yield function, float(weight), getattr(rubric, "class_objects", {})


def _made(load: str, options: Mapping[str, Any]) -> Any:
    """What `load` returns for the options.

    Raises:
        ValueError: it has the interface of a later release, whose messages and tools are objects, or none.
    """
    made = found(load)(**options)
    lacking = [name for name in ("is_completed", "env_response", "rubric") if not hasattr(made, name)]
    if lacking or getattr(made, "tool_defs", None):
        what = f"has no {', '.join(lacking)}" if lacking else "declares its tools in tool_defs"
        raise ValueError(
            f"what {load} makes {what}: it is of a release of verifiers that this adapter does not know; "
            "install one of 0.1.6 to 0.1.9 and the environment for it, or play by environment.name=agent"
        )
    return made


def rows(load: str, **options: Any) -> list[dict[str, Any]]:
    """The prompts of an environment, with the columns that its rubric reads."""
    return list(map(dict, _made(load, options).get_dataset()))
