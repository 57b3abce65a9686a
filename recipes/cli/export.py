"""`cohort export`: writes a checkpoint as a clean Hugging Face folder, verified before it is published."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", type=Path, metavar="RUN_OR_CHECKPOINT", help="the folder of a run, or of its checkpoint")
    add("--to", type=Path, metavar="FOLDER", help="default: RUN/export/step-N, -merged, -bf16")
    add("--checkpoint", type=int, metavar="N", help="step; default: the newest complete one")
    add("--merge", action="store_true", help="merge LoRA weights into their base, and verify the result")
    add("--dtype", choices=("bf16", "fp32"), help="default: as stored; when merged, as the base")
    add("--push", metavar="NAME", help="upload it to a new private repository on the hub")


def run(arguments: argparse.Namespace) -> int:
    from recipes.export import export

    names = ("to", "checkpoint", "merge", "dtype", "push")
    export(arguments.source, **{name: getattr(arguments, name) for name in names})
    return 0
