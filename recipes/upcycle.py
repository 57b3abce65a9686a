"""Turns a dense model into a mixture: `python -m recipes.upcycle MODEL FOLDER --experts 8 --top-k 2`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.cli.command import run_command
from recipes.models import resolve_model
from rl.config import ModelConfig
from rl.model.loading import load_model, load_tokenizer
from rl.model.saving import save_model
from rl.moe.upcycling import upcycle
from rl.report.safe_stream import say


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m recipes.upcycle", description=__doc__)
    parser.add_argument("model", help="hub name, folder, or smollm2-135m-instruct")
    parser.add_argument("folder", type=Path, help="the new folder to write")
    parser.add_argument("--experts", type=int, default=8, metavar="E", help="copies of each layer's MLP")
    parser.add_argument("--top-k", type=int, default=2, metavar="K", help="experts per token")
    parser.add_argument("--family", default=None, help="of the mixture; default: mixtral for a Llama")
    parser.add_argument(
        "--noise", type=float, default=0.0, help="added to the copies, in standard deviations of the weights"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the routers and the noise")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _write(make_parser().parse_args(argv)))


def _write(arguments: argparse.Namespace) -> int:
    if arguments.folder.exists():
        raise ValueError(f"{arguments.folder} already exists; name a new folder")
    config = ModelConfig(name=resolve_model(arguments.model), dtype="fp32")
    mixture = upcycle(
        load_model(config),
        num_experts=arguments.experts,
        top_k=arguments.top_k,
        family=arguments.family,
        noise=arguments.noise,
        seed=arguments.seed,
    )
    save_model(mixture, mixture, arguments.folder)
    load_tokenizer(config).save_pretrained(arguments.folder)
    number = sum(parameter.numel() for parameter in mixture.parameters())
    said = f"{arguments.experts} experts, {arguments.top_k} per token, {number:,} parameters"
    say(f"{arguments.folder}: {mixture.config.model_type}, {said}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
