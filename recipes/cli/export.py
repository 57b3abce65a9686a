"""`cohort export`: a checkpoint as a clean Hugging Face folder, proved before it is published."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", type=Path, metavar="RUN_OR_CHECKPOINT")
    add("--to", type=Path, metavar="FOLDER", help="default: RUN/export/step-N, -merged, -bf16")
    add("--checkpoint", type=int, metavar="N", help="step; default: the newest whole one")
    add("--merge", action="store_true", help="LoRA added to its base, with a proof")
    add("--dtype", choices=("bf16", "fp32"), help="default: as stored; of a merged model its base's")
    add("--push", metavar="NAME", help="upload it into a new private repository of the hub")


def run(arguments: argparse.Namespace) -> int:
    from recipes.export import export

    names = ("to", "checkpoint", "merge", "dtype", "push")
    export(arguments.source, **{name: getattr(arguments, name) for name in names})
    return 0
