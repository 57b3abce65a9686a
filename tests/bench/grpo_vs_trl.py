"""GRPO steps of Cohort and of TRL's GRPOTrainer on workload W, one after the other on the same device.

    python -m tests.bench.grpo_vs_trl [--shape 1.5b] [--steps 5] [--sides cohort,trl-best] [--set KEY=VALUE]

Both are whole runs in processes of their own: Cohort is `recipes.grpo` from a config, ledger and metrics
and the proof of weights included. Prints the seconds of every step, and of the steps that count: mean
seconds by phase, completion tokens over seconds, the training phase's model FLOPs utilisation, peak memory
of the training process, and the ratios. The warm-up does not count, nor does the end of a run that samples
ahead (`cohort-stale1`): its last steps have no sampling beside them.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from rl.store.rows import read_rows
from tests.bench.flops import peak_flops, training_flops
from tests.bench.launch import last_lines, launch
from tests.bench.workload import Workload, write_model

PHASES = ("sample", "score", "pack", "train", "sync", "rest")
WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    Workload.add_arguments(parser)
    parser.add_argument("--sides", default="cohort,trl-best,trl-default")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of Cohort's config")
    parser.add_argument("--timeout-s", type=float, default=300.0, help="for each side")
    parser.add_argument("--logs", type=Path, help="keep the output of each side here")
    arguments = parser.parse_args()
    workload = Workload.of(arguments)
    workload.export()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = write_model(folder / "model", workload)
        results = {}
        for side in arguments.sides.split(","):
            run = _cohort if side.startswith("cohort") else _trl
            steps = run(side, folder, model, workload, arguments)
            if not steps and side.startswith("cohort"):
                sys.exit(1)
            if steps:
                first, end, note = counted(len(steps), staleness(side))
                results[side] = summary(steps[first:end])
                seconds = " ".join(f"{step['step']:.2f}" for step in steps)
                print(f"{side}: {note}; seconds of each: {seconds}")
                print(side, json.dumps({k: round(v, 3) for k, v in results[side].items()}), flush=True)
    show(results)


def _launch(side: str, module: str, command: list[str], arguments: argparse.Namespace) -> None:
    """Runs a side to its end or its time limit; what it measured until then counts."""
    log = (arguments.logs or Path(tempfile.gettempdir())) / f"{side}.log"
    log.unlink(missing_ok=True)
    try:
        if launch(log, module, command, arguments.timeout_s):
            print(f"{side} did not end well; {last_lines(log)}")
    except subprocess.TimeoutExpired:
        print(f"{side} was ended after {arguments.timeout_s:g} s")


def _trl(
    side: str, folder: Path, model: Path, workload: Workload, arguments: argparse.Namespace
) -> list[dict]:
    out = folder / f"{side}.json"
    command = [str(model), str(out), side.removeprefix("trl-")]
    _launch(side, "tests.bench.trl_side", command, arguments)
    return json.loads(out.read_text()) if out.exists() else []


def _cohort(
    side: str, folder: Path, model: Path, workload: Workload, arguments: argparse.Namespace
) -> list[dict]:
    run_dir = folder / side
    stale = staleness(side)
    config = {
        "run_dir": str(run_dir),
        "model": {
            "name": str(model),
            "dtype": "bf16-mixed",
            **({"lora": {"r": workload.lora, "alpha": 2 * workload.lora}} if workload.lora else {}),
        },
        "data": {"source": "tests.bench.workload:rows", "max_prompt_length": workload.prompt_length},
        "sampling": {"max_completion_length": workload.max_length, "stop_token_ids": workload.stop_ids},
        "rewards": {"functions": [{"name": "tests.bench.workload:coin"}]},
        "train": {
            "steps": workload.steps,
            "prompts_per_step": workload.prompts,
            "group_size": workload.group,
            "token_budget": 12288,
            "max_staleness": stale,
        },
        "loss": {"name": "dapo", "kl_coef": 0.0, "clip_high": 0.2},
        "optimizer": {"lr": 1e-6},
        "checkpoint": {"every": 0},
    }
    if not stale:
        config["loss"]["sampler_correction"] = None
    file = folder / f"{side}.yaml"
    file.write_text(yaml.safe_dump(config))
    _launch(side, "recipes.grpo", [str(file), *arguments.set], arguments)
    if not (run_dir / "metrics.jsonl").exists():
        return []
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)  # tens of GiB with the moments
    rows = read_rows(run_dir / "metrics.jsonl")
    return [_cohort_step(row, n, run_dir, model) for n, row in enumerate(rows)]


def _cohort_step(row: dict, step: int, run_dir: Path, model: Path) -> dict[str, float]:
    from rl.store.ledger import Ledger

    times = {phase: row[f"time/{phase}"] for phase in PHASES if f"time/{phase}" in row}
    times["rest"] = row["time/step"] - sum(times.values())
    times |= {name: seconds for name, seconds in row.items() if name.startswith("sync/seconds_")}
    recorded = Ledger(run_dir, 0, 1).read(step)
    assert recorded is not None
    lengths = [(len(g.prompt.token_ids), [len(c.token_ids) for c in g.completions]) for g in recorded.groups]
    flops = training_flops(json.loads((model / "config.json").read_text()), lengths)
    return times | {
        "step": row["time/step"],
        "tokens": row["tokens/completion"],
        "peak": row.get("memory/peak", 0.0),
        "flops": flops,
    }


def staleness(side: str) -> int:
    """Steps that a side samples ahead."""
    return int(side.removeprefix("cohort-stale")) if side.startswith("cohort-stale") else 0


def counted(num_steps: int, stale: int) -> tuple[int, int, str]:
    """The first step that counts, the one after the last, from 0, and a sentence that says so.

    A run that samples ahead has long and short steps in turn, as many in a row as it is ahead. Only whole
    turns count; if none is left, all steps after the warm-up of any run do.
    """
    first, end = WARM_UP + stale, num_steps - (1 + stale if stale else 0)
    end -= max(0, end - first) % (1 + stale)
    if end > first:
        return first, end, f"steps {first + 1} to {end} of {num_steps} count"
    first = max(0, min(WARM_UP, num_steps - 1))
    return (
        first,
        num_steps,
        (f"too few steps to leave out warm-up and end, so {first + 1} to {num_steps} of {num_steps} count"),
    )


def summary(steps: list[dict]) -> dict[str, float]:
    """Means over steps, so that phases add up to the step; rates are sums over sums; the largest peak."""
    names = sorted({name for step in steps for name in step} - {"flops"})
    means = {name: statistics.fmean(step.get(name, 0.0) for step in steps) for name in names}
    means |= {"peak": max(step["peak"] for step in steps), "per_second": means["tokens"] / means["step"]}
    if "flops" in steps[0]:
        trained = sum(step.get("train", 0.0) for step in steps)
        means["mfu"] = sum(step["flops"] for step in steps) / trained / peak_flops()
    return means


def show(results: dict[str, dict[str, float]]) -> None:
    columns = ("step", *PHASES)
    print(
        f"\n{'seconds':14s}" + "".join(f"{c:>8s}" for c in columns) + f"{'tok/s':>9s}{'MFU':>6s}{'GiB':>7s}"
    )
    for side, r in results.items():
        cells = "".join(_cell(r.get(c), 8, 2) for c in columns)
        rates = _cell(r["per_second"], 9, 0) + _cell(r.get("mfu"), 6, 2) + _cell(r["peak"], 7, 1)
        print(f"{side:14s}{cells}{rates}")
    for ours in (side for side in results if side.startswith("cohort")):
        for theirs in (side for side in results if side.startswith("trl")):
            a, b = results[theirs], results[ours]
            phases = "  ".join(
                f"{p} {a[p] / b[p]:.2f}x" for p in ("sample", "train", "sync") if b.get(p) and a.get(p)
            )
            speed = b["per_second"] / a["per_second"]
            print(f"{theirs} / {ours}: tokens per second {speed:.2f}x; seconds {phases}")


def _cell(value: float | None, width: int, digits: int) -> str:
    """A number, or "-" where there is none."""
    return f"{'-':>{width}s}" if value is None or math.isnan(value) else f"{value:{width}.{digits}f}"


if __name__ == "__main__":
    main()
