"""Training prompts that an evaluation asks too: equal ones, and those that share 13 consecutive words.

GPT-3 used 13 words as well (arXiv:2005.14165, appendix C). Word runs that more than 2 % of the evaluation
prompts share (and at least two) are the task's wording, and do not count.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from recipes.tasks import load_rows
from recipes.tasks.prompts import unrendered_prompt
from rl.config import Config
from rl.config.data import OverlapConfig
from rl.model.messages import messages_of

N = 13
WORD = re.compile(r"\w+")
SIGN = re.compile(r"[+*/^<>×÷]|[-−](?=\s*\d)|(?<=\d\s)[-−]|(?<![^\W\d])[-−](?!\s)")  # no dash of words
RENDERING = ("template", "system_prompt", "chat", "chat_template_kwargs", "continue_final_message")
Row = dict[str, Any]


def parts_of(prompt: Any) -> tuple[tuple[str, ...], str]:
    """(words, signs) of a prompt, or of a chat's last message, without case and punctuation."""
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        last = prompt[-1] if prompt else ""
        prompt = last.get("content") if isinstance(last, Mapping) else last
    text = unicodedata.normalize("NFKC", str(prompt)).casefold()
    return tuple(WORD.findall(text)), "".join(SIGN.findall(text)).replace("−", "-")


def grams(words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """All runs of 13 consecutive words; a shorter prompt has none."""
    return (words[i : i + N] for i in range(len(words) - N + 1))


def overlapping(training: Sequence[Any], heldout: Sequence[Any]) -> tuple[set[int], set[int]]:
    """(indices of training prompts that equal a held-out one, of others that share 13 words with one)."""
    asked = {parts_of(prompt) for prompt in heldout}
    whole = {words for words, _ in asked}
    counts = Counter(gram for words in whole for gram in set(grams(words)))
    telling = {gram for gram, number in counts.items() if number <= max(1, len(whole) // 50)}
    equal, shared = set[int](), set[int]()
    for index, prompt in enumerate(training):
        if (parts := parts_of(prompt)) in asked:
            equal.add(index)
        elif any(gram in telling for gram in grams(parts[0])):
            shared.add(index)
    return equal, shared


def settle_overlap(
    config: Config, rows: list[Row], heldout: Sequence[Row], say: Callable[[str], None]
) -> list[Row]:
    """The training rows that `evaluation.overlap` keeps; reports how many equal or overlap held-out ones.

    Raises:
        ValueError: some overlap and `evaluation.overlap` is `refuse`, or all of them overlap.
    """
    held = config.heldout_data
    if held is None:
        return rows
    prompts = [row.get(config.data.prompt_column) for row in rows]
    asked = [row.get(held.prompt_column) for row in heldout]
    equal, shared = overlapping(prompts, asked)
    left_out = set[int]()
    is_alike = all(getattr(config.data, key) == getattr(held, key) for key in RENDERING)
    if config.evaluation.overlap == "warn" and is_alike:  # the same tokens are left out anyway
        same = {repr(prompt) for prompt in asked}
        left_out = {index for index in equal if repr(prompts[index]) in same}
    rule = ("evaluation.overlap", config.evaluation.overlap)
    return _settled(rows, equal - left_out, shared=shared, rule=rule, say=say, but=len(left_out))


def without_asked(
    overlap: OverlapConfig | None, rows: list[Row], column: str, say: Callable[[str], None]
) -> list[Row]:
    """`settle_overlap` of rows to fine-tune on or to sample: those that `overlap` leaves.

    Args:
        column: of the prompts; of rows without it, what users say in `messages`, or the `text`, counts.
            Rows are compared with the evaluation's prompts in its template and without it.
    """
    if overlap is None:
        return rows

    def said(row: Row, index: int) -> Any:
        if column in row:
            return row[column]
        messages = messages_of(row.get("messages") or [], f"row {index}: 'messages'")
        return " ".join(m["content"] for m in messages if m["role"] == "user") or row.get("text")

    held, asked = load_rows(overlap.data), [*map(said, rows, count())]
    framed = [
        p.messages or p.text for p in (unrendered_prompt(overlap.data, r, "overlap.data") for r in held)
    ]
    bare = [row[overlap.data.prompt_column] for row in held]
    found = [overlapping(asked, those) for those in (framed, bare)]
    equal, shared = (set.union(*some) for some in zip(*found, strict=True))
    shared -= equal
    return _settled(rows, equal, shared=shared, rule=("overlap.action", overlap.action), say=say)


def _settled(
    rows: list[Row],
    equal: set[int],
    *,
    shared: set[int],
    rule: tuple[str, str],
    say: Callable[[str], None],
    but: int = 0,
) -> list[Row]:
    """`but`: number of rows that are left out anyway, and are not among those that the sentence counts."""
    key, action = rule
    if not equal | shared:
        return rows
    sentence = (
        f"of {len(rows) - but} training prompts {len(equal)} equal a held-out one, and {len(shared)} share "
        f"{N} consecutive words with one (such as row {min(equal | shared)})"
    )
    if action == "refuse":
        raise ValueError(f"{sentence}; use other rows, or {key}=drop to leave these out")
    if action == "warn":
        say(f"{sentence}; {key}=drop leaves them out")
        return rows
    say(f"{sentence}; they are left out")
    if len(equal | shared) == len(rows):
        raise ValueError(f"{sentence}: nothing is left; use another split")
    return [row for index, row in enumerate(rows) if index not in equal | shared]
