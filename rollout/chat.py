"""Messages to token ids, once. What is rendered here is what the engine samples from and what the policy
trains on.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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
            tokenizer has no chat template; a prompt is empty or longer than `max_prompt_length`.
    """
    prompts: list[Prompt] = []
    for index, row in enumerate(rows):
        if index == 0:
            _check_columns(row, prompt_column, columns)
        messages, text = _messages(row[prompt_column], system_prompt, template, chat, f"{prefix} row {index}")
        if messages:
            text = _apply_template(tokenizer, messages)
        ids = tokenizer(text, add_special_tokens=not messages)["input_ids"]
        if not ids:
            raise ValueError(f"{prefix} row {index}: column {prompt_column!r} is empty; remove the row")
        if len(ids) > max_prompt_length:
            raise ValueError(
                f"{prefix} row {index}: the prompt has {len(ids)} tokens, more than "
                f"max_prompt_length={max_prompt_length}; "
                f"raise data.max_prompt_length to {len(ids)} or remove the row"
            )
        kept = {k: row[k] for k in (columns or row) if k != prompt_column}
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


def _check_columns(row: Mapping[str, Any], prompt_column: str, columns: Sequence[str]) -> None:
    for name in (prompt_column, *columns):
        if name not in row:
            near = difflib.get_close_matches(name, list(row), n=1)
            key = "data.prompt_column" if name == prompt_column else "data.columns"
            raise ValueError(
                f"{key}: the dataset has no column {name!r}; it has {', '.join(map(repr, row))}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )


def _messages(
    value: Any, system_prompt: str | None, template: str, chat: bool, where: str
) -> tuple[tuple[Message, ...], str]:
    """(messages, "") for a chat, ((), text) for plain text."""
    if isinstance(value, str):
        text = template.replace("{prompt}", value)
        if not chat:
            return (), text
        value = [{"role": "user", "content": text}]
    elif not (
        isinstance(value, list) and value and all(isinstance(m, Mapping) and "role" in m for m in value)
    ):
        raise ValueError(
            f"{where}: a prompt must be text or a non-empty list of messages with role and content, not "
            f"{type(value).__name__}"
        )
    system = (
        [{"role": "system", "content": system_prompt}]
        if system_prompt and value[0]["role"] != "system"
        else []
    )
    return (*system, *value), ""


def _apply_template(tokenizer: Any, messages: Sequence[Message]) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template, and the prompts are chats; set model.chat_template to a "
            "Jinja file, "
            "use the instruct model, or data.chat=false for plain text"
        )
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
