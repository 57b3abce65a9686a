"""Rewards of Cohort and of TRL's GRPOTrainer over steps and over seconds, same config, several seeds.

    python -m tests.bench.learning_curves CONFIG.yaml --out FOLDER [--seeds 0,1,2] [--set KEY=VALUE ...]

Each run is a process of its own, Cohort's is `recipes.grpo`; seeds and sides run one after the other. TRL's
last weights are evaluated by Cohort, on the config's held-out prompts if it has any. Both have the same
prompts in every step and sample with random numbers of their own. A run that FOLDER holds already, with the
same settings, is not run again; one of Cohort's that was ended on the way goes on, one of TRL's starts anew.
Writes FOLDER/curves.html and, over seconds, FOLDER/curves-seconds.html, and prints a table.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from pathlib import Path

import rl.report
from rl.config.read import load_config
from rl.report.groups import json_for_html
from rl.store.rows import read_rows
from tests.bench.launch import launch_or_exit, once

SIDES = ("cohort", "trl")
REPORT = Path(rl.report.__file__).parent
PAGE = """<!doctype html><meta charset="utf-8"><title>Learning curves</title><style>STYLE</style>
<main><h1>Learning curves</h1>
<p>SUBTITLE. Lines: means over seeds, bands: least and greatest.</p>
<div class="grid" id="figures"></div>
<p>TABLE</p></main>
<script type="application/json" id="curves">CURVES</script>
<script type="application/json" id="figure-list">FIGURES</script>
<script>SCRIPT</script>
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=seeds, default=seeds("0,1,2"))
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the config, for both sides")
    parser.add_argument("--timeout-s", type=float, default=3600.0, help="for each run")
    arguments = parser.parse_args()
    curves: dict[str, list[list[dict]]] = {side: [] for side in SIDES}
    accuracies: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for seed in arguments.seeds:
        settings = [arguments.config, *arguments.set, f"train.seed={seed}"]
        for side, run in zip(SIDES, (_cohort, _trl), strict=True):
            rows, accuracy = run(arguments.out / f"{side}-{seed}", settings, arguments.timeout_s)
            curves[side].append(rows)
            accuracies[side].append(accuracy)
            print(f"seed {seed} {side}: {_describe([rows], [accuracy])}", flush=True)
    lines = [f"{side}: {_describe(curves[side], accuracies[side])}" for side in SIDES]
    print("\n".join(lines))
    page = PAGE.replace("SUBTITLE", " ".join([Path(arguments.config).stem, *arguments.set]))
    page = page.replace("TABLE", "<br>".join(lines)).replace("STYLE", (REPORT / "report.css").read_text())
    page = page.replace("SCRIPT", (REPORT / "charts.js").read_text())
    for name, key in (("curves", "step"), ("curves-seconds", "seconds")):
        panel = {"lines": [["reward", key]], "kind": "lines", "unit": "score", "axis": key}
        figure = {"title": f"Mean reward over {key}", "note": "", "panels": [panel]}
        drawn = page.replace("CURVES", json_for_html(picture(curves, key)))
        drawn = drawn.replace("FIGURES", json_for_html({"first": [figure], "more": []}))
        (arguments.out / f"{name}.html").write_text(drawn)


def seeds(text: str) -> list[str]:
    """Raises ArgumentTypeError: not whole numbers, each once."""
    found = text.split(",")
    if not all(seed.isdecimal() for seed in found) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers, each once, such as 0,1,2")
    return found


def _cohort(folder: Path, settings: list[str], timeout_s: float) -> tuple[list[dict], tuple[float, float]]:
    log = folder.with_suffix(".log")
    arguments = [*settings, f"run_dir={folder}"]
    once(folder, settings, lambda: launch_or_exit(log, "recipes.grpo", arguments, timeout_s), goes_on=True)
    rows, seconds = [], 0.0
    for row in read_rows(folder / "metrics.jsonl"):
        seconds += row["time/step"]
        step = {"step": row["step"], "seconds": seconds, "reward": row["reward/mean"]}
        rows.append(step | {"length": row["completion/length_mean"]})
    result = json.loads((folder / "result.json").read_text())
    return rows, _accuracy(result)


def _trl(folder: Path, settings: list[str], timeout_s: float) -> tuple[list[dict], tuple[float, float]]:
    log, graded = folder.with_suffix(".log"), folder / "graded"
    is_evaluated = load_config(settings[0], settings[1:]).evaluation.data is not None

    def work() -> None:
        launch_or_exit(log, "tests.bench.trl_curve", [str(folder), *settings], timeout_s)
        if is_evaluated:  # the accuracy of these weights is what a run of one step finds before it
            own = [f"model.name={folder / 'model'}", "train.steps=1", f"run_dir={graded}"]
            launch_or_exit(log, "recipes.grpo", [*settings, *own], timeout_s)

    once(folder, settings, work)
    result = json.loads((graded / "result.json").read_text()) if is_evaluated else {}
    return read_rows(folder / "steps.jsonl"), (math.nan, _accuracy(result)[0])


def _accuracy(result: dict) -> tuple[float, float]:
    """Held-out accuracy before and after; NaN without an evaluation."""
    return result.get("heldout_before", math.nan), result.get("heldout_after", math.nan)


def _describe(curves: list[list[dict]], accuracies: list[tuple[float, float]]) -> str:
    """Mean and standard error over seeds of the reward (all steps, and the last quarter); median seconds."""
    whole = [statistics.mean(row["reward"] for row in rows) for rows in curves]
    late = [statistics.mean(row["reward"] for row in rows[-max(1, len(rows) // 4) :]) for rows in curves]
    seconds = statistics.median(rows[-1]["seconds"] / len(rows) for rows in curves)
    after = [100 * accuracy[1] for accuracy in accuracies]
    heldout = "" if any(map(math.isnan, after)) else f"held-out after {_spread(after, 1)} %; "
    return f"reward {_spread(whole)}, in the last quarter {_spread(late)}; {heldout}{seconds:.2f} s a step"


def _spread(values: list[float], digits: int = 3) -> str:
    error = f" +- {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{error}"


def picture(curves: dict[str, list[list[dict]]], key: str) -> list[dict]:
    """Mean, least and greatest reward over seeds, as curves of the report; over seconds, a step stands at its
    mean time.
    """
    sides = []
    for side in SIDES:
        steps = list(zip(*curves[side], strict=True))
        rewards = [[row["reward"] for row in rows] for rows in steps]
        places = [statistics.mean(row[key] for row in rows) for rows in steps]
        curve = [
            places,
            list(map(statistics.mean, rewards)),
            list(map(min, rewards)),
            list(map(max, rewards)),
        ]
        sides.append({"name": side, "curves": {key: curve}})
    return sides


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
