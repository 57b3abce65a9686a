"""The training phase alone, on the workload's lengths: seconds, MFU, peak memory, largest kernels.

    python -m tests.bench.train_phase [--shape 1.5b] [--budgets 8192,16384] [--profile] [--set KEY=VALUE ...]

The time is of pack + update_policy with the device synchronised, the median of three steps after two. A
step on the plain paths (`--plain`) runs without varlen attention, Triton kernels and Liger, for the
ratio.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

from rl.batch import pack
from rl.causal import CausalPolicy
from rl.config import Config
from rl.config.read import load_config
from rl.model import head as logprobs
from rl.model import varlen as shared_prompt
from rl.optimizer import weight_decay_groups
from rl.plan.memory import GIB, training_parts
from rl.plan.probe import probe
from rl.plan.sizes import ModelSize
from rl.types import Completion, Group, Prompt, Reward, ScoredGroup, VersionSpan
from rl.update import pack_rules, update_policy
from rl.world import World
from tests.bench.flops import peak_flops, training_flops
from tests.bench.workload import STOP_SHARE, Workload, now, write_model

WARM_UP, MEASURED = 2, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    Workload.add_arguments(parser)
    parser.add_argument("--budgets", default="16384")
    parser.add_argument("--plain", action="store_true", help="measure the plain paths too")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the config")
    arguments = parser.parse_args()
    workload = Workload.of(arguments)
    workload.export()
    groups = draw_groups(workload)
    answers = [len(c.token_ids) for g in groups for c in g.completions]
    print(f"{workload.prompts} x {workload.group}: {sum(answers)} completion tokens, longest {max(answers)}")
    with tempfile.TemporaryDirectory() as scratch:
        model = write_model(Path(scratch) / "model", workload)
        for budget in arguments.budgets.split(","):
            measure(model, groups, ["train.token_budget=" + budget, *arguments.set], arguments.profile)
        if arguments.plain:
            shared_prompt.flash_works = logprobs.kernels_work = lambda: False
            overrides = ["train.token_budget=" + budget, "model.fused_layers=false", *arguments.set]
            measure(model, groups, overrides, False)


def draw_groups(workload: Workload) -> list[ScoredGroup]:
    """Geometric lengths as the stop ids would give them, cut at the limit; random ids and rewards."""
    draw, groups = random.Random(0), []
    for p in range(workload.prompts):
        ids = tuple(draw.randrange(workload.vocabulary) for _ in range(workload.prompt_length))
        completions = []
        for _ in range(workload.group):
            n = min(workload.max_length, 1 + int(math.log(draw.random()) / math.log(1 - STOP_SHARE)))
            tokens = [draw.randrange(workload.vocabulary) for _ in range(n)]
            completions.append(Completion(tokens, [], [True] * n, "stop", [VersionSpan(0, n)]))
        groups.append(
            ScoredGroup(
                Group(Prompt(f"p{p}", "", ids), completions), [Reward(draw.random()) for _ in completions]
            )
        )
    return groups


def training_config(model: Path, overrides: list[str]) -> Config:
    workload = Workload.current()
    base = [f"model.name={model}", "loss.name=dapo", "loss.kl_coef=0", "loss.sampler_correction=null"]
    base += [f"data.max_prompt_length={workload.prompt_length}"]
    base += [f"sampling.max_completion_length={workload.max_length}"]
    return load_config(None, [*base, *overrides])


def training_step(
    config: Config, groups: list[ScoredGroup]
) -> tuple[CausalPolicy, Callable[[], tuple[float, float]], str | None]:
    """A policy, its step (seconds to pack and to train), and why rows are not packed."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    policy = CausalPolicy(config.model, accelerator, temperature=1.0)
    note = policy.settle_attention()
    optimizer = torch.optim.AdamW(weight_decay_groups(policy.trainable(), 0.0), lr=1e-6, fused=True)
    advantages = [[r.score - 0.5 for r in g.rewards] for g in groups]  # type: ignore[operator]

    def step() -> tuple[float, float]:
        began = now()
        batches = pack(groups, advantages, pack_rules(config, share_prompts=policy.shares_prompts))
        packed = now()
        update_policy(policy, optimizer, batches, config.loss, world=World(accelerator))
        return packed - began, now() - packed

    return policy, step, note


def measure(model: Path, groups: list[ScoredGroup], overrides: list[str], profiled: bool) -> None:
    config = training_config(model, overrides)
    policy, step, note = training_step(config, groups)
    on_gpu = policy.device.type == "cuda"
    if on_gpu:
        size = ModelSize.of(policy.model.config, fused_layers=config.model.fused_layers)
        parts = training_parts(size, config, config.token_budget)
        predicted = sum(part.bytes for part in parts if part.phase != "update")
        held = probe(
            policy, config, rules=pack_rules(config, share_prompts=policy.shares_prompts), reference=None
        )
        print(f"memory: predicted {predicted / GIB:.1f} GiB, probe {held / GIB:.1f} GiB", flush=True)
        torch.cuda.reset_peak_memory_stats()

    times = [step() for _ in range(WARM_UP + MEASURED)][WARM_UP:]
    seconds = statistics.median(t for _, t in times)
    lengths = [(len(g.prompt.token_ids), [len(c.token_ids) for c in g.completions]) for g in groups]
    flops = training_flops(json.loads((model / "config.json").read_text()), lengths)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    print(
        f"{' '.join(overrides)}: train {seconds:.3f} s, pack {times[-1][0]:.3f} s, "
        f"MFU {flops / seconds / peak_flops():.3f}, peak {peak:.1f} GiB" + (f" ({note})" if note else ""),
        flush=True,
    )
    if profiled:
        with torch.profiler.profile() as profile:
            step()
        column = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        print(profile.key_averages().table(sort_by=column, row_limit=25, max_name_column_width=70))
    del policy, step
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
