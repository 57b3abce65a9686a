"""Rewards for a small masked diffusion model on a CPU: fine-tuned until it is half right, then RL.

    python -m tests.bench.diffusion_rewards --out FOLDER [--estimators trace,elbo] [--set KEY=VALUE ...]

The model has 4 layers of width 128 and reads bytes; the task is sums and differences of two digits each from
0 to 9. Both stages are whole runs of the recipes. Prints, for each estimator, the mean reward over tens of
steps and held-out accuracy before and after. A run that FOLDER holds already, with the
same settings, is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from recipes.tasks.few_shot import boxed_chain_sum, solved_chain_sum
from rl.store.rows import read_rows
from tests.bench.launch import launch_or_exit, once
from tests.bench.workload import Workload, write_model

ESTIMATORS = {
    "trace": ["diffusion.estimator={name: trace}"],
    "elbo": ["diffusion.estimator={name: elbo, num_draws: 2}", "loss.sampler_correction=null"],
    "one_step": ["diffusion.estimator={name: one_step, prompt_mask: 0.15}", "loss.sampler_correction=null"],
}
HERE = "tests.bench.diffusion_rewards:sums"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--estimators", default="trace,elbo")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of llada_rl_chain_sum.yaml")
    arguments = parser.parse_args()
    start = fine_tuned(arguments.out)
    for name in arguments.estimators.split(","):
        print(f"{name:9s}", rewarded(arguments.out / name, start, name, arguments.set), flush=True)


def sums(*, size: int, seed: int, solved: bool = False) -> list[dict[str, Any]]:
    """Rows of "3 + 5 =" and its answer; `solved`: with the completion."""
    draw = solved_chain_sum if solved else boxed_chain_sum
    rows = draw(size=size, seed=seed, max_digits=1, num_examples=0)
    return [row | {"prompt": _short(row["prompt"])} for row in rows]


def _short(prompt: list[dict[str, str]]) -> list[dict[str, str]]:
    """The question without the words before it."""
    return [message | {"content": message["content"].split(": ")[1]} for message in prompt]


def fine_tuned(out: Path) -> Path:
    """The model after 500 steps, from random weights."""
    settings = [
        f"model={{name: {out / 'model'}, mask_token: <t7>}}",
        f"data={{source: {HERE}, options: {{size: 20000, seed: 7, solved: true}}, max_length: 96}}",
        "train.steps=500",
        "train.token_budget=4096",
        "optimizer.lr=1e-3",
    ]

    def work() -> None:
        write_model(out / "model", Workload(shape="tiny"))
        _run("recipes.llada", "llada_sft_chain_sum", out / "fine_tuned", settings)

    once(out / "fine_tuned", settings, work)
    return out / "fine_tuned" / "checkpoints" / "step-000500"


def rewarded(run_dir: Path, start: Path, estimator: str, overrides: list[str]) -> str:
    settings = [
        f"model.name={start}",
        f"data={{source: {HERE}, options: {{size: 4000, seed: 1}}, max_prompt_length: 96}}",
        f"evaluation.data={{source: {HERE}, options: {{size: 60, seed: 4242}}, max_prompt_length: 96}}",
        *ESTIMATORS[estimator],
        "optimizer.lr=2e-4",
        "train.prompts_per_step=16",
        "train.token_budget=8192",
        *overrides,
    ]
    once(run_dir, settings, lambda: _run("recipes.grpo", "llada_rl_chain_sum", run_dir, settings))
    rewards = [row["reward/mean"] for row in read_rows(run_dir / "metrics.jsonl")]
    means = [statistics.mean(rewards[i : i + 10]) for i in range(0, len(rewards), 10)]
    result = json.loads((run_dir / "result.json").read_text())
    return (
        f"reward {' '.join(f'{mean:.3f}' for mean in means)}; held-out {100 * result['heldout_before']:.1f} "
        f"-> {100 * result['heldout_after']:.1f} %; {result['seconds']:.0f} s"
    )


def _run(module: str, config: str, run_dir: Path, settings: list[str]) -> None:
    arguments = [f"recipes/configs/{config}.yaml", f"run_dir={run_dir}", *settings]
    launch_or_exit(run_dir.with_suffix(".log"), module, arguments)


if __name__ == "__main__":
    main()
