"""Workload W on 1, 2 and 4 GPUs of one host: weak scaling, and the same prompts on more cards.

    python -m tests.bench.scaling [--counts 1,2,4] [--stale 0,1] [--steps 6] [--logs DIR] [--set KEY=VALUE]

Weak: `--prompts` of them for each card. Strong: as many in all. The single card comes first and again at the
end, as the noise of the host is part of every ratio. Tokens a second are medians of all steps but the first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from rl.store.rows import read_rows
from tests.bench.launch import last_lines, run_within
from tests.bench.workload import Workload, write_model


@dataclass(frozen=True)
class Case:
    """A run on so many cards; `kind`: weak, strong, or the baseline."""

    kind: str
    cards: int
    prompts: int
    staleness: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.cards}-stale{self.staleness}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    Workload.add_arguments(parser)
    parser.set_defaults(steps=6)
    parser.add_argument("--counts", default="1,2,4", help="cards; those that are not there are left out")
    parser.add_argument("--stale", default="0,1", help="train.max_staleness")
    parser.add_argument("--timeout-s", type=float, default=300.0, help="for each run")
    parser.add_argument("--logs", type=Path, default=Path("."))
    parser.add_argument("--set", nargs="*", default=[], help="overrides of Cohort's config")
    a = parser.parse_args()
    workload = Workload.of(a)
    workload.export()
    a.logs.mkdir(parents=True, exist_ok=True)
    here = max(1, torch.cuda.device_count())
    counts = [n for n in map(int, a.counts.split(",")) if n <= here or not torch.cuda.is_available()]
    with tempfile.TemporaryDirectory() as scratch:
        model = write_model(Path(scratch) / "model", workload)
        rows = [
            one_run(case, model, workload, Path(scratch), a)
            for case in cases(counts, [int(n) for n in a.stale.split(",")], workload.prompts)
        ]
    print(table(rows), flush=True)
    return int(any(row["rc"] for row in rows))


def cases(counts: list[int], stalenesses: list[int], prompts: int) -> list[Case]:
    found = []
    for staleness in stalenesses:
        more = [n for n in counts if n > 1]
        found.append(Case("baseline", 1, prompts, staleness))
        found += [Case("weak", n, n * prompts, staleness) for n in more]
        found += [Case("strong", n, prompts, staleness) for n in more]
        found.append(Case("again", 1, prompts, staleness))
    return found


def one_run(case: Case, model: Path, workload: Workload, scratch: Path, a: Any) -> dict[str, Any]:
    replace(workload, prompts=case.prompts).export()
    folder = scratch / case.name
    config = {
        "run_dir": str(folder),
        "model": {"name": str(model)} | ({"lora": {"r": workload.lora}} if workload.lora else {}),
        "data": {"source": "tests.bench.workload:rows", "max_prompt_length": workload.prompt_length},
        "sampling": {"max_completion_length": workload.max_length, "stop_token_ids": workload.stop_ids},
        "rewards": {"functions": [{"name": "tests.bench.workload:coin"}]},
        "train": {
            "steps": workload.steps,
            "prompts_per_step": case.prompts,
            "group_size": workload.group,
            "max_staleness": case.staleness,
        },
        "checkpoint": {"every": 0},
    }
    path, log = scratch / f"{case.name}.yaml", a.logs / f"{case.name}.log"
    path.write_text(yaml.safe_dump(config))
    command = [
        sys.executable,
        "-m",
        "recipes.cli",
        "train",
        str(path),
        "--processes",
        str(case.cards),
        *a.set,
    ]
    code = run_within(a.timeout_s, command, log)
    if code:
        print(f"{case.name} ended with {code}; {last_lines(log)}", flush=True)
    steps = (read_rows(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else [])[1:]
    parts = ("step", "sample", "train", "sync", "pack", "score")
    row = {"case": case, "rc": code, "tokens_per_s": median(steps, "tokens/per_second")}
    row |= {part: median(steps, f"time/{part}") for part in parts} | {"peak": median(steps, "memory/peak")}
    print(json.dumps(row | {"case": case.name}), flush=True)
    return row


def median(steps: list[dict[str, Any]], name: str) -> float:
    return statistics.median(row.get(name, 0.0) for row in steps) if steps else 0.0


def table(rows: list[dict[str, Any]]) -> str:
    """Each run against the mean of the single card's two in tokens a second: speed-up, and that per card."""
    head = f"{'run':20s}{'cards':>6s}{'prompts':>8s}{'tokens/s':>10s}{'speed-up':>9s}{'per card':>9s}"
    lines = [head + "".join(f"{part:>8s}" for part in ("step", "sample", "train", "sync", "pack", "peak"))]
    for row in rows:
        case = row["case"]
        alone = [
            r["tokens_per_s"] for r in rows if r["case"].cards == 1 and r["case"].staleness == case.staleness
        ]
        speed = row["tokens_per_s"] / (statistics.mean(alone) or float("nan"))
        text = f"{case.name:20s}{case.cards:6d}{case.prompts:8d}{row['tokens_per_s']:10.0f}{speed:9.2f}"
        parts = "".join(f"{row[part]:8.2f}" for part in ("step", "sample", "train", "sync", "pack", "peak"))
        lines.append(f"{text}{speed / case.cards:9.2f}{parts}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
