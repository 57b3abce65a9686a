"""GSM8K as chats that show, in worked examples, how a solution ends in a box."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes.tasks import load_rows
from recipes.tasks.named import split_solution
from rl.config import DataConfig


def boxed_gsm8k(
    *, source: str = "openai/gsm8k", split: str = "train", num_examples: int = 2, size: int | None = None
) -> list[dict[str, Any]]:
    """Rows with `prompt` (worked examples, then the question) and `answer` (the number).

    Args:
        source: hub name, or a file with the columns question and answer. Its first `num_examples` rows are
            the examples and are not prompts of their own.
        size: number of prompts; None: all.
    """
    count = None if size is None else size + num_examples
    options = {} if Path(source).is_file() else {"name": "main"}
    rows = load_rows(DataConfig(source=source, split=split, options=options, size=count))
    parsed = [(row["question"], *split_solution(row["answer"])) for row in rows]
    shots = [
        message
        for question, working, answer in parsed[:num_examples]
        for message in (
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"{working}\n\\boxed{{{answer}}}"},
        )
    ]
    return [
        {"prompt": [*shots, {"role": "user", "content": question}], "answer": answer}
        for question, _, answer in parsed[num_examples:]
    ]
