"""`cohort doctor rewards`: does each reward of a config do on its dataset what it is meant to?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

from recipes.tasks import find_modules_beside, load_rows
from recipes.tasks.prompts import unrendered_prompt
from rewards import doctor
from rewards.doctor import add_arguments as add_arguments
from rl.config.read import load_config


def run(arguments: argparse.Namespace) -> int:
    from recipes.grpo import reward_specs  # loads torch, which --help can do without

    find_modules_beside(arguments.config)
    data = load_config(arguments.config, arguments.overrides).data

    def load(path: str, overrides: Sequence[str]):
        return reward_specs(load_config(path, overrides)), load_rows(data), data.prompt_column

    return doctor.run(arguments, load, ask=partial(unrendered_prompt, data))
