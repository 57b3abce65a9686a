"""Rows of a task as prompts: rendered once, kept apart from the held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rl.config import DataConfig
from rl.types import Prompt
from rollout.chat import as_messages, kept_columns, render_prompts


def grader_columns(data: DataConfig, rows: Sequence[dict[str, Any]]) -> tuple[set[str], dict[str, Any]]:
    """Names of the columns that reach the graders, and one row of them."""
    row = rows[0] if rows else {}
    kept = {name: row[name] for name in data.columns or row if name in row and name != data.prompt_column}
    return set(kept), kept


def unrendered_prompt(data: DataConfig, row: Mapping[str, Any], where: str) -> Prompt:
    """The prompt of a row as graders see it in training; without token ids, as that takes a tokenizer."""
    for name in (data.prompt_column, *data.columns):
        if name not in row:
            raise ValueError(f"{where}: the dataset has no column {name!r}; it has {', '.join(row)}")
    messages, text = as_messages(row[data.prompt_column], data.system_prompt, data.template, data.chat, where)
    return Prompt(where, text, (), messages, kept_columns(row, data.prompt_column, data.columns))


def make_prompts(
    data: DataConfig, rows: Sequence[dict[str, Any]], tokenizer: Any, prefix: str
) -> list[Prompt]:
    return render_prompts(
        rows,
        tokenizer,
        prefix=prefix,
        prompt_column=data.prompt_column,
        columns=data.columns,
        system_prompt=data.system_prompt,
        template=data.template,
        chat=data.chat,
        max_prompt_length=data.max_prompt_length,
    )


def without(prompts: list[Prompt], heldout: list[Prompt], note: Callable[[str], None]) -> list[Prompt]:
    """The training prompts that are not among the held-out ones, token for token.

    Raises:
        ValueError: nothing is left.
    """
    seen = {p.token_ids for p in heldout}
    kept = [p for p in prompts if p.token_ids not in seen]
    if len(kept) < len(prompts):
        note(f"{len(prompts) - len(kept)} of {len(prompts)} training prompts are held out, and left out here")
    if not kept:
        raise ValueError(
            "every training prompt is among evaluation.data; use another split or seed for one of them"
        )
    return kept
