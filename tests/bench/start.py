"""Seconds until a run's first step, with and without imports of vLLM beside the loading of the policy.

    python -m tests.bench.start CONFIG.yaml [section.key=value ...] [--rounds 2] [--timeout-s 280]

Each start is a run of one step in a program of its own, in turns: plain, early, plain, early. The first of a
machine also fills vLLM's own caches and does not count. Each line is the run's own ("ready after"). On a CPU,
the early side does it with engine.process=own, which a run does not.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time

PROGRAM = """
import sys
from recipes import grpo
from recipes.engines import ENGINE_LOG, begin_early, end_early, start_into
side = sys.argv.pop(1)
if side == "plain":
    grpo.begin_imports = lambda config: int
else:
    def begin(config):
        with start_into(config.run_dir / ENGINE_LOG):
            begin_early()
        return end_early
    grpo.begin_imports = begin
if __name__ == "__main__":
    sys.exit(grpo.main(sys.argv[1:]))
"""
READY = re.compile(r"ready after (\d+) s: .*")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="+")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--timeout-s", type=float, default=280.0)
    arguments = parser.parse_args()
    start("early", arguments.config, arguments.timeout_s)
    found: dict[str, list[float]] = {"plain": [], "early": []}
    for _ in range(arguments.rounds):
        for side, seconds in found.items():
            seconds.append(start(side, arguments.config, arguments.timeout_s))
    plain, early = (statistics.median(seconds) for seconds in found.values())
    print(f"median seconds of the program: plain {plain:.1f}, early {early:.1f}, ratio {plain / early:.2f}")


def start(side: str, config: list[str], timeout_s: float) -> float:
    """Seconds of a program that does one step; prints what the run says of its start."""
    with tempfile.TemporaryDirectory() as folder:
        own = [f"run_dir={folder}/run", "train.steps=1", "evaluation.data=null", "checkpoint.every=0"]
        command = [sys.executable, "-c", PROGRAM, side, *config, "engine.process=own", *own]
        began = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        seconds = time.monotonic() - began
    ready = READY.search(done.stdout)
    if ready is None or done.returncode:
        raise RuntimeError(f"the {side} start failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    print(f"{side}: {seconds:.1f} s in all, {ready[0]}", flush=True)
    return seconds


if __name__ == "__main__":
    main()
