"""Runs with nothing set but the model: does the plan fit, and is what it predicts what a run takes?

    python -m tests.bench.fitting 0.5b 1.5b 7b:lora [--card-gib 80] [--set KEY=VALUE]
    TMPDIR=/dev/shm python -m tests.bench.fitting 1.5b@80 7b:lora@80 3b@80 7b    # all weights, with KL
    python -m tests.bench.fitting 0.5b 1.5b 7b:lora --llada    # diffusion models, trained without rewards

`--card-gib`, or `@GIB` after a shape, plays a smaller card: this process holds the rest of the GPU. For each
shape: what was chosen and what it costs, the training process's peak and the whole card's against the plan,
seconds until step 1 and of each step, tokens a second, and the exit code. A run is killed after its last
step (exit code 0) and need not write its checkpoint; TMPDIR must have room for it, or the run ends at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from rl.store.rows import read_rows
from tests.bench.launch import last_lines, run_within
from tests.bench.workload import Workload, write_model

GIB = 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="+")
    parser.add_argument("--card-gib", type=float, default=None)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--llada", action="store_true", help="recipes.llada on texts of 1 to 2,048 tokens")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of Cohort's config")
    parser.add_argument("--timeout-s", type=float, default=280.0, help="for each shape")
    parser.add_argument("--logs", type=Path, default=Path("."))
    a = parser.parse_args()
    rows, failed = [], False
    a.logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name in a.shapes:
            words, _, gib = name.partition("@")
            shape, _, lora = words.partition(":")
            workload = Workload(shape=shape, steps=a.steps)
            workload.export()
            model = write_model(Path(scratch) / shape, workload)
            gib = float(gib) if gib else a.card_gib
            ballast = hold_all_but(gib) if gib else None
            found = one_run(
                Path(scratch) / name.translate({ord(":"): "-", ord("@"): "-"}), model, workload, bool(lora), a
            )
            del ballast
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            failed |= found["rc"] != 0
            rows.append({"shape": name} | found)
            print(json.dumps(rows[-1]), flush=True)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return int(failed)


def hold_all_but(gib: float) -> torch.Tensor:
    free = torch.cuda.mem_get_info()[0]
    return torch.empty(max(0, int(free - gib * GIB)), dtype=torch.uint8, device="cuda")


def used_bytes() -> int:
    """Bytes of the whole GPU; 0 without one, where what is left of the command can be tried."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def one_run(folder: Path, model: Path, workload: Workload, lora: bool, a: Any) -> dict[str, Any]:
    config = {
        "run_dir": str(folder),
        "model": {"name": str(model)} | ({"lora": {"r": 16}} if lora else {}),
        "data": {"source": "tests.bench.workload:rows", "max_prompt_length": workload.prompt_length},
        "sampling": {"max_completion_length": workload.max_length, "stop_token_ids": workload.stop_ids},
        "rewards": {"functions": [{"name": "tests.bench.workload:coin"}]},
        "train": {"steps": a.steps, "prompts_per_step": workload.prompts, "group_size": workload.group},
        "checkpoint": {"every": 0},
    }
    if a.llada:
        data = {"source": "tests.bench.workload:texts", "max_length": 2048}
        train = {"steps": a.steps, "examples_per_step": 64}
        model_of = config["model"] | {"mask_token": "<t9>"}
        config = {"run_dir": str(folder), "model": model_of, "data": data, "train": train}
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "recipes.llada" if a.llada else "recipes.grpo", str(path), *a.set]
    log, began, held = a.logs / f"{folder.name}.log", time.monotonic(), used_bytes()
    most, first = 0, None

    def watch() -> bool:
        nonlocal most, first
        most = max(most, used_bytes() - held)
        done = len(read_rows(folder / "metrics.jsonl")) if (folder / "metrics.jsonl").exists() else 0
        if first is None and done:
            first = time.monotonic() - began
        return done >= a.steps

    code = run_within(a.timeout_s, command, log, watch)
    if code:
        print(last_lines(log), flush=True)
    plan = json.loads((folder / "plan.json").read_text()) if (folder / "plan.json").exists() else None
    steps = read_rows(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    training, card = ((plan or {}).get(key, 0) / GIB for key in ("training", "total"))
    peak = max((row.get("memory/peak", 0.0) for row in steps), default=0.0)
    return {
        "rc": code,
        "training_predicted": round(training, 1),
        "training_peak": round(peak, 1),
        "ratio": round(training / peak, 3) if peak else None,
        "card_predicted": round(card, 1),
        "card_peak": round(most / GIB, 1),
        "first_step_s": first and round(first, 1),
        "step_s": [round(row["time/step"], 2) for row in steps],
        "tokens_per_s": [round(row["tokens/per_second"]) for row in steps if "tokens/per_second" in row],
        "chosen": plan and plan["chosen"],
        "costs_s": plan and plan.get("costs"),
    }


if __name__ == "__main__":
    sys.exit(main())
