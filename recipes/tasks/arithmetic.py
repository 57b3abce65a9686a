"""Arithmetic that a small model cannot do in its head, and demonstrations with a Python tool and without."""

from __future__ import annotations

import random
from contextlib import closing
from typing import Any

from recipes.environments import load
from recipes.environments.arithmetic import value_of

FORMS = ("{a} * {b}", "{a} * {b} + {c}", "{a} * {b} - {c}", "({a} + {b}) * {c}", "({a} - {b}) * {c}")


def rows(*, size: int, seed: int, max_digits: int = 4) -> list[dict[str, Any]]:
    """Rows with a text `prompt`, its `expression` and the `answer`; numbers have 3 to `max_digits` digits."""
    draw, made = random.Random(seed), []
    for _ in range(size):
        a, b, c = (draw.randrange(100, 10 ** draw.randint(3, max_digits)) for _ in range(3))
        expression = draw.choice(FORMS).format(a=a, b=b, c=c)
        prompt = f"Compute {expression}. Put the result into \\boxed{{}}."
        made.append({"prompt": prompt, "expression": expression, "answer": value_of(expression)})
    return made


def demonstrations(*, size: int, seed: int, direct: float = 1.0, max_digits: int = 4) -> list[dict[str, Any]]:
    """Chats for supervised fine-tuning that box the answer, as `messages`.

    Args:
        direct: share of them that answer at once. The others call the tool `python`, as the environment of
            that name shows it, and read its answer. Below 1 all of them show the `tools`.
    """
    tools = []
    if direct < 1:
        with closing(load("python", {})) as environment:
            tools = list(environment.tools)
    draw, made = random.Random(seed + 1), []
    for row in rows(size=size, seed=seed, max_digits=max_digits):
        messages: list[dict[str, Any]] = [{"role": "user", "content": row["prompt"]}]
        if draw.random() >= direct:
            call = {"name": "python", "arguments": {"code": f"print({row['expression']})"}}
            messages += [
                {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
                {"role": "tool", "name": "python", "content": f"{row['answer']}\n"},
            ]
        messages.append({"role": "assistant", "content": f"\\boxed{{{row['answer']}}}"})
        made.append({"messages": messages, "tools": tools})
    return made
