"""Prompts of a large dataset: those that a run will consume are rendered, the others are only checked."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Collection, Sequence
from typing import Any

from recipes.tasks.demonstrations import with_demonstrations
from recipes.tasks.prompts import make_prompts, without
from rewards.pool.ticket import is_json
from rl.config import Config, DataConfig
from rl.types import Prompt
from rollout.chat import kept_columns
from rollout.prompts import PromptStream

MANY = 20_000  # rows; rendering them takes about ten seconds
PROBES = ("7 and Zq?", "what\nis (it) in 3 words: x")
SLACK = 4  # tokens: a beginning-of-text token, and the space that some tokenizers put before a text


class SomePrompts(Sequence[Prompt]):
    """The prompts of the rows `kept`; `ready` holds the rendered ones by row, and `render` makes others."""

    def __init__(self, kept: Sequence[int], ready: dict[int, Prompt], render: Any) -> None:
        self.kept, self.ready, self.render = kept, ready, render

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: Any) -> Any:
        if (row := self.kept[index]) not in self.ready:
            self.ready |= self.render([row])
        return self.ready[row]


def train_prompts(
    config: Config, rows: Sequence[dict[str, Any]], heldout: Sequence[Prompt], tokenizer: Any, **said: Any
) -> Sequence[Prompt]:
    """The training prompts that are not among the held-out ones, in order, by the rules of `make_prompts`.

    In a large dataset, sound rows are rendered only if the steps will consume them. These are plain text, not
    held out, and surely short, since a token holds at least a byte. Other rows are rendered at once.
    """
    data, note, teacher = config.data, said["note"], config.teacher
    if teacher is not None and teacher.demonstration is not None:
        prompts = without(make_prompts(data, rows, tokenizer, "train", **said), list(heldout), note)
        return with_demonstrations(prompts, teacher, data=data, rows=rows, tokenizer=tokenizer, **said)
    frame = _frame(data, rows[0], tokenizer, said) if len(rows) > MANY else None
    if frame is None:
        return without(make_prompts(data, rows, tokenizer, "train", **said), list(heldout), note)
    before, after, bytes_per_token = frame
    cost = frame_tokens(before, after, tokenizer)
    room = (data.max_prompt_length - SLACK - cost) / bytes_per_token
    framed = (p.text for p in heldout if p.text.startswith(before) and p.text.endswith(after))
    taken = {_key(text[len(before) : len(text) - len(after)]) for text in framed}

    def render(some: Collection[int]) -> dict[int, Prompt]:
        chosen = {i: rows[i] for i in some}
        made = make_prompts(data, chosen, tokenizer, "train", num_rows=len(rows), **said) if some else []
        return {int(prompt.id.rpartition("/")[2]): prompt for prompt in made}

    doubtful = [i for i, row in enumerate(rows) if not _is_sound(data, row, room, taken)]
    ready, seen = render(doubtful), {p.token_ids for p in heldout}
    fit = len(rows) - len(doubtful) + len(ready)
    left_out = {i for i in doubtful if i not in ready or ready[i].token_ids in seen}
    kept = [i for i in range(len(rows)) if i not in left_out] if left_out else range(len(rows))
    if not kept:
        return without([*ready.values()], list(heldout), note)  # raises: nothing is left
    if len(kept) < fit:
        note(f"{fit - len(kept)} of {fit} training prompts are held out too: left out")
    t, dynamic = config.train, config.advantage.dynamic_sampling
    num_consumed = t.steps * t.prompts_per_step * (dynamic.max_rounds if dynamic else 1)
    stream: Any = PromptStream(kept, seed=t.seed, shuffle=data.shuffle)  # pyright: ignore[reportArgumentType]
    wanted = kept if num_consumed >= len(kept) else {stream.at(n) for n in range(num_consumed)}
    return SomePrompts(kept, ready | render(sorted({*wanted} - ready.keys())), render)


def _is_sound(data: DataConfig, row: dict[str, Any], room: float, taken: set[str]) -> bool:
    """Whether the prompt is text that surely fits and is not held out, with all columns as JSON values."""
    value = row.get(data.prompt_column)
    if not isinstance(value, str) or row.get("tools") or not all(name in row for name in data.columns):
        return False
    columns, key = kept_columns(row, data.prompt_column, data.columns).values(), _key(value)
    fits = len(value.encode("utf-8", "surrogatepass")) <= room
    return fits and bool(key) and key not in taken and all(map(is_json, columns))


def frame_tokens(before: str, after: str, tokenizer: Any) -> int:
    """Upper bound of the tokens that a template's frame adds to any text. It counts those of both parts, and
    one per byte of the words and spaces next to the text, whose tokens may reach into it.
    """
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after)]
    touching = re.search(r"\S*\s*$", before), re.match(r"\s*\S*", after)
    return sum(map(len, ids)) + sum(len(found[0].encode()) for found in touching if found)


def _key(text: str) -> str:
    """A key that texts share if template and tokenizer may turn them into the same tokens."""
    return unicodedata.normalize("NFC", text.strip())


def _frame(
    data: DataConfig, row: dict[str, Any], tokenizer: Any, said: dict[str, Any]
) -> tuple[str, str, int] | None:
    """(text before each prompt, text after it, most bytes that normalization makes of one byte).

    None if that is unknown for this template, tokenizer or dataset.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(row.get(data.prompt_column), str) or row.get("tools"):
        return None
    parts = json.loads(backend.to_str())
    by_bytes = parts["model"]["type"] == "BPE" and "ByteLevel" in json.dumps(parts["pre_tokenizer"])
    growth = {None: 1, "NFC": 3}.get((parts["normalizer"] or {}).get("type"))
    if growth is None or not (by_bytes or parts["model"]["type"] == "WordLevel"):
        return None
    probes, free = [{**row, data.prompt_column: p} for p in PROBES], {"max_prompt_length": 1 << 30}
    made = make_prompts(data.model_copy(update=free), probes, tokenizer, "train", **said)
    frames = {tuple(prompt.text.split(probe)) for prompt, probe in zip(made, PROBES, strict=True)}
    (found, *others) = frames
    return (found[0], found[1], growth) if not others and len(found) == 2 else None


def longest_row(config: Config, prompts: Sequence[Prompt], heldout: list[Prompt]) -> int:
    """Tokens of the longest prompt plus its longest completion. Where only some of many prompts are rendered,
    `data.max_prompt_length` is taken, so that the result does not depend on the number of steps.
    """
    is_some, others = isinstance(prompts, SomePrompts), [len(p.token_ids) for p in heldout]
    longest = config.data.max_prompt_length if is_some else max(len(p.token_ids) for p in prompts)
    ends = [longest + config.sampling.max_completion_length]
    return max(ends + [n + config.evaluation.sampling.max_completion_length for n in others])
