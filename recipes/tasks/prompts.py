"""Rows of a task as prompts: rendered once, kept apart from the held-out ones."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.tasks import load_rows
from rewards.pool.pool import RewardPool
from rl.config import Config, DataConfig
from rl.types import Prompt
from rollout.chat import chat_messages, check_column, check_text, kept_columns, render_prompts

BRACES = re.compile(r"\\[A-Za-z]+\s*(?:\[\w*\])?(?:\{\w*\})*|(?<![\\^_])\{(\w+)\}")  # \frac{a}{b} is LaTeX
RENDERED_BY = ("prompt_column", "columns", "system_prompt", "template", "chat", "chat_template_kwargs")
RENDERED_BY += ("continue_final_message", "max_prompt_length", "too_long")
"""Keys of `data` by which `rollout.chat.render_prompts` renders rows."""


def load_sets(
    config: Config, note: Callable[[str], None]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training rows, held-out rows), the latter from `evaluation.data` or a share of the former."""
    rows, held = load_rows(config.data), config.evaluation.data
    if held is None:
        return rows, []
    if held.share is None:
        return rows, load_rows(held)
    kept, heldout = split_share(
        rows, held.share, seed=config.train.seed, prompt_column=config.data.prompt_column
    )
    note(
        f"evaluation.data.share={held.share:g}: {len(heldout)} of the {len(rows)} rows of data.source are "
        f"held out, {len(kept)} are trained on"
    )
    return kept, heldout


def split_share(
    rows: Sequence[dict[str, Any]], share: float, *, seed: int, prompt_column: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows to train on, rows held out): a share of the distinct prompts, by a hash of prompt and seed.

    At least one prompt is held out. The order of the rows does not matter, and rows with the same prompt stay
    together.

    Raises:
        ValueError: there are fewer than two distinct prompts.
    """

    encode = json.JSONEncoder(sort_keys=True, default=str).encode

    def mark(row: dict[str, Any]) -> str:
        prompt = encode(row.get(prompt_column, row))
        return hashlib.sha256(f"{seed} {prompt}".encode()).hexdigest()

    marks = [mark(row) for row in rows]
    distinct = sorted(set(marks))
    if len(distinct) < 2:
        raise ValueError(
            f"evaluation.data.share={share:g} splits at least two distinct prompts, but data.source has "
            f"{len(distinct)}; give evaluation.data a source of its own"
        )
    chosen = set(distinct[: min(max(1, round(share * len(distinct))), len(distinct) - 1)])
    sides: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for row, found in zip(rows, marks, strict=True):
        sides[found in chosen].append(row)
    return sides


def grader_columns(data: DataConfig, rows: Sequence[dict[str, Any]]) -> tuple[set[str], dict[str, Any]]:
    """Names of the columns that reach the graders, and their values in the first row."""
    row = rows[0] if rows else {}
    kept = {name: row[name] for name in data.columns or row if name in row and name != data.prompt_column}
    return set(kept), kept


def check_rewards(
    pool: RewardPool,
    data: DataConfig,
    rows: Sequence[dict[str, Any]],
    warn: Callable[[str], None],
    *,
    key: str | None = "data.template",
) -> None:
    """Warns of rows without what a reward needs, which are sampled and then not graded; of a template that
    leaves something out; and of whole numbers that the hub's one type a column may have turned into floats.
    `key`: where the user wrote the template; None: it was looked at before.

    Raises:
        ValueError: no row has a column that a reward needs (`RewardPool.check_columns`).
    """
    if key is not None:
        check_braces(data.template, rows, warn, key=key)
    pool.check_columns(*grader_columns(data, rows))
    on_hub = ":" not in data.source and not Path(data.source).exists()
    for asks in pool.asks:
        for column in asks.required:
            if empty := sum(row.get(column) in (None, "") for row in rows):
                warn(
                    f"{empty} of {len(rows)} rows of {data.source} have no {column!r}, which reward "
                    f"{asks.name!r} needs: completions without a verdict teach nothing; fill it in, or leave "
                    "such rows out"
                )
            whole = [v for row in rows if isinstance(v := row.get(column), float) and v.is_integer()]
            if whole and on_hub and asks.name not in ("math", "math_verify"):
                warn(
                    f"column {column!r} of {data.source} holds floats such as {whole[0]}, perhaps because "
                    f"the hub's reader gives a column one type: the text {whole[0]:.0f} is not {whole[0]}; "
                    f"let reward {asks.name!r} compare numbers, or download the file and give its path"
                )


def check_braces(
    template: str,
    rows: Sequence[Mapping[str, Any]],
    warn: Callable[[str], None],
    *,
    key: str = "data.template",
    replaced: Sequence[str] = ("prompt",),
) -> None:
    """Warns of braces in a template that look as if they were replaced, which only `replaced` are.

    Other braces are kept: a template may hold JSON or LaTeX.
    """
    names = {*BRACES.findall(template)} - {*replaced, ""}
    if found := [f"{{{name}}}" for name in (rows[0] if rows else ()) if name in names]:
        only = " and ".join(f"{{{name}}}" for name in replaced)
        warn(
            f"{key} has {', '.join(found)}, which the model sees as it stands, though the rows have such a "
            f"column: it replaces {only}, nothing else; put the column's text into the prompts, as a "
            "data.source=module:callable can"
        )
    if any(f"{{{{{name}}}}}" in template for name in (*replaced, "")):
        warn(f"{key} has {{{{ and }}}}, which the model sees doubled: write single braces")


def unrendered_prompt(data: DataConfig, row: Mapping[str, Any], where: str) -> Prompt:
    """The prompt of a row as graders see it in training, without token ids, which need a tokenizer."""
    for name in (data.prompt_column, *data.columns):
        check_column(name, row, where)
    value, kept = row[data.prompt_column], kept_columns(row, data.prompt_column, data.columns)
    if not data.chat and isinstance(value, str):
        return Prompt(where, data.template.replace("{prompt}", check_text(value, where)), (), (), kept)
    return Prompt(where, "", (), chat_messages(value, data.system_prompt, data.template, where), kept)


def make_prompts(
    data: DataConfig,
    rows: Sequence[dict[str, Any]] | Mapping[int, dict[str, Any]],
    tokenizer: Any,
    prefix: str,
    *,
    template_file: str | None,
    note: Callable[[str], None],
    num_rows: int | None = None,
) -> list[Prompt]:
    return render_prompts(
        rows,
        tokenizer,
        num_rows=num_rows,
        prefix=prefix,
        template_file=template_file,
        note=note,
        **{key: getattr(data, key) for key in RENDERED_BY},
    )


def without(prompts: list[Prompt], heldout: list[Prompt], note: Callable[[str], None]) -> list[Prompt]:
    """The training prompts that are not among the held-out ones, token for token.

    Raises:
        ValueError: nothing is left.
    """
    seen = {p.token_ids for p in heldout}
    kept = [p for p in prompts if p.token_ids not in seen]
    if len(kept) < len(prompts):
        note(f"{len(prompts) - len(kept)} of {len(prompts)} training prompts are held out too: left out")
    if not kept:
        raise ValueError(
            "every training prompt is among evaluation.data; use another split or seed for one of them"
        )
    return kept
