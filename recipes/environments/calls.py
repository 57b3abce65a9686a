"""Tool calls in what a model says, and their answers. What a model writes is parsed, and never evaluated.

Hermes' form, of Qwen2.5 and Qwen3, is `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`,
any number of times; `forms` reads others. A call that cannot be made is answered with what is wrong, so that
the model can learn.
"""

from __future__ import annotations

import inspect
import json
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from typing import Any

from rl.store.safe_read import is_nested_beyond
from rl.types import Message
from rollout.environment import EnvironmentFault, ToolCall, Turn

MARK = re.compile(r"<tool_call>\s*|</think>")
END = re.compile(r"\s*(?:</tool_call>|\Z)")
SKIPPED = re.compile(r"</tool_call>|(?=</think>)|\Z")  # up to here a malformed call goes
MAX_CALLS = 8  # of one turn
MAX_DEPTH = 64  # of arguments
TOO_DEEP = "the call is nested too deep"
CALL: ContextVar[str] = ContextVar("what the generator and the clock of a call are made of", default="")


def seed_call(*parts: Any) -> None:
    """From here on chance and time are those of a seed, a turn, and a call in it."""
    CALL.set("/".join(map(str, parts)))
    random.seed(CALL.get())


def generator() -> random.Random:
    """Of the call that is answered: a replay after a kill draws the same numbers."""
    return random.Random(CALL.get())


def now() -> datetime:
    """The time of the call that is answered: a day by the episode's seed, one minute more for each turn."""
    seed, _, rest = CALL.get().partition("/")
    day = datetime(2026, 1, 1, 12, tzinfo=UTC) + timedelta(days=random.Random(seed).randrange(365))
    return day + timedelta(minutes=int(rest.partition("/")[0] or 0))


def calls_in(text: str) -> list[ToolCall]:
    """The calls of a turn, in order; what stands in its thinking is not a call, a tag in a string is text."""
    found, at = list[ToolCall](), 0
    while mark := MARK.search(text, at):
        at, after = mark.end(), None
        if mark[0] == "</think>":
            found = []
            continue
        try:
            call, end = json.JSONDecoder().raw_decode(text, at)
            after = END.match(text, end)
            wrong = ToolCall(fault="the call is not valid JSON: something follows its object")
            found.append(_call(call) if after else wrong)
        except RecursionError:
            found.append(ToolCall(fault=TOO_DEEP))
        except ValueError as error:
            found.append(ToolCall(fault=f"the call is not valid JSON: {getattr(error, 'msg', error)}"))
        at = (after or SKIPPED.search(text, at) or mark).end()
    return found


def calls_of(turn: Turn) -> Sequence[ToolCall]:
    """The calls of a turn; where nobody looked for any, those in Hermes' form."""
    return calls_in(turn.text) if turn.calls is None else turn.calls


def openai_calls(turn: Turn) -> list[dict[str, Any]]:
    """The calls of a turn that can be made, as an OpenAI-compatible server gives them."""
    made = [{"name": c.name, "arguments": json.dumps(c.arguments)} for c in calls_of(turn) if not c.fault]
    return [{"id": f"{turn.number}-{i}", "type": "function", "function": f} for i, f in enumerate(made)]


def _call(found: Any) -> ToolCall:
    if not isinstance(found, dict):
        return ToolCall(fault='a call is a JSON object with "name" and "arguments"')
    arguments = found.get("arguments", {})
    if isinstance(arguments, str):  # some models write the object as text once more
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    return checked_call(found.get("name"), arguments)


def checked_call(name: Any, arguments: Any) -> ToolCall:
    """The call, if it can cross to the process of a tool as JSON; else one with what is wrong."""
    if not isinstance(name, str):
        return ToolCall(fault='a call is a JSON object with "name" and "arguments"')
    if not isinstance(arguments, dict):
        return ToolCall(name, fault='"arguments" must be a JSON object')
    if is_nested_beyond(arguments, MAX_DEPTH):
        return ToolCall(name, fault=TOO_DEEP)
    try:
        json.dumps(arguments, allow_nan=False)
    except (ValueError, TypeError) as error:
        return ToolCall(name, fault=f"arguments are plain JSON values: {error}")
    return ToolCall(name, arguments)


def answer_calls(
    turn: Turn, tools: Mapping[str, Callable[..., Any]], seed: int = 0
) -> tuple[list[Message], dict[str, float]]:
    """A message for each call, and counts: of calls, malformed ones, tools that raised, seconds by tool.

    `random`, `generator()` and `now()` are functions of the episode's seed, the turn and the call.

    Raises:
        EnvironmentFault: a tool raised it: it failed by no fault of the call.
    """
    messages: list[Message] = []
    counts: dict[str, float] = {"calls": 0, "malformed": 0, "tool_errors": 0}
    for number, call in enumerate(calls_of(turn)):
        counts["calls"] += 1
        fault = call.fault
        if number >= MAX_CALLS:
            fault = f"more than {MAX_CALLS} calls in a turn are not made"
        elif not fault:
            fault = _mismatch(call, tools)
        if fault:
            counts["malformed"] += 1
            content = f"error: {fault}"
        else:
            began = time.monotonic()
            seed_call(seed, turn.number, number)
            try:
                content = _as_text(tools[call.name](**(call.arguments or {})))
            except EnvironmentFault:
                raise
            except Exception as error:  # arguments of the model's choice
                counts["tool_errors"] += 1
                content = f"error: {type(error).__name__}: {error}"
            seconds = f"seconds/{call.name}"
            counts[seconds] = round(counts.get(seconds, 0.0) + time.monotonic() - began, 4)
        messages.append({"role": "tool", "name": call.name, "content": content})
    return messages, counts


def _mismatch(call: ToolCall, tools: Mapping[str, Callable[..., Any]]) -> str:
    """Why a call does not fit its tool; empty if it does."""
    if call.name not in tools:
        return f"there is no tool {call.name[:60]!r}; there are {', '.join(tools)}"
    try:
        inspect.signature(tools[call.name]).bind(**(call.arguments or {}))
    except TypeError as error:
        return f"{call.name}: {error}"
    return ""


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
