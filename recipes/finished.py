"""Tells whether a run has already finished, before torch, model and engine are loaded."""

from __future__ import annotations

import os

from rl.config import Config
from rl.config.read import differing, read_config
from rl.config.resume import FREE
from rl.report.safe_stream import say
from rl.store.folder import read_result


def is_finished(config: Config) -> bool:
    """Whether the run folder holds this config's result after all its steps; if so, prints that.

    False if something is missing, such as a held-out number or the checkpoint: starting the run adds it.
    Also False for several processes, which may not see the same files.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return False
    run_dir, wanted, result = config.run_dir, config.train.steps, read_result(config.run_dir)
    ends = ("heldout_before", "heldout_after") if config.evaluation.data is not None else ()
    steps = result.get("steps")
    if not isinstance(steps, int) or steps < wanted or any(result.get(end) is None for end in ends):
        return False
    if not (run_dir / "checkpoints" / f"step-{steps:06d}").is_dir():
        return False
    try:
        changed = differing(read_config(type(config), run_dir / "config.yaml"), config)
    except ValueError:
        return False
    if any(now != "auto" and key not in FREE for key, (_, now) in changed.items()):
        return False
    done = f"{steps} of {wanted} steps" if steps == wanted else f"{steps} steps, of {wanted} asked for"
    accuracy = f", held-out {result[ends[0]]:.1%} -> {result[ends[1]]:.1%}" if ends else ""
    say(f"already finished: {done}{accuracy}; results in {run_dir}/result.json")
    return True
