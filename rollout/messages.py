"""What a row gives to a chat template: messages whose content is text, and tools."""

from __future__ import annotations

from typing import Any

from rl.model.messages import messages_of
from rl.types import Message


def check_text(value: str, where: str) -> str:
    if not value.strip():
        raise ValueError(f"{where}: the prompt is empty; remove the row")
    return value


def chat_messages(value: Any, system_prompt: str | None, template: str, where: str) -> tuple[Message, ...]:
    """The messages of a prompt, which is a user's text (set into `template`) or messages as they are.

    Raises:
        ValueError: it is neither; a message is malformed; or a template is given and the prompt has messages.
    """
    if isinstance(value, str):
        messages = [{"role": "user", "content": template.replace("{prompt}", check_text(value, where))}]
    elif not isinstance(value, list) or not value:
        raise ValueError(
            f"{where}: a prompt must be text or a non-empty list of messages with role and content, not "
            f"{type(value).__name__} {value!r:.60}"
        )
    elif template != "{prompt}":
        raise ValueError(
            f"{where}: data.template wraps prompts that are text, but this one is a list of messages; leave "
            "data.template out and put its words into the messages or data.system_prompt"
        )
    else:
        messages = messages_of(value, where)
        for index, message in enumerate(messages):
            if message["role"] == "assistant" and not (message["content"] or message.get("tool_calls")):
                raise ValueError(
                    f"{where}: message {index} of the assistant has no text and no tool call; remove it"
                )
    if system_prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    return tuple(messages)


def check_last(messages: tuple[Message, ...], may_continue: bool, where: str) -> bool:
    """Whether completions continue the last message because it is the assistant's.

    Raises:
        ValueError: it is the assistant's, and may not be continued or has no text.
    """
    last = messages[-1]
    if last["role"] != "assistant":
        return False
    if not may_continue:
        raise ValueError(
            f"{where}: the chat ends with a message of the assistant, {last.get('content')!r:.60}: the model "
            "would read it and be asked for another turn, and a gold answer would be in its prompt; remove "
            "that message (an answer belongs in a column of its own), or let completions go on with it by "
            "data.continue_final_message=true"
        )
    if not isinstance(last.get("content"), str) or not last["content"].strip():
        raise ValueError(f"{where}: the assistant's last message has no text to go on with; remove it")
    return True
