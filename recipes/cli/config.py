"""`cohort config`: a config of any kind, checked, with every key and what it means. It loads no torch."""

from __future__ import annotations

import argparse
import sys

from rl.config.describe import described
from rl.config.read import command_of, read_any_config
from rl.report.safe_stream import say
from rl.store.redact import redact


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def run(arguments: argparse.Namespace) -> int:
    config = read_any_config(arguments.config, arguments.overrides)
    tree = config.model_dump(mode="json")
    if (shown := redact(tree)) != tree:
        say("secrets are shown as ***; put them back before you use this as a config", sys.stderr)
    print(f"# of `{command_of(config)}`: every key, and what it means\n{described(config, shown)}", end="")
    return 0
