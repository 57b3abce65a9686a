"""Prompts as a teacher reads them: with a demonstration, a column of the data, that the policy never sees."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from recipes.tasks.prompts import make_prompts
from rl.config import Config, DataConfig
from rl.config.teacher import TeacherConfig
from rl.types import Prompt
from rollout.chat import check_column


def with_demonstrations(
    prompts: Sequence[Prompt],
    teacher: TeacherConfig,
    *,
    data: DataConfig,
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    **said: Any,
) -> list[Prompt]:
    """The prompts, made from `rows`, with `teacher_token_ids`: the same row rendered again by the same rules.

    `data.template` and the system prompt are put around the row's prompt in `teacher.template`.

    Raises:
        ValueError: a row has no demonstration, or no user's message that it could stand in.
    """
    read = {}
    for prompt in prompts:
        number = int(prompt.id.rpartition("/")[2])
        row, where = rows[number], f"teacher.demonstration: train row {number}"
        shown = _text_of(row, str(teacher.demonstration), where)
        read[number] = {
            **row,
            data.prompt_column: _with(shown, row[data.prompt_column], teacher.template, where),
        }
    free = data.model_copy(update={"max_prompt_length": sys.maxsize})
    taught = make_prompts(free, read, tokenizer, "train", **said)
    return [replace(p, teacher_token_ids=t.token_ids) for p, t in zip(prompts, taught, strict=True)]


def longest_taught(config: Config, prompts: Sequence[Prompt]) -> int:
    """Tokens of the longest prompt with a demonstration, and of its completion; 0 without any."""
    if config.teacher is None or config.teacher.demonstration is None:
        return 0
    return max(len(p.teacher_token_ids) for p in prompts) + config.sampling.max_completion_length


def _text_of(row: Mapping[str, Any], column: str, where: str) -> str:
    check_column(column, row, where)
    if not isinstance(text := row[column], str) or not text.strip():
        raise ValueError(
            f"{where}: column {column!r} holds {text!r:.60}, which is nothing that a teacher could show; "
            "write text there, or remove the row"
        )
    return text


def _with(demonstration: str, prompt: Any, template: str, where: str) -> Any:
    """A prompt of text set into the template; of a chat the user's last message."""
    if isinstance(prompt, str):
        parts = {"{demonstration}": demonstration, "{prompt}": prompt}
        return re.sub(r"\{demonstration\}|\{prompt\}", lambda found: parts[found[0]], template)
    asked = [i for i, message in enumerate(prompt) if message["role"] == "user"]
    if not asked or not isinstance(prompt[asked[-1]]["content"], str):
        raise ValueError(f"{where}: the prompt has no message of a user with text that it could stand in")
    changed = {
        **prompt[asked[-1]],
        "content": _with(demonstration, prompt[asked[-1]]["content"], template, where),
    }
    return [*prompt[: asked[-1]], changed, *prompt[asked[-1] + 1 :]]
