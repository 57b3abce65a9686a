"""The `cohort` command. A command's module is imported when it is called for, and torch when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from rl.report.command import run_command

COMMANDS = {
    "train": ("recipes.cli.train", "train with GRPO; started again, it goes on where it stopped"),
    "report": ("recipes.cli.report", "rebuild report.html from a run folder, finished or not"),
    "denoising": (
        "recipes.cli.denoising",
        "show in which order a diffusion model wrote completions of a run",
    ),
    "config": ("recipes.cli.config", "check a config and print every key with its meaning"),
    "plan": ("recipes.cli.plan", "predict a run's GPU memory, and the settings that fill the GPU"),
    "score": ("rewards.score", "grade the rows of a file with a reward"),
    "doctor": ("recipes.cli.doctor", "check the rewards of a config against its dataset, before a run"),
}
"""Command -> (module with `add_arguments` and `run`, what it does)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code; a fault the user can mend is one sentence on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="cohort", description="Reinforcement-learning post-training for language models."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, help_text) in COMMANDS.items():
        command = commands.add_parser(name, help=help_text)
        if words[:1] == [name]:
            called = import_module(module)
            called.add_arguments(command)
            command.set_defaults(run=called.run)
    arguments = parser.parse_args(words)
    return run_command(lambda: arguments.run(arguments))
