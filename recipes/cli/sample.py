"""`cohort sample`: samples from a model, server or file and keeps verified traces for `recipes.sft`."""

from __future__ import annotations

import argparse

from recipes.cli.command import add_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, such="sample.num_samples=16", example="recipes/configs/gsm8k_traces.yaml")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="records are split over them")


def run(arguments: argparse.Namespace) -> int:
    words = [arguments.config, *arguments.overrides]
    if arguments.processes > 1:
        from recipes.cli.launch import launch

        return launch(words, arguments.processes, "recipes.rejection")
    from recipes.rejection import main

    return main(words)
