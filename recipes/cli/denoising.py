"""`cohort denoising`: the order in which a diffusion model wrote the tokens of a run's completions."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console, Group
from rich.text import Text

from rl.report.traces import COLOURS, Trace, sampled_traces, shade_of, tokens_of, trace_of
from rl.store.ledger import Ledger
from rl.store.redact import strip_controls
from rl.types import Completion


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", help="the folder of a run of a masked diffusion model")
    parser.add_argument("--frames", type=int, default=6, help="steps to show of each completion")


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


def denoising_frames(completion: Completion, num_frames: int = 6) -> Group:
    """The completion at evenly spaced steps, first to last; tokens that were still masked are dots.

    Raises:
        ValueError: the completion has no trace.
    """
    trace = trace_of(completion)
    steps = dict.fromkeys(-(-trace.num_steps * k // num_frames) for k in range(1, num_frames + 1))
    return Group(*(_frame(trace, step) for step in steps))


def _frame(trace: Trace, step: int) -> Text:
    text = Text(f"after step {step} of {trace.num_steps}\n", style="dim")
    for piece, when in tokens_of(trace):
        shown = strip_controls(piece)
        if when < step:
            text.append(shown, style=COLOURS[shade_of(when, trace)])
        else:
            text.append("".join(c if c.isspace() else "·" for c in shown) or "·", style="dim")
    return text.append("\n")
