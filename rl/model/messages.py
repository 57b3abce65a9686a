"""Chats of a dataset's rows (prompts or examples), checked and in the form that chat templates take."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from jinja2 import TemplateError

Messages = list[dict[str, Any]]
ROLES = ("system", "developer", "user", "assistant", "tool")


def messages_of(value: Any, where: str) -> Messages:
    """The messages of a chat. Parts of a content are joined by line breaks, as vLLM's server does.

    Keys without a value are left out, in tool calls too: in a table every row has the keys of all rows.

    Raises:
        ValueError: `value` is not a list of messages; or a message has no role, content other than text, or
            tool calls without a function's name.
    """
    if not isinstance(value, list | tuple):
        raise ValueError(
            f"{where}: {value!r:.60} is {type(value).__name__}, not a list of messages; write "
            "[{'role': 'user', 'content': 'text'}, ...], or use a column of text"
        )
    return [_message(message, f"{where}: message {index}") for index, message in enumerate(value)]


def refuse_lost_calls(messages: Messages, text: str, where: str) -> None:
    """Raises ValueError if the rendered `text` of messages does not name the functions that they call."""
    calls = [call for message in messages for call in message.get("tool_calls", [])]
    if lost := [name for call in calls if (name := call.get("function", call)["name"]) not in text]:
        raise ValueError(
            f"{where}: a message calls {lost[0]}, but the chat template does not write tool calls; set "
            "model.chat_template to one that does, write the call into the content, or leave the row out"
        )


def rendered(
    messages: Messages,
    tokenizer: Any,
    where: str,
    *,
    tools: Sequence[Any] | None = None,
    answer_follows: bool = False,
) -> str:
    """The chat as text; if an answer follows, the header of that answer is at its end.

    Raises:
        ValueError: the template refuses the messages, or leaves out a tool.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=answer_follows
        )
    except (TemplateError, TypeError) as error:
        raise ValueError(
            f"{where}: the chat template refuses the messages ({' '.join(str(error).split())}); change them "
            "or data.system_prompt, or set model.chat_template to another Jinja file"
        ) from None
    names = [str((tool.get("function") or tool).get("name", "")) for tool in tools or ()]
    # A message may name a tool as well.
    is_same = names and text == rendered(messages, tokenizer, where, answer_follows=answer_follows)
    if lost := [name for name in names if is_same or name not in text]:
        raise ValueError(
            f"{where}: the chat template shows nothing of the tool {lost[0]}; set model.chat_template to one "
            "that has a place for tools, or give the column another name with data.rename={tools: ...}"
        )
    return text


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{where} is {type(value).__name__} {value!r:.60}; write {{'role': 'user', 'content': 'text'}}"
        )
    role = value.get("role")
    if not isinstance(role, str) or not role:
        keys = ", ".join(repr(k) for k, v in value.items() if v is not None) or "no keys"
        raise ValueError(f"{where} has no role (it has {keys}); give it one of {', '.join(ROLES)}")
    if role not in ROLES and (near := difflib.get_close_matches(role.lower(), ROLES, n=1, cutoff=0.8)):
        raise ValueError(f"{where} has the role {role!r}; did you mean {near[0]!r}?")
    message: dict[str, Any] = without_none(value)
    calls = message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = _calls(calls, where)
    if "content" in message:
        whose = "answer's content" if role == "assistant" else "content"
        message["content"] = _text(value["content"], f"{where}: the {whose}")
    elif role != "assistant":
        raise ValueError(f"{where} ({role}) has no content; give it a text, or leave the row out")
    else:
        message["content"] = ""
    return message


def _text(content: Any, whose: str) -> str:
    if isinstance(content, str):
        return content
    odd: Any = content
    if isinstance(content, list | tuple):
        texts: list[Any] = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        if all(isinstance(text, str) for text in texts):
            return "\n".join(texts)
        odd = next(part for part, text in zip(content, texts, strict=True) if not isinstance(text, str))
        if isinstance(odd, Mapping) and odd.get("type", "text") != "text":
            raise ValueError(
                f"{whose} has a part of type {odd['type']!r}, but a text model reads only text; leave the "
                "row out, or describe in text what the part shows"
            )
    raise ValueError(
        f"{whose} is {type(content).__name__}, not text or parts of text ({odd!r:.60}); make it text, or "
        "leave the row out"
    )


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    for call in calls if isinstance(calls, list | tuple) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(
                f"{where}: a tool call is {call!r:.80}; write {{'type': 'function', 'function': {{'name': "
                "'f', 'arguments': {}}}}, or leave the row out"
            )
    return list(calls)


def without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: kept for key, item in value.items() if (kept := without_none(item)) is not None}
    if isinstance(value, list | tuple):
        return [without_none(item) for item in value]
    return value


def read_tools(value: Any, where: str) -> list[Any] | None:
    """The row's tools as JSON schemas: a list of mappings, or such a list as JSON text; None without any.

    `datasets` fills in None for keys that only schemas of other rows have; these are taken out.

    Raises:
        ValueError: the column holds something else.
    """
    tools = value or []
    if isinstance(value, str) and value.strip():
        with suppress(json.JSONDecodeError):
            tools = json.loads(value)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(
            f"{where}: the column 'tools' goes to the chat template and must be a list of JSON schemas, or "
            f"such a list as JSON text, not {type(value).__name__} {value!r:.60}; fix it, or give the "
            "column another name with data.rename={tools: ...}"
        )
    return [without_none(tool) for tool in tools]
