"""Reward functions as TRL's users write them, and one that writes down what it was called with."""

import asyncio
import json
import time

from rewards.completion import last_message_text

CALLS = {"hang": lambda: time.sleep(1000), "raise": lambda: {}["answer"]}


def longest(completions, **kwargs):
    """Compares: 1 for the longest completion of the group. Some texts make the whole call fail."""
    texts = [last_message_text(completion) for completion in completions]
    for text in texts:
        CALLS.get(text, lambda: None)()
    return [float(len(text) == max(map(len, texts))) for text in texts]


def refuses_groups(completions, **kwargs):
    if len(completions) > 1:
        raise RuntimeError("one at a time, please")
    return [1.0]


def curriculum(
    prompts, completions, completion_ids, trainer_state, log_extra=None, log_metric=None, **kwargs
):
    """Every argument that TRL's trainer passes."""
    log_extra("text", [completion[-1]["content"] for completion in completions])
    log_metric("calls", 1.0)
    share = trainer_state.global_step / trainer_state.max_steps
    return [share + len(ids) + 100 * len(completions) for ids in completion_ids]


async def ranked(completions, **kwargs):
    """Asks for each completion beside the others, then ranks them."""
    texts = await asyncio.gather(*(_asked(completion[0]["content"]) for completion in completions))
    return [float(sorted(texts, key=len).index(text)) for text in texts]


async def _asked(text):
    await asyncio.sleep(0.01)
    return text


class Recorder:
    """Appends its keyword arguments to a file."""

    def __init__(self, path):
        self.path = path

    def __call__(self, prompts, completions, **columns):
        columns = {name: values for name, values in columns.items() if isinstance(values, list)}
        with open(self.path, "a") as file:
            file.write(json.dumps({"prompts": prompts, "completions": completions, **columns}) + "\n")
        return [1.0] * len(completions)
