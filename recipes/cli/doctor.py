"""`cohort doctor rewards`: checks that each reward of a config works as intended on its dataset."""

from __future__ import annotations

import argparse
from functools import partial

from recipes.cli.command import add_config
from recipes.tasks import find_modules_beside, load_rows
from recipes.tasks.prompts import unrendered_prompt
from rewards.compose import reward_specs
from rewards.doctor import examine_all
from rewards.plugins import reward_names
from rewards.score import add_deadline
from rl.config.read import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Check the rewards of a config against its dataset, before a run."
    parser.add_argument("what", choices=["rewards"], help="what to check")
    add_config(parser, such="data.size=100")
    parser.add_argument("--rows", type=int, default=200, help="number of dataset rows to try")
    parser.add_argument("--gold", help="the column that holds the right answer (default: found by its name)")
    parser.add_argument("--workers", type=int, default=2, help="grader processes")
    add_deadline(parser)


def run(arguments: argparse.Namespace) -> int:
    find_modules_beside(arguments.config)
    config = load_config(arguments.config, arguments.overrides, rewards=reward_names())
    specs, rows = reward_specs(config.rewards.functions), load_rows(config.data)
    options = {name: getattr(arguments, name) for name in ("gold", "workers", "deadline")}
    options |= {"prompt_column": config.data.prompt_column, "ask": partial(unrendered_prompt, config.data)}
    return examine_all(specs, rows[: arguments.rows], **options)
