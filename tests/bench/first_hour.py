"""A newcomer's first hour by the README's commands, with the seconds of every step.

    python -m tests.bench.first_hour [--rows 1000000] [--folder DIR]

Own rows with a `solution` column, a reward in ./rewards.py, LoRA, two processes, Ctrl-C, another learning
rate, a report of two runs, a script, and a file of a million rows. Ends with 1 where a step ends otherwise
than the README says.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REWARD = """\
def short(prompts, completions, **columns):
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [1.0 / (1 + len(text)) for text in texts]
"""
SCRIPT = """\
from recipes.grpo import run

def short(completions, **columns):
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [1.0 / (1 + len(text)) for text in texts]

result = run("rows.yaml", rewards={"short": short}, run_dir="runs/script", train={"steps": 1}, **SMALL)
print(result["verdict"])
"""
SMALL = [
    *("model.dtype=fp32", "train.prompts_per_step=4", "train.group_size=4", "evaluation.data=null"),
    *("sampling.max_completion_length=16", "data.max_prompt_length=256"),
]
LORA = ["model.lora={r: 8}", "loss.kl_coef=0"]
REWARDS = 'rewards.functions=[{name: math, weight: 0.9}, {name: "rewards:short", weight: 0.1}]'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the large file")
    parser.add_argument("--folder", type=Path, default=None)
    a = parser.parse_args()
    folder = a.folder or Path(tempfile.mkdtemp(prefix="first-hour-"))
    write_rows(folder / "rows.jsonl", 400)
    write_rows(folder / "many.jsonl", a.rows)
    (folder / "rewards.py").write_text(REWARD)
    words = ", ".join(f"{k!r}: {v!r}" for k, v in script_values().items())
    (folder / "train.py").write_text(SCRIPT.replace("**SMALL", f"**{{{words}}}"))
    run = ["cohort", "train", "rows.yaml", *SMALL, *LORA, REWARDS, "train.steps=3"]
    two = [*run, "--processes", "2", "run_dir=runs/two"]
    steps: list[tuple[str, list[str], int, str | None]] = [
        ("look at the data, write a config", ["cohort", "init", "rows.jsonl"], 0, None),
        ("check it", ["cohort", "config", "rows.yaml"], 0, None),
        ("examine the rewards", ["cohort", "doctor", "rewards", "rows.yaml"], 0, None),
        ("what a 24 GB card can do", ["cohort", "plan", "rows.yaml", "--gpu-gib", "24"], 0, None),
        ("LoRA, two processes, Ctrl-C after step 1", two, 130, "step 1/3"),
        ("go on with another lr", [*two, "optimizer.lr=1e-5", "--change"], 0, None),
        ("a second run", [*run, "run_dir=runs/one"], 0, None),
        ("both side by side", ["cohort", "report", "runs/two", "runs/one", "--out", "both.html"], 0, None),
        ("a script in Python", [sys.executable, "train.py"], 0, None),
        (
            f"one step on {a.rows:,} rows",
            ["cohort", "train", "rows.yaml", *SMALL, *LORA, "data.source=many.jsonl", "train.steps=1"],
            0,
            None,
        ),
    ]
    total, failed = 0.0, False
    for what, command, wanted, stop_after in steps:
        seconds, code, said = timed(command, folder, stop_after)
        total, failed = total + seconds, failed or code != wanted
        print(f"{seconds:6.1f} s  exit {code}  {what}", flush=True)
        if code != wanted:
            print("\n".join(said[-15:]), flush=True)
    print(f"{total:6.1f} s  in all; {folder}")
    return int(failed)


def write_rows(path: Path, count: int) -> None:
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            x, y = draw.randrange(100), draw.randrange(100)
            question = f"Ann has {x} apples and buys {y} more. How many apples does Ann have?"
            file.write(
                json.dumps({"question": question, "solution": f"{x} + {y} = {x + y}\n#### {x + y}"}) + "\n"
            )


def script_values() -> dict[str, object]:
    import yaml

    words = [*SMALL, *LORA, "rewards.functions=[{name: math, weight: 0.9}, {name: short, weight: 0.1}]"]
    return {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in words)}


def timed(command: list[str], folder: Path, stop_after: str | None) -> tuple[float, int, list[str]]:
    """(seconds, exit code, lines); Ctrl-C once a line begins with `stop_after`."""
    beside = str(Path(sys.executable).parent / command[0])
    words = [beside if command[0] == "cohort" else command[0], *command[1:]]
    began, lines = time.monotonic(), []
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        words, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if stop_after is not None and line.startswith(stop_after):
                process.send_signal(signal.SIGINT)
    return time.monotonic() - began, process.returncode, lines


if __name__ == "__main__":
    sys.exit(main())
