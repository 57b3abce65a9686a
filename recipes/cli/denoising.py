"""`cohort denoising`: in which order a diffusion model wrote completions of a run."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from rl.report.traces import denoising_frames, sampled_traces
from rl.store.ledger import Ledger
from rl.store.redact import strip_controls


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir")
    parser.add_argument("--frames", type=int, default=6)


def run(arguments: argparse.Namespace) -> int:
    console = Console(highlight=False, markup=False)
    ledger = Ledger(arguments.run_dir)
    found = sampled_traces(ledger)
    for sentence in ledger.damaged:
        print(f"cohort: {strip_controls(sentence)}", file=sys.stderr)
    if not found:
        raise ValueError(f"{arguments.run_dir} holds no completion of a masked diffusion model")
    for step, scored, i in found:
        score = scored.rewards[i].score
        reward = "none" if score is None else f"{score:g}"
        console.print(f"step {step}, prompt {scored.prompt.id!r}, reward {reward}", style="bold")
        console.print(denoising_frames(scored.completions[i], max(arguments.frames, 1)))
    return 0
