"""Seconds of a training phase where rows cannot be packed: one at a time, and side by side in padded batches.

    python -m tests.bench.row_families [FAMILY ...] [--rows 128] [--longest 160] [--width 32] [--budget 8192]

Models are those of tests/rl/families.py, random and of two layers, on a CPU, and on a GPU if there is one.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator

from rl.batch import pack
from rl.causal import CausalPolicy
from rl.config.read import load_config
from rl.types import Completion, Group, Prompt, Reward, ScoredGroup, VersionSpan
from rl.update import pack_rules, update_policy
from rl.world import World
from tests.bench.workload import now
from tests.conftest import make_tiny_tokenizer
from tests.rl.families import save_tiny, tiny_config

FAMILIES = ("lfm2", "falcon_h1", "mamba2", "qwen3_next", "granitemoehybrid", "gptj")
GROUP, PROMPT = 8, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=FAMILIES)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--longest", type=int, default=160, help="tokens of the longest completion")
    parser.add_argument("--width", type=int, default=32, help="hidden size; some families take 32 only")
    parser.add_argument("--budget", type=int, default=8192, help="train.token_budget")
    arguments = parser.parse_args()
    for name in arguments.families:
        with tempfile.TemporaryDirectory() as folder:
            measure(name, Path(folder), arguments)


def draw_groups(num_groups: int, longest: int) -> list[ScoredGroup]:
    """Random ids after prompts of `PROMPT`; lengths are geometric of a third of the longest, cut there."""
    draw, groups = random.Random(0), []
    ids = lambda n: [draw.randrange(5, 100) for _ in range(n)]  # noqa: E731
    for p in range(num_groups):
        lengths = [min(longest, 1 + int(draw.expovariate(3 / longest))) for _ in range(GROUP)]
        completions = [Completion(ids(n), [], [True] * n, "stop", [VersionSpan(0, n)]) for n in lengths]
        rewards = [Reward(draw.random()) for _ in lengths]
        groups.append(ScoredGroup(Group(Prompt(f"p{p}", "", tuple(ids(PROMPT))), completions), rewards))
    return groups


def measure(name: str, folder: Path, arguments: argparse.Namespace) -> None:
    groups = draw_groups(arguments.rows // GROUP, arguments.longest)
    sizes = {"hidden_size": arguments.width, "max_position_embeddings": 1024}
    save_tiny(name, folder, tiny_config(name, **sizes))
    make_tiny_tokenizer(folder)
    on_gpu = torch.cuda.is_available()
    settings = [f"model.name={folder}", f"model.dtype={'bf16-mixed' if on_gpu else 'fp32'}"]
    settings += ["loss.kl_coef=0", "loss.sampler_correction=null", f"train.token_budget={arguments.budget}"]
    config, accelerator = load_config(None, settings), Accelerator(cpu=not on_gpu)
    policy = CausalPolicy(config.model, accelerator, temperature=1.0)
    policy.settle_attention(PROMPT + arguments.longest)
    optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.0)
    advantages = [[r.score - 0.5 for r in g.rewards] for g in groups]  # type: ignore[operator]
    batches = pack(groups, advantages, pack_rules(config, share_prompts=policy.shares_prompts))
    calls = len(batches[0].micro_batches)
    tokens = sum(len(m.token_ids_N) for m in batches[0].micro_batches)
    rectangles = sum(len(m.blocks) * m.layout.longest for m in batches[0].micro_batches)
    padded, seconds = policy.scorer.padded, {}
    for way in (False, True):
        policy.scorer.padded = way and padded
        times = []
        for _ in range(4):
            began = now()
            update_policy(policy, optimizer, batches, config.loss, world=World(accelerator))
            times.append(now() - began)
        seconds[way] = statistics.median(times[1:])
    print(
        f"{name}: one at a time {seconds[False]:.2f} s, {calls} padded batches {seconds[True]:.2f} s "
        f"({seconds[False] / seconds[True]:.1f} x; padding {1 - tokens / rectangles:.0%})"
        + ("" if padded else "  not padded"),
        flush=True,
    )


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
