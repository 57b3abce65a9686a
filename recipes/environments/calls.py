"""Tool calls in what a model says, and their answers. What a model writes is parsed, and never evaluated.

The form is Hermes', which Qwen2.5 and Qwen3 use: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`,
any number of times. A call that cannot be made is answered with what is wrong, so that the model can learn.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rl.store.safe_read import is_nested_beyond
from rl.types import Message
from rollout.environment import EnvironmentFault

BEGIN, END = "<tool_call>", "</tool_call>"
BLOCK = re.compile(f"{BEGIN}(.*?)(?:{END}|\\Z)", re.DOTALL)
MAX_CALLS = 8  # of one turn
MAX_DEPTH = 64  # of arguments
TOO_DEEP = "the call is nested too deep"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call, or why it is none."""

    name: str = ""
    arguments: Mapping[str, Any] | None = None
    fault: str = ""


def calls_in(text: str) -> list[ToolCall]:
    """The calls of a turn, in order; what stands in its thinking is not a call."""
    spoken = text.rpartition("</think>")[2]
    return [_call(block) for block in BLOCK.findall(spoken)]


def _call(block: str) -> ToolCall:
    try:
        found = json.loads(block)
    except RecursionError:
        return ToolCall(fault=TOO_DEEP)
    except ValueError as error:
        return ToolCall(fault=f"the call is not valid JSON: {error}")
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return ToolCall(fault='a call is a JSON object with "name" and "arguments"')
    arguments = found.get("arguments", {})
    if isinstance(arguments, str):  # some models write the object as text once more
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        return ToolCall(found["name"], fault='"arguments" must be a JSON object')
    if is_nested_beyond(arguments, MAX_DEPTH):
        return ToolCall(found["name"], fault=TOO_DEEP)
    return ToolCall(found["name"], arguments)


def answer_calls(text: str, tools: Mapping[str, Callable[..., Any]]) -> tuple[list[Message], dict[str, int]]:
    """A message for each call, and how many there were, were malformed, and were of tools that raised.

    Raises:
        EnvironmentFault: a tool raised it: it failed by no fault of the call.
    """
    messages, counts = [], {"calls": 0, "malformed": 0, "tool_errors": 0}
    for number, call in enumerate(calls_in(text)):
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
            try:
                content = _as_text(tools[call.name](**(call.arguments or {})))
            except EnvironmentFault:
                raise
            except Exception as error:  # arguments of the model's choice
                counts["tool_errors"] += 1
                content = f"error: {type(error).__name__}: {error}"
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
