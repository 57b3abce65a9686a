"""reasoning-gym arithmetic as chats that show, in solved examples, how an answer is boxed."""

from __future__ import annotations

from typing import Any

import reasoning_gym

EXAMPLES = (("7 + 5", "12"), ("48 - 20", "28"), ("3 - 9", "-6"))
QUESTION = "State the final answer to the following arithmetic problem: {} ="


def boxed_chain_sum(
    *, size: int, seed: int, num_terms: int = 2, max_digits: int = 2, num_examples: int = 3
) -> list[dict[str, Any]]:
    """Rows with `prompt` (solved examples, then the question), `answer` and reasoning-gym's `entry`.

    The examples' questions are worded like the generator's, and their answers are nothing but a box.
    """
    shots = [
        message
        for expression, answer in EXAMPLES[:num_examples]
        for message in (
            {"role": "user", "content": QUESTION.format(expression)},
            {"role": "assistant", "content": f"\\boxed{{{answer}}}"},
        )
    ]
    entries = reasoning_gym.create_dataset(
        "chain_sum", size=size, seed=seed, min_terms=num_terms, max_terms=num_terms, max_digits=max_digits
    )
    return [
        {
            "prompt": [*shots, {"role": "user", "content": entry["question"]}],
            "answer": entry["answer"],
            "entry": entry,
        }
        for entry in entries
    ]


def solved_chain_sum(*, size: int, seed: int, **options: int) -> list[dict[str, Any]]:
    """The rows of `boxed_chain_sum` with their `completion`, for supervised fine-tuning."""
    return [
        {**row, "completion": [{"role": "assistant", "content": f"\\boxed{{{row['answer']}}}"}]}
        for row in boxed_chain_sum(size=size, seed=seed, **options)
    ]


def worked_chain_sum(
    *, size: int, seed: int, num_terms: int = 4, max_digits: int = 2
) -> list[dict[str, Any]]:
    """Rows with a text `prompt`, `answer`, and a `completion` that thinks: one line for each partial sum."""
    entries = reasoning_gym.create_dataset(
        "chain_sum", size=size, seed=seed, min_terms=num_terms, max_terms=num_terms, max_digits=max_digits
    )
    rows = []
    for entry in entries:
        first, *rest = entry["metadata"]["expression"].split()
        total, lines = int(first), []
        for sign, term in zip(rest[::2], rest[1::2], strict=True):
            before, total = total, total + int(term) * (-1 if sign == "-" else 1)
            lines.append(f"{before} {sign} {term} = {total}")
        assert str(total) == entry["answer"]
        working = "\n".join(lines)
        completion = f"<think>\n{working}\n</think>\n\\boxed{{{total}}}"
        rows.append({"prompt": entry["question"], "answer": entry["answer"], "completion": completion})
    return rows
