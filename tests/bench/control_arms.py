"""How much of a gain is the task's: a config with its own rewards, with random ones, and with format alone.

    python -m tests.bench.control_arms --out FOLDER [--config CONFIG.yaml] [--seeds 0,1,2] [--steps N]
        [--arms none,random,format] [--data FOLDER] [--set KEY=VALUE ...]
    python -m tests.bench.control_arms --write-data FOLDER     # the quickstart's rows; needs reasoning-gym

Each run is a process of its own (`recipes.grpo`), on the GPU where there is one. One that FOLDER holds with
the same settings is not run again. All arms are measured by the real reward on the same held-out prompts.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from rl.config.read import load_config
from tests.bench.launch import launch_or_exit, once

ROWS = {"data": "quickstart_train.jsonl", "evaluation.data": "quickstart_heldout.jsonl"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="recipes/configs/quickstart.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/control_arms"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default="none,random,format")
    parser.add_argument("--steps", type=int, help="default: the config's")
    parser.add_argument("--data", type=Path, help="rows that --write-data wrote")
    parser.add_argument("--write-data", type=Path)
    parser.add_argument("--set", nargs="*", default=[], help="overrides of all runs")
    parser.add_argument("--timeout-s", type=float, default=1800.0, help="for each run")
    a = parser.parse_args()
    if a.write_data:
        write_data(a.write_data, a.config)
        return
    given = [] if a.steps is None else [f"train.steps={a.steps}"]
    for section, file in ROWS.items() if a.data else ():
        given += [f"{section}.source={a.data / file}", f"{section}.options={{}}"]
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in a.arms.split(",")}
    for seed in a.seeds.split(","):
        for arm, results in found.items():
            folder = a.out / f"{arm}-{seed}"
            own = [f"rewards.control={arm}", f"train.seed={seed}", f"run_dir={folder}"]
            settings = [a.config, *given, *a.set, *own]
            once(folder, settings, lambda f=folder, s=settings: run(f, s, a.timeout_s), goes_on=True)
            results.append(json.loads((folder / "result.json").read_text()))
            print(row(arm, seed, results[-1]), flush=True)
    print(table(found))


def run(folder: Path, settings: list[str], timeout_s: float) -> None:
    launch_or_exit(folder.with_suffix(".log"), "recipes.grpo", settings, timeout_s)


def write_data(folder: Path, config: str) -> None:
    from recipes.tasks import load_rows

    loaded = load_config(config)
    assert loaded.evaluation.data is not None
    folder.mkdir(parents=True, exist_ok=True)
    for file, section in zip(ROWS.values(), (loaded.data, loaded.evaluation.data), strict=True):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in load_rows(section)))


def row(arm: str, seed: str, result: dict[str, Any]) -> str:
    before, after = (
        "{:.1f} % ({:.1f} to {:.1f})".format(
            100 * result[end], *(100 * bound for bound in result[f"{end}_interval"])
        )
        for end in ("heldout_before", "heldout_after")
    )
    return f"{arm:8s} seed {seed}: {before} -> {after}, n = {result['n']}, {result['seconds']:.0f} s"


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Mean gains over seeds with standard errors, and what share of the task's gain each arm has."""
    gains = {
        arm: [100 * (r["heldout_after"] - r["heldout_before"]) for r in results]
        for arm, results in found.items()
    }
    whole = statistics.mean(gains["none"]) if "none" in gains else math.nan
    lines = [
        "| arm | runs | gain, points (standard error over seeds) | share of the gain |",
        "|---|---|---|---|",
    ]
    for arm, values in gains.items():
        error = f"{statistics.stdev(values) / math.sqrt(len(values)):.1f}" if len(values) > 1 else "one seed"
        mean = statistics.mean(values)
        share = f"{mean / whole:.0%}" if whole else "-"
        lines.append(f"| {arm} | {len(values)} | {mean:+.1f} ({error}) | {share} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
