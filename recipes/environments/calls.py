"""Finds the tool calls in a model's text and answers them. The text is parsed, and never evaluated.

The Hermes form, of Qwen2.5 and Qwen3, is `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`,
any number of times; `forms` reads others. A malformed call is answered with what is wrong, so that the model
can learn.
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
SKIPPED = re.compile(r"</tool_call>|(?=</think>)|\Z")  # a malformed call ends here
MAX_CALLS = 8  # per turn
MAX_DEPTH = 64  # of arguments
TOO_DEEP = "the call is nested too deep"
CALL: ContextVar[str] = ContextVar("seed of a call's generator and clock", default="")


class ToolError(Exception):
    """A call that failed by its arguments: the text is the answer as it stands, and it is counted."""


def seed_call(*parts: Any) -> None:
    """From here on, `random`, `generator()` and `now()` depend only on `parts`: seed, turn, call."""
    CALL.set("/".join(map(str, parts)))
    random.seed(CALL.get())


def generator() -> random.Random:
    """The current call's random generator: a replay after a kill draws the same numbers."""
    return random.Random(CALL.get())


def now() -> datetime:
    """The current call's time: a day drawn from the episode's seed, plus one minute per turn."""
    seed, _, rest = CALL.get().partition("/")
    day = datetime(2026, 1, 1, 12, tzinfo=UTC) + timedelta(days=random.Random(seed).randrange(365))
    return day + timedelta(minutes=int(rest.partition("/")[0] or 0))


def calls_in(text: str) -> list[ToolCall]:
    """The calls of a turn, in order. Calls within its thinking do not count; a tag in a string is text."""
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
    """The calls of a turn; if it has not been searched for calls yet, those in the Hermes form."""
    return calls_in(turn.text) if turn.calls is None else turn.calls


def openai_calls(turn: Turn) -> list[dict[str, Any]]:
    """The well-formed calls of a turn, as an OpenAI-compatible server returns them."""
    made = [{"name": c.name, "arguments": json.dumps(c.arguments)} for c in calls_of(turn) if not c.fault]
    return [{"id": f"{turn.number}-{i}", "type": "function", "function": f} for i, f in enumerate(made)]


def _call(found: Any) -> ToolCall:
    if not isinstance(found, dict):
        return ToolCall(fault='a call is a JSON object with "name" and "arguments"')
    arguments = found.get("arguments", {})
    if isinstance(arguments, str):  # some models write the object as a JSON string
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    return checked_call(found.get("name"), arguments)


def checked_call(name: Any, arguments: Any) -> ToolCall:
    """The call, if it can be sent to a tool's process as JSON; else one that says what is wrong."""
    if not isinstance(name, str):
        return ToolCall(fault='a call is a JSON object with "name" and "arguments"')
    if not isinstance(arguments, dict):
        return ToolCall(name, fault='"arguments" must be a JSON object')
    if is_nested_beyond(arguments, MAX_DEPTH):
        return ToolCall(name, fault=TOO_DEEP)
    try:
        json.dumps(arguments, allow_nan=False)
    except (ValueError, TypeError) as error:
        return ToolCall(name, fault=f"arguments must be plain JSON values: {error}")
    return ToolCall(name, arguments)


def answer_calls(
    turn: Turn, tools: Mapping[str, Callable[..., Any]], seed: int = 0
) -> tuple[list[Message], dict[str, float]]:
    """A message for each call, and counts of calls, malformed calls, tool errors and seconds per tool.

    `random`, `generator()` and `now()` depend only on the episode's seed, the turn and the call.

    Raises:
        EnvironmentFault: a tool raised it, because it failed through no fault of the call.
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
            except Exception as error:  # the model chose the arguments
                counts["tool_errors"] += 1
                given = isinstance(error, ToolError)
                content = str(error) if given else f"error: {type(error).__name__}: {error}"
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
