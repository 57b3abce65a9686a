"""GSM8K's test set by several models: our grader and math-verify, where they disagree, and seconds.

    python -m tests.bench.evaluation MODEL [MODEL ...] --data gsm8k_test.jsonl --out FOLDER [--size N]
        [--graders math,math-verify] [--set KEY=VALUE ...]
    python -m tests.bench.evaluation --regrade FOLDER     # on a machine that has math-verify

Each model is a process of its own, `cohort eval`. Where math-verify is not installed, math alone grades, and
`--regrade` does the rest from the completions that FOLDER keeps.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path

from recipes.evaluation.evaluations import regrade
from tests.bench.launch import launch_or_exit

GRADERS = "math,math-verify"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="folders or hub names")
    parser.add_argument("--data", type=Path, help="a JSON-lines file with question and answer")
    parser.add_argument("--out", type=Path, default=Path("runs/evaluation"))
    parser.add_argument("--size", type=int, help="the first rows; default: all")
    parser.add_argument("--graders", default=GRADERS)
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the evaluation")
    parser.add_argument("--timeout-s", type=float, default=1800.0, help="for each model")
    parser.add_argument("--regrade", type=Path, help="grade the completions in a folder again")
    a = parser.parse_args()
    graders = a.graders.split(",")
    if a.regrade:
        folders = sorted(path.parent for path in a.regrade.glob("*/eval.json"))
        for folder in folders:
            regrade(folder, graders)
    elif not a.models or a.data is None:
        parser.error("name at least one model and --data, or --regrade")
    else:
        if importlib.util.find_spec("math_verify") is None:
            graders = [name for name in graders if name != "math-verify"]
        folders = [a.out / f"{i}-{Path(model).name}" for i, model in enumerate(a.models)]
        size = [] if a.size is None else [f"evaluation.data.size={a.size}"]
        for model, folder in zip(a.models, folders, strict=True):
            words = ["eval", model, "--task", str(a.data), "--graders", ",".join(graders)]
            began = time.monotonic()
            arguments = [*words, "--out", str(folder), *size, *a.set]
            launch_or_exit(folder.with_suffix(".log"), "recipes.cli", arguments, a.timeout_s)
            print(f"{model}: {time.monotonic() - began:.0f} s with its start", flush=True)
    print(table(folders))
    if not a.regrade and "math-verify" in a.graders and "math-verify" not in graders:
        print(f"math-verify is not installed here; where it is: {sys.argv[0]} --regrade {a.out}")


def table(folders: list[Path]) -> str:
    lines = ["| model | prompts | grader | right (95 %) | cut | abstained | tokens | apart | seconds |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for folder in folders:
        found = json.loads((folder / "eval.json").read_text())
        seconds = found["seconds"]["sample and grade"]
        for name, result in found["results"].items():
            grader = f"{name} {found['graders'][name]['version']}"
            value, low, high = (100 * result["avg"][key] for key in ("value", "low", "high"))
            lines.append(
                f"| {Path(found['model']).name} | {result['n']} | {grader} | "
                f"{value:.1f} % ({low:.1f} to {high:.1f}) | {result['truncated']:.1%} | "
                f"{result['abstained']:.1%} | {result['mean_tokens']:.0f} | {found['disagreements']} | "
                f"{seconds:.0f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
