"""The text of a completion, which is a string or a list of messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def completion_text(completion: str | Sequence[Any]) -> str:
    """The string itself, or the assistant's messages joined by newlines."""
    if isinstance(completion, str):
        return completion
    said = [message for message in completion if _role(message) == "assistant"]
    return "\n".join(map(_content, said))


def last_message_text(completion: str | Sequence[Any]) -> str:
    """The string itself, or the text of the assistant's last message, where graders look for the answer.

    What a tool or a user says after it, such as a page that holds the answer, is not the assistant's.
    """
    if isinstance(completion, str):
        return completion
    return next((_content(message) for message in reversed(completion) if _role(message) == "assistant"), "")


def _role(message: Any) -> str:
    return message.get("role", "assistant") if isinstance(message, Mapping) else "assistant"


def _content(message: Any) -> str:
    """The text of a message, whose content is a string or a list of parts; "" if there is none."""
    content = message.get("content") if isinstance(message, Mapping) else message
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(str(part.get("text") or "") for part in parts if isinstance(part, Mapping))
