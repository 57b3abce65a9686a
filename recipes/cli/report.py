"""`cohort report`: the page about a run, from the files of its folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from rl.report.report import build_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--out", type=Path, default=None)


def run(arguments: argparse.Namespace) -> int:
    out = arguments.out
    print(build_report(arguments.run_dir.expanduser(), out and out.expanduser()))
    return 0
