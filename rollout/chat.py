"""Turns messages into token ids, once: the engine samples from the ids rendered here, and the policy trains
on them.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

from rl.model.messages import messages_of, read_tools
from rl.types import Message, Prompt
from rollout.template import Chat, render_chats


def render_prompts(
    rows: Iterable[Mapping[str, Any]] | Mapping[int, Mapping[str, Any]],
    tokenizer: Any,
    *,
    num_rows: int | None = None,
    prefix: str,
    prompt_column: str,
    columns: Sequence[str] = (),
    system_prompt: str | None = None,
    template: str = "{prompt}",
    chat: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    continue_final_message: bool = False,
    max_prompt_length: int,
    too_long: Literal["refuse", "drop"] = "refuse",
    template_file: str | None = None,
    note: Callable[[str], None] = lambda sentence: None,
) -> list[Prompt]:
    """Rows of a dataset as Prompts with ids `prefix/000000`, ...

    A prompt column of text becomes one user message (`chat`) or stays plain text. A list of messages is
    rendered as it is, with the row's `tools`. Other columns, or those named, are kept for graders.

    Args:
        rows: all rows, or some of them by their numbers; the others of `num_rows` are not too long.
        template_file: where the chat template was read from, for errors; None: the tokenizer's own.
        note: is told how many rows were left out as too long.

    Raises:
        ValueError: no rows; the prompt column or a named column is missing (with the columns there are); the
            tokenizer has no chat template, or the template refuses a chat; a prompt is empty, not text
            or messages, or longer than `max_prompt_length`; a column holds what is not a JSON value.
    """
    numbered = dict(rows) if isinstance(rows, Mapping) else dict(enumerate(rows))
    texts, chats, prompts, lengths, total = {}, {}, [], {}, num_rows or len(numbered)
    if not numbered:
        raise ValueError(f"the dataset {prefix} has no rows; check data.source, data.split and data.size")
    for index, row in numbered.items():
        where = f"{prefix} row {index}"
        value = _prompt_of(row, prompt_column, columns, "" if index == 0 else f"{where}: ")
        if not chat and isinstance(value, str):
            _refuse_idle(where, system_prompt, chat_template_kwargs)
            texts[index] = template.replace("{prompt}", check_text(value, where))
            continue
        messages = chat_messages(value, system_prompt, template, where)
        goes_on = _check_last(messages, continue_final_message, where)
        chats[index] = Chat(where, messages, read_tools(row.get("tools"), where), goes_on)
    rendered = render_chats(tokenizer, list(chats.values()), chat_template_kwargs or {}, file=template_file)
    texts |= zip(chats, rendered, strict=True)
    for i, row in numbered.items():
        where, said = f"{prefix} row {i}", chats[i].messages if i in chats else ()
        ids = _ids(tokenizer, texts[i], f"{where}: column {prompt_column!r}", is_plain=i not in chats)
        if len(ids) > max_prompt_length:
            lengths[i] = len(ids)
            continue
        kept = _checked(kept_columns(row, prompt_column, columns), where)
        prompts.append(Prompt(f"{prefix}/{i:06d}", texts[i], tuple(ids), said, kept))
    if lengths:
        _leave_out(lengths, total, prefix=prefix, limit=max_prompt_length, too_long=too_long, note=note)
    return prompts


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


def _check_last(messages: tuple[Message, ...], may_continue: bool, where: str) -> bool:
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


def _ids(tokenizer: Any, text: str, where: str, *, is_plain: bool) -> list[int]:
    ids = plain_ids(tokenizer, text) if is_plain else tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"{where} has no tokens; remove the row")
    return ids


def _leave_out(
    lengths: dict[int, int],
    num_rows: int,
    *,
    prefix: str,
    limit: int,
    too_long: str,
    note: Callable[[str], None],
) -> None:
    """Notes that prompts are left out as too long, or raises ValueError."""
    first = ", ".join(f"{index} ({length})" for index, length in islice(lengths.items(), 10))
    more = f" and {len(lengths) - 10} more" if len(lengths) > 10 else ""
    sentence = (
        f"{len(lengths)} of {num_rows} rows of {prefix} have more than data.max_prompt_length={limit} "
        f"tokens: row {first}{more}"
    )
    some_are_left = len(lengths) < num_rows
    if not (some_are_left and too_long == "drop"):
        other = ", or leave such rows out with data.too_long=drop" if some_are_left else ""
        raise ValueError(f"{sentence}; raise data.max_prompt_length to {max(lengths.values())}{other}")
    note(f"{sentence}; they are left out (data.too_long=drop)")


def _refuse_idle(where: str, system_prompt: str | None, variables: Mapping[str, Any] | None) -> None:
    """Raises ValueError for keys that need a chat where a prompt stays plain text."""
    for name, value in (("system_prompt", system_prompt), ("chat_template_kwargs", variables)):
        if value:
            raise ValueError(
                f"{where}: data.{name} does nothing for a prompt that data.chat=false keeps as plain text; "
                "leave it out, or use data.chat=true"
            )


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of plain text: a beginning-of-text token once where the tokenizer adds one, and no end of text.

    Some tokenizers add an end of text after the prompt, which would tell the model that nothing follows.
    """
    ids, bare = (tokenizer(text, add_special_tokens=added)["input_ids"] for added in (True, False))
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if len(ids) > len(bare) and ids[-1:] == [end] and bare != ids[-len(bare) :]:
        ids = ids[:-1]
    if len(ids) > len(bare) and begin is not None and ids[:2] == [begin, begin]:
        ids = ids[1:]
    return ids


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


def _prompt_of(row: Mapping[str, Any], prompt_column: str, columns: Sequence[str], where: str) -> Any:
    """The prompt of a row; raises ValueError if its column or a named one is missing."""
    for name in (prompt_column, *columns):
        check_column(name, row, f"{where}data.{'prompt_column' if name == prompt_column else 'columns'}")
    return row[prompt_column]


def check_column(name: str, known: Collection[str], where: str) -> None:
    """Raises ValueError if `name` is not among the known columns; the message names a similar one."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise ValueError(
            f"{where}: the dataset has no column {name!r}; it has {', '.join(map(repr, known))}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )


def _checked(columns: dict[str, Any], where: str) -> dict[str, Any]:
    """The columns; raises ValueError if JSON cannot carry them to grader processes and the ledger."""
    for name, value in columns.items():
        try:
            json.dumps({name: value}, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError(
                f"{where}: column {name!r} holds {type(value).__name__} {value!r:.60}, but columns must be "
                "JSON values (text, finite numbers, booleans, lists, dicts); convert it, or name only the "
                "columns that graders need in data.columns"
            ) from None
    return columns


def kept_columns(row: Mapping[str, Any], prompt_column: str, columns: Sequence[str] = ()) -> dict[str, Any]:
    """The columns of a row that graders get: the named ones, or all, and never the prompt."""
    return {name: row[name] for name in (columns or row) if name != prompt_column}
