"""The `cohort` command. A subcommand's module is imported only when called, and torch only when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version

from recipes.cli.command import run_command, say_fault

COMMANDS = {
    "train": ("recipes.cli.train", "train with GRPO; the same command again resumes a stopped run"),
    "report": (
        "recipes.cli.report",
        "rebuild report.html from a run folder, finished or not; or compare runs",
    ),
    "denoising": (
        "recipes.cli.denoising",
        "show the order in which a diffusion model wrote a run's completions",
    ),
    "init": ("recipes.cli.init", "write a config for your own dataset, after a look at its first rows"),
    "config": ("recipes.cli.config", "check a config, print or explain its keys, or print their JSON schema"),
    "plan": ("recipes.cli.plan", "predict a run's GPU memory, and the settings that fill the GPU"),
    "export": ("recipes.cli.export", "write a checkpoint as a clean Hugging Face folder, and verify it"),
    "eval": ("recipes.cli.eval", "measure models, checkpoints and runs on a task, and compare them"),
    "sample": ("recipes.cli.sample", "sample, verify and keep traces to fine-tune on (rejection sampling)"),
    "serve": ("recipes.cli.serve", "start vLLM servers for a run, locked by a token"),
    "score": ("recipes.cli.score", "grade the rows of a file with a reward"),
    "doctor": ("recipes.cli.doctor", "check the rewards of a config against its dataset, before a run"),
}
"""Command -> (module with `add_arguments` and `run`, what it does)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code; a fault that the user can fix is one line on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--version"]:
        print(f"cohort {version('cohort-rl')}")
        return 0
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        near = get_close_matches(words[0], COMMANDS, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(COMMANDS)}"
        say_fault(f"no command {words[0]!r}; {hint}")
        return 2
    parser = argparse.ArgumentParser(
        prog="cohort", description="Reinforcement-learning post-training for language models."
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, help_text) in COMMANDS.items():
        command = commands.add_parser(name, help=help_text)
        if words[:1] == [name]:
            called = import_module(module)
            called.add_arguments(command)
            command.set_defaults(run=called.run)
    arguments, others = parser.parse_known_args(words)
    if others and not hasattr(arguments, "others"):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    arguments.others = others
    return run_command(lambda: arguments.run(arguments))
