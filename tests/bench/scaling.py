"""Workload W on 1, 2 and 4 GPUs of one host: weak scaling, and the same prompts on more cards.

    python -m tests.bench.scaling [--counts 1,2,4] [--stale 0,1] [--kinds weak,strong,served] [--steps 6]
        [--logs DIR] [--set KEY=VALUE]

Weak: `--prompts` of them for each card. Strong: as many in all. Served: as weak, but the first half of the
cards trains, and vLLM servers have the others; weights go by NCCL. The single card comes first and again at
the end, as the noise of the host is part of every ratio. Tokens a second are sums over all steps but the
first, parts of a step means over these: one step ahead, long steps and short ones take turns. "wait" is the
share of these steps in which trainers wait for completions, "idle" that of all seconds between its first
completion and its last in which a server has none. A run ends with a checkpoint of 12 bytes a parameter;
TMPDIR=/dev/shm keeps it off a slow disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from rl.store.rows import read_rows
from tests.bench.launch import last_lines, run_within
from tests.bench.server import Idle, serving
from tests.bench.workload import Workload, write_model
from tests.vllm_servers import free_port

PARTS = ("step", "sample", "train", "sync", "pack", "score")


@dataclass(frozen=True)
class Case:
    """A run on `cards` cards; `kind`: weak, strong, served, or the baseline."""

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
    parser.add_argument("--kinds", default="weak,strong", help="of runs on several cards; also: served")
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
            one_run(case, model, workload, Path(scratch), a) for case in cases(counts, a, workload.prompts)
        ]
    print(table(rows), flush=True)
    return int(any(row["rc"] for row in rows))


def cases(counts: list[int], a: Any, prompts: int) -> list[Case]:
    found = []
    for staleness in map(int, a.stale.split(",")):
        found.append(Case("baseline", 1, prompts, staleness))
        for kind in a.kinds.split(","):
            many = prompts if kind == "strong" else None
            found += [Case(kind, n, many or n * prompts, staleness) for n in counts if n > 1]
        found.append(Case("again", 1, prompts, staleness))
    return found


def one_run(case: Case, model: Path, workload: Workload, scratch: Path, a: Any) -> dict[str, Any]:
    replace(workload, prompts=case.prompts).export()
    folder, token = scratch / case.name, scratch / "token"
    config: dict[str, Any] = {
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
    trainers = case.cards // 2 if case.kind == "served" else case.cards
    idle, on_gpus = None, torch.cuda.is_available()
    with ExitStack() as stack:
        if case.kind == "served":
            length = workload.prompt_length + workload.max_length + 1
            words = ["--dtype", "bfloat16" if on_gpus else "float32", "--max-model-len", str(length)]
            words += ["--max-num-seqs", str(case.prompts * workload.group // (case.cards - trainers))]
            devices = range(trainers, case.cards) if on_gpus else ()
            server_log = a.logs / f"{case.name}-servers.log"
            urls = stack.enter_context(serving(model, server_log, token, *words, devices=devices))
            config["engine"] = {"name": "server", "urls": urls, "token_file": str(token)}
            config["engine"] |= {"weights_url": f"nccl://127.0.0.1:{free_port()}"} if on_gpus else {}
            idle = Idle(urls, token)
        path.write_text(yaml.safe_dump(config))
        seen = ["env", "CUDA_VISIBLE_DEVICES=" + ",".join(map(str, range(trainers)))] if on_gpus else []
        command = [*seen, sys.executable, "-m", "recipes.cli", "train", str(path)]
        command += ["--processes", str(trainers), *a.set]
        code = run_within(a.timeout_s, command, log, idle or int)
    if code:
        print(f"{case.name} ended with {code}; {last_lines(log)}", flush=True)
    steps = (read_rows(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else [])[1:]
    tokens = sum(row["tokens/per_second"] * row["time/step"] for row in steps)
    row = {part: statistics.mean(s.get(f"time/{part}", 0.0) for s in steps or [{}]) for part in PARTS}
    row |= {"case": case, "rc": code, "peak": max((s.get("memory/peak", 0.0) for s in steps), default=0.0)}
    row["tokens_per_s"] = tokens / (row["step"] * len(steps)) if steps else float("nan")
    row["wait"] = row["sample"] / (row["step"] or float("nan"))
    row["idle"] = idle.share() if idle else float("nan")
    print(json.dumps(row | {"case": case.name}), flush=True)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Each run against the mean of the single card's two in tokens a second: speed-up, and that per card."""
    head = f"{'run':20s}{'cards':>6s}{'prompts':>8s}{'tokens/s':>10s}{'speed-up':>9s}{'per card':>9s}"
    shown = (*PARTS, "peak", "wait", "idle")
    lines = [head + "".join(f"{part:>8s}" for part in shown)]
    for row in rows:
        case = row["case"]
        alone = [
            r["tokens_per_s"] for r in rows if r["case"].cards == 1 and r["case"].staleness == case.staleness
        ]
        speed = row["tokens_per_s"] / (statistics.mean(alone) or float("nan"))
        text = f"{case.name:20s}{case.cards:6d}{case.prompts:8d}{row['tokens_per_s']:10.0f}{speed:9.2f}"
        lines.append(f"{text}{speed / case.cards:9.2f}" + "".join(f"{row[part]:8.2f}" for part in shown))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
