"""What tests of teachers share."""

from __future__ import annotations

from dataclasses import replace

ALONE = ("rewards.functions=[]", "loss.kl_coef=0")


def shown(groups, length=lambda number: 3 + 4 * number):
    """The groups with prompts for a teacher: ids of ragged lengths before those of the prompt."""
    found = []
    for number, scored in enumerate(groups):
        prompt = scored.prompt
        ids = tuple(5 + (7 * number + 3 * i) % 90 for i in range(length(number))) + prompt.token_ids
        group = replace(scored.group, prompt=replace(prompt, teacher_token_ids=ids))
        found.append(replace(scored, group=group))
    return found
