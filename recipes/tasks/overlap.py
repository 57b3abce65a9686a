"""Training prompts that an evaluation asks too: equal ones, and those that share 13 consecutive words.

Thirteen words is what GPT-3 (arXiv:2005.14165, appendix C) went by. Words that a fiftieth of the evaluation
prompts share, or two of fewer than a hundred, are the wording of the task, and give nothing away.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rl.config import Config

N = 13
WORD = re.compile(r"\w+")
RENDERING = ("template", "system_prompt", "chat", "chat_template_kwargs", "continue_final_message")
Row = dict[str, Any]


def words_of(prompt: Any) -> tuple[str, ...]:
    """The words of a prompt, of a chat of its last message, without case and punctuation."""
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        last = prompt[-1] if prompt else ""
        prompt = last.get("content") if isinstance(last, Mapping) else last
    return tuple(WORD.findall(unicodedata.normalize("NFKC", str(prompt)).casefold()))


def grams(words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Every 13 consecutive words; none of a shorter prompt."""
    return (words[i : i + N] for i in range(len(words) - N + 1))


def overlapping(training: Sequence[Any], heldout: Sequence[Any]) -> tuple[set[int], set[int]]:
    """(numbers of training prompts that equal a held-out one, of others that share 13 words with one)."""
    whole = {words_of(prompt) for prompt in heldout}
    counts = Counter(gram for words in whole for gram in set(grams(words)))
    telling = {gram for gram, number in counts.items() if number <= max(1, len(whole) // 50)}
    equal, shared = set[int](), set[int]()
    for index, prompt in enumerate(training):
        if (words := words_of(prompt)) in whole:
            equal.add(index)
        elif any(gram in telling for gram in grams(words)):
            shared.add(index)
    return equal, shared


def settle_overlap(
    config: Config, rows: list[Row], heldout: Sequence[Row], say: Callable[[str], None]
) -> list[Row]:
    """The training rows that `evaluation.overlap` leaves; says how many there are of which kind.

    Raises:
        ValueError: there are some, and it is `refuse`; or all of them are.
    """
    held = config.heldout_data
    if held is None:
        return rows
    prompts = [row.get(config.data.prompt_column) for row in rows]
    asked = [row.get(held.prompt_column) for row in heldout]
    equal, shared = overlapping(prompts, asked)
    is_alike = all(getattr(config.data, key) == getattr(held, key) for key in RENDERING)
    if config.evaluation.overlap == "warn" and is_alike:  # the same tokens are left out anyway
        same = {repr(prompt) for prompt in asked}
        equal = {index for index in equal if repr(prompts[index]) not in same}
    if not equal | shared:
        return rows
    sentence = (
        f"of {len(rows)} training prompts {len(equal)} equal a held-out one, and {len(shared)} share {N} "
        f"consecutive words with one (such as row {min(equal | shared)})"
    )
    if config.evaluation.overlap == "refuse":
        raise ValueError(f"{sentence}; use other rows, or evaluation.overlap=drop to leave these out")
    if config.evaluation.overlap == "warn":
        say(f"{sentence}; evaluation.overlap=drop leaves them out")
        return rows
    say(f"{sentence}; they are left out")
    if len(equal | shared) == len(rows):
        raise ValueError(f"{sentence}: nothing is left; use another split")
    return [row for index, row in enumerate(rows) if index not in equal | shared]
