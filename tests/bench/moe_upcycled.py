"""An upcycled SmolLM2 (8 experts, 2 a token): SFT with balance and without, GRPO with replay and without.

    python -m tests.bench.moe_upcycled --data GSM8K_FOLDER --out FOLDER [--model FOLDER] [--limit-s 540]

GSM8K_FOLDER holds gsm8k_train.jsonl. SFT needs neither trl nor datasets: it is `update_policy` on solutions
with an advantage of 1 each and the loss `reinforce`, which is the cross-entropy per token, with the policy's
own balance. GRPO is `recipes.grpo`, a process a run, on other questions, with held-out ones before and after.
A run has its share of the time that is left for its seed. One that fails or takes longer is printed with its
last lines, and the next begins; the same command does again what is unfinished, and only that. FOLDER keeps
models of GiB; FOLDER/*/report.html have heat maps, and FOLDER/table.txt the table so far after each run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from recipes.kinds import causal_policy
from recipes.tasks.gsm8k import split_solution
from rl.batch import pack
from rl.config.diffusion import TextConfig
from rl.config.read import load_config
from rl.diffusion.text import encode_rows
from rl.model.loading import load_tokenizer
from rl.moe.policy import METRICS
from rl.optimizer import make_optimizer, set_learning_rate
from rl.report.report import build_report
from rl.store.metrics import MetricsLog
from rl.store.rows import read_rows
from rl.types import Completion, Group, Prompt, Reward, ScoredGroup, VersionSpan
from rl.update import pack_rules, update_policy
from rl.world import World, make_accelerator
from tests.bench.launch import launch_or_exit, once

GRPO = ("engine", "none")
HEADER = "| run | seed | steps | reward | held-out accuracy | flips | mean gap | largest gap | seconds |"
COLUMNS = {
    "loss": "policy/loss",
    "balance": "moe/balance",
    "max violation": "moe/max_violation",
    "worst layer": "moe/max_violation_layer",
    "load entropy": "moe/load_entropy",
    "dead": "moe/dead_experts",
    "start overlap": "moe/start_overlap",
    "flips": "moe/flip_rate",
    "replayed": "moe/replayed",
    "gap mean": "sampler/logprob_gap_mean",
    "gap max": "sampler/logprob_gap_max",
    "reward": "reward/mean",
    "s/step": "time/step",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--family", default=None, help="of the mixture (`recipes.upcycle`)")
    parser.add_argument("--seeds", default="0", help="such as 0,1,2; one seed's runs come after another's")
    parser.add_argument("--balances", default="switch,none", help="of SFT; GRPO goes on from switch")
    parser.add_argument("--sft-steps", type=int, default=200)
    parser.add_argument("--sft-rows", type=int, default=64, help="solutions of a step")
    parser.add_argument("--grpo-steps", type=int, default=40)
    parser.add_argument("--set", nargs="*", default=[], help="overrides of all runs' config")
    parser.add_argument("--set-grpo", nargs="*", default=[], help="overrides of GRPO's config")
    parser.add_argument("--limit-s", type=float, default=540.0, help="of everything")
    parser.add_argument("--sft", nargs=2, metavar=("BALANCE", "SEED"), help="does one run of SFT; internal")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.sft:
        sft(arguments, *arguments.sft)
        return
    ends = time.monotonic() + arguments.limit_s
    moe, family = arguments.out / "moe", ["--family", arguments.family] if arguments.family else []
    upcycle = partial(launch_or_exit, arguments.out / "upcycle.log", "recipes.upcycle")
    once(
        moe, [arguments.model, *family], lambda: upcycle([arguments.model, str(moe), *family], ends_in(ends))
    )
    write_questions(arguments)
    kinds = [("sft", b) for b in arguments.balances.split(",")] + [("grpo", replay) for replay in GRPO]
    rows, missing = [HEADER, "|---" * HEADER.count(" |") + "|"], []
    for seed in arguments.seeds.split(","):
        for i, (kind, choice) in enumerate(kinds):
            folder = arguments.out / f"{kind}-{choice}-{seed}"
            try:
                run(arguments, kind, choice, seed, ends_in(ends) / (len(kinds) - i))
            except SystemExit as fault:
                missing.append(folder.name)
                print(fault, flush=True)
            print(described(folder), flush=True)
            rows.append(table_row(folder, choice, seed))
            (arguments.out / "table.txt").write_text("\n".join(rows) + "\n")
    print("\n".join(rows))
    if missing:
        sys.exit(f"unfinished, begun anew by the same command: {', '.join(missing)}")


def ends_in(ends: float) -> float:
    """Seconds left; at least one, in which a run ends by its limit."""
    return max(1.0, ends - time.monotonic())


def run(arguments: argparse.Namespace, kind: str, choice: str, seed: str, limit_s: float) -> None:
    """One run of at most `limit_s` seconds, unless it is finished with the same settings."""
    folder = arguments.out / f"{kind}-{choice}-{seed}"
    log, settings = folder.with_suffix(".log"), [*arguments.set, str(arguments.sft_steps)]
    if kind == "sft":
        words = [*sys.argv[1:], "--sft", choice, seed]
        settings += [str(arguments.sft_rows), str(arguments.data)]
        work = partial(launch_or_exit, log, "tests.bench.moe_upcycled", words, limit_s)
    else:
        words = [str(arguments.out / "grpo.yaml"), f"run_dir={folder}", f"moe.replay={choice}"]
        words += [f"model.name={arguments.out / f'sft-switch-{seed}' / 'model'}", f"train.seed={seed}"]
        words += [*arguments.set, *arguments.set_grpo]
        settings += [*words, f"train.steps={arguments.grpo_steps}"]
        work = partial(launch_or_exit, log, "recipes.grpo", words, limit_s)
    began = time.monotonic()

    def timed() -> None:
        work()
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # 10 GB of optimizer state
        (folder / "seconds.txt").write_text(f"{time.monotonic() - began:.0f}")

    once(folder, settings, timed)


def sft(arguments: argparse.Namespace, balance: str, seed: str) -> None:
    """One run of SFT in this process; the weights end in FOLDER/NAME/model."""
    out = arguments.out / f"sft-{balance}-{seed}"
    out.mkdir(parents=True, exist_ok=True)
    given = [f"model.name={arguments.out / 'moe'}", f"run_dir={out}", f"train.seed={seed}"]
    given += ["loss.name=reinforce", "loss.kl_coef=0", "loss.sampler_correction=null", "train.group_size=2"]
    given += [f"moe.balance={balance}", "moe.balance_coef=0.01", "moe.replay=none", "moe.router=train"]
    given += ["optimizer.lr=1e-4", "optimizer.schedule=cosine", "optimizer.warmup_steps=10"]
    config = load_config(
        None, [*given, f"train.steps={arguments.sft_steps}", "train.token_budget=16384", *arguments.set]
    )
    (out / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    torch.manual_seed(config.train.seed)
    accelerator = make_accelerator()
    tokenizer = load_tokenizer(config.model)
    examples, _ = encode_rows(
        split(arguments.data)[0][: arguments.sft_rows * arguments.sft_steps],
        TextConfig(source="gsm8k", prompt_column="question", completion_column="answer", too_long="drop"),
        tokenizer,
    )
    longest = max(map(len, examples))
    policy: Any = causal_policy(config, config.model, accelerator, tokenizer, longest, print)
    print(*policy.said(), sep="\n", flush=True)
    optimizer, log = make_optimizer(policy.trainable(), config.optimizer), MetricsLog(out, own=METRICS)
    rules = pack_rules(config, share_prompts=policy.shares_prompts)
    for step in range(arguments.sft_steps):
        began, start = time.monotonic(), step * arguments.sft_rows
        some = [examples[(start + i) % len(examples)] for i in range(arguments.sft_rows)]
        groups = [as_group(f"{step}-{i}", *e.__dict__.values()) for i, e in enumerate(some)]
        set_learning_rate(optimizer, config.optimizer, step, arguments.sft_steps)
        batches = pack(groups, [[1.0]] * len(groups), rules)
        found = update_policy(policy, optimizer, batches, config.loss, world=World(accelerator)).metrics
        log.write(step + 1, found | {"time/step": time.monotonic() - began})
        policy.health.write(step + 1)
        print(
            step + 1, {name: round(found[name], 4) for name in COLUMNS.values() if name in found}, flush=True
        )
    policy.write_model(out / "model")
    log.close()
    build_report(out)


def as_group(name: str, prompt: Any, answer: Any) -> ScoredGroup:
    ids = answer.tolist()
    completion = Completion(ids, [], [True] * len(ids), "stop", [VersionSpan(0, len(ids))])
    return ScoredGroup(Group(Prompt(name, "", tuple(prompt.tolist())), [completion]), [Reward(1.0)])


def split(folder: Path) -> tuple[list[dict[str, str]], ...]:
    """Rows for SFT, the next quarter for GRPO, and the last 28th, held out: 5,339, 1,868 and 266 of GSM8K."""
    rows = [json.loads(line) for line in (folder / "gsm8k_train.jsonl").read_text().splitlines()]
    held, asked = len(rows) // 28, len(rows) // 4
    return rows[: -asked - held], rows[-asked - held : -held], rows[-held:]


def write_questions(arguments: argparse.Namespace) -> None:
    """The config of GRPO, its questions, and those held out."""
    _, asked, held = split(arguments.data)
    for name, rows in (("questions", asked), ("heldout", held)):
        found = [{"prompt": r["question"], "answer": split_solution(r["answer"])[1]} for r in rows]
        (arguments.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    length = {"max_completion_length": 256}
    config = {
        "data": {"source": str(arguments.out / "questions.jsonl")},
        "evaluation": {
            "data": {"source": str(arguments.out / "heldout.jsonl")},
            "sampling": {"temperature": 0.0} | length,
        },
        "train": {"steps": arguments.grpo_steps, "prompts_per_step": 16, "group_size": 8},
        "sampling": length,
        "loss": {"kl_coef": 0.0},
        "optimizer": {"lr": 2e-6, "warmup_steps": 5},
        "moe": {"router": "train"},
        "checkpoint": {"every": 0},
    }
    (arguments.out / "grpo.yaml").write_text(yaml.safe_dump(config))


def ends_of(folder: Path, metric: str) -> tuple[float, float] | None:
    """Means over the first and the last fifth of the steps; None: no step has the metric."""
    values = [r[metric] for r in read_rows(folder / "metrics.jsonl") if metric in r]
    fifth = max(1, len(values) // 5)
    return (statistics.mean(values[:fifth]), statistics.mean(values[-fifth:])) if values else None


def described(folder: Path) -> str:
    found = {label: ends_of(folder, metric) for label, metric in COLUMNS.items()}
    parts = (f"{label} {ends[0]:.4g} -> {ends[1]:.4g}" for label, ends in found.items() if ends)
    return f"{folder.name} ({len(read_rows(folder / 'metrics.jsonl'))} steps): {'; '.join(parts)}"


def table_row(folder: Path, choice: str, seed: str) -> str:
    """The row of a run, finished or not: of the steps that it made."""
    rows = read_rows(folder / "metrics.jsonl")
    reward, metrics = (
        ends_of(folder, "reward/mean"),
        ("moe/flip_rate", COLUMNS["gap mean"], COLUMNS["gap max"]),
    )
    values = [[r[m] for r in rows if m in r] for m in metrics]
    means = [
        f"{(max if m.endswith('max') else statistics.mean)(v):.4g}" if v else ""
        for m, v in zip(metrics, values, strict=True)
    ]
    held = [
        f"{100 * e['accuracy']:.1f} % ({100 * e['low']:.1f} to {100 * e['high']:.1f})"
        for e in read_rows(folder / "evaluation.jsonl")
    ]
    seconds = folder / "seconds.txt"
    cells = [
        folder.name,
        seed,
        str(len(rows)),
        f"{reward[0]:.3f} -> {reward[1]:.3f}" if reward else "",
        " -> ".join(held),
        *means,
    ]
    cells.append(seconds.read_text() if seconds.exists() else "unfinished")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
