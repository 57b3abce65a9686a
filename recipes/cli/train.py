"""`cohort train`: trains with GRPO from a config, in this process or in several on this machine."""

from __future__ import annotations

import argparse

from recipes.cli.command import add_config
from recipes.finished import is_finished
from rewards.plugins import reward_names
from rl.config.read import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, such="train.steps=20 model.dtype=fp32")
    add = parser.add_argument
    add("--processes", type=_count, metavar="N", help="default: one per GPU; without a GPU, one")
    said = "resume with other settings, such as another learning rate; changes.jsonl records them"
    add("--change", action="store_true", help=said)


def run(arguments: argparse.Namespace) -> int:
    """Checks the config before torch is loaded, then trains; returns the run's exit code."""
    if is_finished(load_config(arguments.config, arguments.overrides, rewards=reward_names())):
        return 0
    import torch

    gpus = torch.cuda.device_count()
    processes = arguments.processes or max(1, gpus)
    if 0 < gpus < processes:
        raise ValueError(f"--processes {processes}, but the number of GPUs is {gpus}; each needs its own")
    recipe = [arguments.config, *arguments.overrides, *(["--change"] if arguments.change else [])]
    if processes == 1:
        from recipes.grpo import main as grpo

        return grpo(recipe)
    from recipes.cli.launch import launch

    return launch(recipe, processes)


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


_count.__name__ = "number of processes"
