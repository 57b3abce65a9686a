"""`cohort sample`: samples from a model, server or file and keeps verified traces for `recipes.sft`."""

from __future__ import annotations

import argparse

from rewards.score import take_flags_anywhere


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file, such as recipes/configs/gsm8k_traces.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as sample.num_samples=16")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="records are split over them")
    take_flags_anywhere(parser)


def run(arguments: argparse.Namespace) -> int:
    words = [arguments.config, *arguments.overrides]
    if arguments.processes > 1:
        from recipes.cli.launch import launch

        return launch(words, arguments.processes, "recipes.rejection")
    from recipes.rejection import main

    return main(words)
