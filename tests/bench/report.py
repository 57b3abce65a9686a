"""`python -m tests.bench.report --rows 100000`: CPU time and memory of a report on that many rows."""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

from rl.report.report import build_report
from rl.store.ledger import Ledger
from rl.store.metrics import METRICS
from rl.types import Completion, Group, Prompt, Reward, ScoredGroup, VersionSpan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--groups", type=int, default=64, help="in each of 40 recorded steps")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        write_run(run, args.rows, args.groups)
        before, began = peak_mib(), time.process_time()
        page = build_report(run)
        print(
            f"{args.rows} rows ({(run / 'metrics.jsonl').stat().st_size >> 20} MiB): "
            f"{time.process_time() - began:.1f} s of CPU, {peak_mib() - before} MiB above {before}, "
            f"{page.stat().st_size / 1e6:.1f} MB of HTML"
        )


def write_run(run: Path, num_rows: int, num_groups: int) -> None:
    draw = random.Random(0)
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, num_rows + 1):
            row = {name: draw.random() for name in METRICS if not name.startswith("heldout/")}
            file.write(json.dumps({"step": step, **row, "reward/math/mean": draw.random()}) + "\n")
    ids = list(range(500))
    completions = [
        Completion(ids, [-0.5] * 500, [True] * 500, "stop", [VersionSpan(0, 500)], "word " * 400)
        for _ in range(8)
    ]
    groups = [
        ScoredGroup(Group(Prompt(str(i), "q", (1,)), completions), [Reward(float(k % 2)) for k in range(8)])
        for i in range(num_groups)
    ]
    for step in range(0, num_rows, max(1, num_rows // 40)):
        Ledger(run).write(step, groups, cursor_before=0, cursor_after=1, policy_version=0)


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


if __name__ == "__main__":
    main()
