"""An upcycled SmolLM2 (8 experts, 2 a token): SFT with balance and without, GRPO with replay and without.

    python -m tests.bench.moe_upcycled --data GSM8K_FOLDER --out FOLDER [--model FOLDER] [--limit-s 540]

GSM8K_FOLDER holds gsm8k_train.jsonl. SFT needs neither trl nor datasets: it is `update_policy` on solutions
with an advantage of 1 each and the loss `reinforce`, which is the cross-entropy per token, with the policy's
own balance. GRPO is `recipes.grpo`, a process a run, on the last questions of the file. A run that fails ends
this program with its last lines. FOLDER/*/report.html have heat maps, FOLDER/table.txt has what is printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
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
from tests.bench.launch import launch_or_exit

GRPO = ("engine", "none")
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
    parser.add_argument("--seeds", default="0")
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
    run = lambda name, module, words: launch_or_exit(  # noqa: E731
        arguments.out / f"{name}.log", module, words, max(1.0, ends - time.monotonic())
    )
    moe, rows = arguments.out / "moe", []
    if not moe.exists():
        family = ["--family", arguments.family] if arguments.family else []
        run("upcycle", "recipes.upcycle", [arguments.model, str(moe), *family])
    for seed in arguments.seeds.split(","):
        for balance in arguments.balances.split(","):
            name = f"sft-{balance}-{seed}"
            run(name, "tests.bench.moe_upcycled", [*sys.argv[1:], "--sft", balance, seed])
            rows += described(name, arguments.out / name)
        write_questions(arguments)
        for replay in GRPO:
            name = f"grpo-{replay}-{seed}"
            own = [f"run_dir={arguments.out / name}", f"moe.replay={replay}", f"train.seed={seed}"]
            own += [f"model.name={arguments.out / f'sft-switch-{seed}' / 'model'}"]
            run(
                name,
                "recipes.grpo",
                [str(arguments.out / "grpo.yaml"), *own, *arguments.set, *arguments.set_grpo],
            )
            rows += described(name, arguments.out / name)
    text = "\n".join(rows)
    (arguments.out / "table.txt").write_text(text + "\n")
    print(text)


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
        read(arguments.data)[: arguments.sft_rows * arguments.sft_steps],
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


def read(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "gsm8k_train.jsonl").read_text().splitlines()]


def write_questions(arguments: argparse.Namespace) -> None:
    """The config of GRPO, and its questions: the last of the file, which SFT reads from its beginning."""
    rows = [{"prompt": r["question"], "answer": split_solution(r["answer"])[1]} for r in read(arguments.data)]
    source = arguments.out / "questions.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows[-2000:]))
    config = {
        "data": {"source": str(source)},
        "train": {"steps": arguments.grpo_steps, "prompts_per_step": 16, "group_size": 8},
        "sampling": {"max_completion_length": 256},
        "loss": {"kl_coef": 0.0},
        "optimizer": {"lr": 2e-6, "warmup_steps": 5},
        "moe": {"router": "train"},
        "checkpoint": {"every": 0},
    }
    (arguments.out / "grpo.yaml").write_text(yaml.safe_dump(config))


def described(name: str, folder: Path) -> list[str]:
    """Means over the first and the last tenth of the steps, and the greatest value of what is a maximum."""
    rows = list(read_rows(folder / "metrics.jsonl"))
    assert rows, f"{folder} holds no metrics"
    tenth = max(1, len(rows) // 10)
    parts = []
    for label, metric in COLUMNS.items():
        first, last = ([r[metric] for r in some if metric in r] for some in (rows[:tenth], rows[-tenth:]))
        if last:
            parts.append(f"{label} {statistics.mean(first or last):.4g} -> {statistics.mean(last):.4g}")
    return [f"{name} ({len(rows)} steps): {'; '.join(parts)}"]


if __name__ == "__main__":
    main()
