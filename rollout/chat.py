"""Messages to token ids, once. What is rendered here is what the engine samples from and what the policy
trains on.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from rl.types import Message, Prompt


def render_prompts(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    prefix: str,
    prompt_column: str,
    columns: Sequence[str] = (),
    system_prompt: str | None = None,
    template: str = "{prompt}",
    chat: bool = True,
    max_prompt_length: int,
) -> list[Prompt]:
    """Rows of a dataset as Prompts with ids `prefix/000000`, ...

    A prompt column of text becomes one user message (`chat`) or stays plain text; a list of messages is
    rendered as it is. All other columns, or those named, are kept for graders.

    Raises:
        ValueError: no rows; the prompt column or a named column is missing (with the columns there are); the
            tokenizer has no chat template, or the template refuses a chat; a prompt is empty, no text or list
            of messages, or longer than `max_prompt_length`; a column holds what is no JSON value.
    """
    prompts: list[Prompt] = []
    for index, row in enumerate(rows):
        where = f"{prefix} row {index}"
        _check_columns(row, prompt_column, columns, "" if index == 0 else f"{where}: ")
        messages, text = as_messages(row[prompt_column], system_prompt, template, chat, where)
        if messages:
            text = _apply_template(tokenizer, messages, where)
        ids = tokenizer(text, add_special_tokens=not messages)["input_ids"]
        if not ids:
            raise ValueError(f"{where}: column {prompt_column!r} has no tokens; remove the row")
        if len(ids) > max_prompt_length:
            raise ValueError(
                f"{where}: the prompt has {len(ids)} tokens, more than "
                f"max_prompt_length={max_prompt_length}; "
                f"raise data.max_prompt_length to {len(ids)} or remove the row"
            )
        kept = kept_columns(row, prompt_column, columns)
        _check_json(kept, where)
        prompts.append(Prompt(f"{prefix}/{index:06d}", text, tuple(ids), messages, kept))
    if not prompts:
        raise ValueError(f"the dataset {prefix} has no rows; check data.source, data.split and data.size")
    return prompts


def end_token_ids(
    tokenizer: Any, extra: Sequence[int] = (), generation_config: Any = None
) -> tuple[int, ...]:
    """Ids that end a completion: the tokenizer's, the model's generation config's, and `extra`; sorted, each
    once.
    """
    configured = getattr(generation_config, "eos_token_id", None)
    found = {*extra, *([configured] if isinstance(configured, int) else configured or ())}
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return tuple(sorted(found))


def _check_columns(row: Mapping[str, Any], prompt_column: str, columns: Sequence[str], where: str) -> None:
    for name in (prompt_column, *columns):
        if name not in row:
            near = difflib.get_close_matches(name, list(row), n=1)
            key = "data.prompt_column" if name == prompt_column else "data.columns"
            raise ValueError(
                f"{where}{key}: the dataset has no column {name!r}; it has {', '.join(map(repr, row))}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )


def _check_json(columns: Mapping[str, Any], where: str) -> None:
    """Columns go to grader processes and into the ledger, both as JSON."""
    try:
        json.dumps(columns, allow_nan=False)
    except (TypeError, ValueError):
        name = next(name for name, value in columns.items() if not _is_json(value))
        raise ValueError(
            f"{where}: column {name!r} holds {type(columns[name]).__name__} {columns[name]!r:.60}, and "
            "columns must be JSON values (text, finite numbers, booleans, lists, dicts); convert it, or name "
            "only the columns that graders need in data.columns"
        ) from None


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def kept_columns(row: Mapping[str, Any], prompt_column: str, columns: Sequence[str] = ()) -> dict[str, Any]:
    """What graders get of a row: the named columns, or all, and never the prompt."""
    return {name: row[name] for name in (columns or row) if name != prompt_column}


def as_messages(
    value: Any, system_prompt: str | None, template: str, chat: bool, where: str
) -> tuple[tuple[Message, ...], str]:
    """(messages, "") for a chat, ((), text) for plain text."""
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{where}: the prompt is empty; remove the row")
        text = template.replace("{prompt}", value)
        if not chat:
            return (), text
        value = [{"role": "user", "content": text}]
    elif not isinstance(value, list) or not value or not all(map(_is_message, value)):
        raise ValueError(
            f"{where}: a prompt must be text or a non-empty list of messages with role and content, not "
            f"{type(value).__name__} {value!r:.60}"
        )
    system = (
        [{"role": "system", "content": system_prompt}]
        if system_prompt and value[0]["role"] != "system"
        else []
    )
    return (*system, *value), ""


def _is_message(value: Any) -> bool:
    """A role, and something said or a tool called."""
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        return False
    return isinstance(value.get("content"), str | list) or bool(value.get("tool_calls"))


def _apply_template(tokenizer: Any, messages: Sequence[Message], where: str) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template, and the prompts are chats; set model.chat_template to a "
            "Jinja file, use the instruct model, or data.chat=false for plain text"
        )
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(
            f"{where}: the chat template refuses the messages ({' '.join(str(error).split())}); change the "
            "messages or data.system_prompt, or set model.chat_template to another Jinja file"
        ) from None
