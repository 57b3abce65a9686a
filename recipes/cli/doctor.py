"""`cohort doctor rewards`: checks that each reward of a config works as intended on its dataset."""

from __future__ import annotations

import argparse
from functools import partial

from recipes.tasks import find_modules_beside, load_rows
from recipes.tasks.prompts import unrendered_prompt
from rewards.compose import reward_specs
from rewards.doctor import examine_all
from rewards.score import add_deadline, take_flags_anywhere
from rl.config.read import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Check the rewards of a config against its dataset, before a run."
    parser.add_argument("what", choices=["rewards"], help="what to check")
    parser.add_argument("config", help="a YAML file, such as recipes/configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.size=100")
    parser.add_argument("--rows", type=int, default=200, help="number of dataset rows to try")
    parser.add_argument("--gold", help="the column that holds the right answer (default: found by its name)")
    parser.add_argument("--workers", type=int, default=2, help="grader processes")
    add_deadline(parser)
    take_flags_anywhere(parser)


def run(arguments: argparse.Namespace) -> int:
    find_modules_beside(arguments.config)
    config = load_config(arguments.config, arguments.overrides)
    specs, rows, ask = (
        reward_specs(config.rewards.functions),
        load_rows(config.data),
        partial(unrendered_prompt, config.data),
    )
    options = {name: getattr(arguments, name) for name in ("gold", "workers", "deadline")}
    tried = rows[: arguments.rows]
    return examine_all(specs, tried, prompt_column=config.data.prompt_column, ask=ask, **options)
