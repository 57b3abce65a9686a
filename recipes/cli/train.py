"""`cohort train`: trains with GRPO from a config, in this process or in several on this machine."""

from __future__ import annotations

import argparse

from recipes.finished import is_finished
from rewards.score import take_flags_anywhere
from rl.config.read import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file, such as recipes/configs/quickstart.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as train.steps=20 model.dtype=fp32"
    )
    parser.add_argument(
        "--processes",
        type=_count,
        default=None,
        metavar="N",
        help="default: one per GPU; without a GPU, one",
    )
    parser.add_argument(
        "--change",
        action="store_true",
        help="resume with other settings, such as another learning rate; changes.jsonl records them",
    )
    take_flags_anywhere(parser)


def run(arguments: argparse.Namespace) -> int:
    """Checks the config before torch is loaded, then trains; returns the run's exit code."""
    if is_finished(load_config(arguments.config, arguments.overrides)):
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
