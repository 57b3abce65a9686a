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
