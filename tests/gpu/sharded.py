"""Split weights on two GPUs: a checkpoint, gradients against whole copies, one process that goes on.

    python -m tests.gpu.sharded [--shape 1.5b | --model DIR] [--limit-s 175] [--out DIR] [--set KEY=VALUE]
    python -m tests.gpu.sharded --shape tiny --set engine.name=transformers model.dtype=fp32    # on a CPU

Two processes train with train.sharding=full and a KL term, each with an engine of its own. The groups that
they recorded for step 1 are then trained by split and by whole weights, in bf16 and in fp32. Last, one
process goes on from the checkpoint. What is found is printed as it comes, and as a table at the end.
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

from recipes.cli.launch import launch
from rl.store.rows import read_rows
from tests.bench.launch import last_lines, run_within
from tests.bench.workload import Workload, write_model

GIB = 2**30
STEPS, PROCESSES = 3, 2
LIMITS = {"bf16-mixed": 0.1, "fp32": 1e-4}
"""Relative difference of gradients; in bf16 the norms have bf16 weights only where weights are split."""
NUMBERS = {
    "step": "time/step",
    "sample": "time/sample",
    "train": "time/train",
    "sync": "time/sync",
    "save": "time/save",
    "tokens/s": "tokens/per_second",
    "peak GiB": "memory/peak",
    "gap": "sampler/logprob_gap_mean",
    "canary": "sync/canary_gap_mean",
    "loss": "policy/loss",
    "norm": "policy/grad_norm",
    "kl": "policy/kl",
}


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["--compare"]:
        return compare(arguments[1])
    if arguments[:1] == ["--launch"]:
        return launch(["--compare", *arguments[1:]], PROCESSES, "tests.gpu.sharded")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="1.5b")
    parser.add_argument("--model", type=Path, default=None, help="a folder, in place of random weights")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("."), help="for the logs")
    parser.add_argument("--limit-s", type=float, default=175.0, help="for everything together")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of Cohort's config")
    a = parser.parse_args(arguments)
    deadline, table = time.monotonic() + a.limit_s, []
    a.out.mkdir(parents=True, exist_ok=True)
    workload = Workload(shape=a.shape, prompts=a.prompts, group=a.group, max_length=a.max_length, steps=STEPS)
    workload.export()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "config.yaml"
        path.write_text(yaml.safe_dump(settings(Path(scratch), workload, a)))
        train = ["-m", "recipes.cli", "train", str(path)]
        failed = stage(
            "two-processes", [*train, "--processes", str(PROCESSES)], path, a=a, table=table, until=deadline
        )
        if not failed:
            again = ["-m", "tests.gpu.sharded", "--launch", str(path)]
            failed |= stage("gradients", again, path, a=a, table=table, until=deadline)
            more = ["--processes", "1", f"train.steps={STEPS + 1}", "checkpoint.every=99"]
            failed |= stage("one-process", [*train, *more], path, a=a, table=table, until=deadline)
    print("\n".join(["", *table]), flush=True)
    return int(failed)


def settings(scratch: Path, workload: Workload, a: Any) -> dict[str, Any]:
    """A run's config; overrides are part of it, so that all stages have them."""
    own = {} if a.model else {"stop_token_ids": workload.stop_ids}
    config: dict[str, Any] = {
        "run_dir": str(scratch / "run"),
        "model": {"name": str(a.model.resolve() if a.model else write_model(scratch / "model", workload))},
        "data": {"source": "tests.bench.workload:rows", "max_prompt_length": 2 * workload.prompt_length},
        "sampling": {"max_completion_length": workload.max_length} | own,
        "rewards": {"functions": [{"name": "tests.bench.workload:coin"}]},
        "train": {"steps": STEPS, "prompts_per_step": workload.prompts, "group_size": workload.group},
        "loss": {"kl_coef": 0.02},
        "optimizer": {"lr": 1e-5, "schedule": "constant"},
        "engine": {"enforce_eager": True},
        "checkpoint": {"every": STEPS},
    }
    config["train"]["sharding"] = "full"
    for word in a.set:
        key, _, value = word.partition("=")
        section, _, name = key.partition(".")
        config.setdefault(section, {})[name] = yaml.safe_load(value)
    return config


def stage(name: str, words: list[str], path: Path, *, a: Any, table: list[str], until: float) -> bool:
    """Runs a command and prints what it measures; returns whether it failed, by its limit or otherwise."""
    log, folder = a.out / f"{name}.log", path.parent / "run"
    began = stepped = time.monotonic()
    shown, most, lines = len(rows_of(folder / "metrics.jsonl")), 0.0, []
    head = f"{name:15s}" + "".join(f"{column:>11s}" for column in NUMBERS)

    def watch() -> None:
        nonlocal stepped, most
        most = max(most, used_gib())
        if new := new_lines(folder, shown + len(lines), None if lines else head):
            stepped = time.monotonic()
            lines.extend(new)

    code = run_within(until - began, [sys.executable, *words], log, watch)
    watch()
    said = [line for line in log.read_text().splitlines() if line.startswith(("gradients", "planned"))]
    plan = json.loads((folder / "plan.json").read_text()) if (folder / "plan.json").exists() else {}
    planned = "; ".join(f"{key} {plan.get(key, 0) / GIB:.1f}" for key in ("training", "total"))
    ended = time.monotonic()
    said.append(
        f"{name}: exit code {code} after {ended - began:.0f} s, {ended - stepped:.0f} s of them since "
        f"its last step (saving, ending); whole card at most {most:.1f} GiB; plan, GiB: {planned}"
    )
    print("\n".join(said), flush=True)
    if code:
        print(last_lines(log), flush=True)
    table += [*([head] if lines else []), *lines, *said]
    return bool(code)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return read_rows(path) if path.exists() else []


def new_lines(folder: Path, known: int, head: str | None) -> list[str]:
    """Prints and returns a line for each step after the first `known`, below `head`."""
    rows = rows_of(folder / "metrics.jsonl")[known:]
    lines = [
        f"step {row['step']:<10d}" + "".join(f"{row.get(n, float('nan')):11.4g}" for n in NUMBERS.values())
        for row in rows
    ]
    if lines:
        print("\n".join([*([head] if head else []), *lines]), flush=True)
    return lines


def used_gib() -> float:
    """What the fullest GPU holds."""
    found = [torch.cuda.mem_get_info(i) for i in range(torch.cuda.device_count())]
    return max(((total - free) / GIB for free, total in found), default=0.0)


def compare(path: str) -> int:
    """In each process of a run: gradients of the recorded first step by split and by whole weights."""
    from recipes.fit import read_plan
    from rl.config.read import load_config
    from rl.world import World, make_accelerator

    world = World(make_accelerator())
    given = load_config(path, [])
    chosen = (read_plan(given) or {"chosen": {}})["chosen"]
    budget = chosen.get("train.token_budget", 4096)
    is_off = False
    for dtype, groups in (("bf16-mixed", 99), ("fp32", 2)):
        if dtype == "bf16-mixed" and world.accelerator.device.type != "cuda":
            continue
        words = [f"model.dtype={dtype}", f"train.token_budget={min(budget, 8192)}"]
        words.append("model.gradient_checkpointing=false")
        configs = (load_config(path, [*words, f"train.sharding={kind}"]) for kind in ("none", "full"))
        whole, ours = (gradients(config, world, groups=groups) for config in configs)
        gap = torch.stack([(whole[0][n] - ours[0][n]).square().sum() for n in whole[0]]).double()
        size = torch.stack([x.square().sum() for x in whole[0].values()]).double()
        apart = (gap.sum() / size.sum()).sqrt().item()
        worst = (gap / size.clamp_min(1e-30)).sqrt()
        is_off |= not apart <= LIMITS[dtype]
        if world.is_main:
            name = list(whole[0])[int(worst.argmax())]
            print(
                f"gradients, {dtype}: relative difference {apart:.2g} (limit {LIMITS[dtype]:g}), of {name} "
                f"{worst.max().item():.2g}",
                flush=True,
            )
            for kind, (_, facts) in (("whole", whole), ("split", ours)):
                said = ", ".join(f"{key} {value:.6g}" for key, value in facts.items())
                print(f"gradients, {dtype}, {kind}: {said}", flush=True)
        del whole, ours
    world.end()
    return int(is_off)


def gradients(config: Any, world: Any, *, groups: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Summed gradients by name, whole on every process, and facts; of the first groups of each process.

    The reference is moved away from the policy, as they would be equal in the first step.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    from recipes.kinds import causal_policy
    from rl.batch import pack
    from rl.model.loading import load_tokenizer
    from rl.references import make_reference
    from rl.sharded import ShardedPolicy, gathered
    from rl.store.ledger import Ledger
    from rl.update import pack_rules, update_policy

    class Kept(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            found.update((name, gathered(p.grad)) for name, p in policy.trainable())

    found: dict[str, Any] = {}
    device = world.accelerator.device
    tokenizer = load_tokenizer(config.model)
    longest = config.longest_sequence
    policy: Any = causal_policy(config, config.model, world.accelerator, tokenizer, longest, print)
    reference: Any = make_reference(policy, moves=False)
    if config.train.sharding == "full":
        policy = ShardedPolicy(policy, reference, sharding="full", sent=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for p in reference.scorer.parameters():
            noise: Any = 0.002 * torch.randn(p.shape, generator=generator, device=device)
            is_split = isinstance(p, DTensor)
            p.add_(distribute_tensor(noise, p.device_mesh, p.placements) if is_split else noise)
    record = Ledger(config.run_dir, world.rank, world.size).read(0)
    assert record is not None and record.advantages is not None
    rules = pack_rules(config, share_prompts=policy.shares_prompts)
    batches = pack(record.groups[:groups], record.advantages[:groups], rules, sum_over_processes=world.sum)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    world.wait()
    began = time.perf_counter()
    result = update_policy(
        policy,
        Kept([p for _, p in policy.trainable()], lr=0.0),
        batches,
        config.loss,
        world=world,
        reference=reference,
        max_grad_norm=1e9,
    )
    names = ("policy/loss", "policy/grad_norm", "policy/kl", "memory/peak")
    facts = {"seconds": time.perf_counter() - began} | {n: result.metrics[n] for n in names}
    return found, facts


if __name__ == "__main__":
    sys.exit(main())
