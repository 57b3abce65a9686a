"""Seconds of a weight sync by part on one machine, and what its calls into the engine cost.

    python -m tests.bench.sync 1.5b [--device cuda] [--syncs 10] [--profile]

A policy of `recipes.grpo`'s kind and a vLLM engine in a process of its own, random weights of a shape of
`tests.bench.workload` or a model's folder. Every value moves between two syncs. The first two syncs go
through vLLM's reload or compile; the median of the others is printed. "sync" is what a step waits for: the
canary, the policy's forward pass and the engine's, is compared beside sampling. Then come medians of a call
that does nothing, of a completion of one token, and of the canary's log-probs, each by itself.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from rl.causal import CausalPolicy
from rl.config.read import load_config
from rl.types import Prompt, SamplingParams
from rollout.vllm.engine import VllmEngine
from rollout.weight_sync import publish
from tests.bench.clock import synchronize
from tests.bench.sampling import timed_calls
from tests.bench.workload import SHAPES, Workload, write_model
from tests.calling import call
from tests.vllm_engines import start_vllm

WARM_UP, MAX_LEN = 2, 1224


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help=f"folder, or random weights of a shape: {', '.join(SHAPES)}")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--process", choices=["own", "inside"], default="own")
    parser.add_argument("--syncs", type=int, default=10, help=f"measured ones, after {WARM_UP}")
    parser.add_argument("--memory", type=float, default=0.35, help="share of the GPU")
    parser.add_argument("--profile", action="store_true", help="functions of this process over one sync")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = asked.model
        if model in SHAPES:
            model = str(write_model(Path(scratch) / "model", Workload(shape=model)))
        measure(model, asked)


def measure(model: str, asked: argparse.Namespace) -> None:
    on_gpu = asked.device == "cuda"
    config = load_config(None, [f"model.name={model}", f"model.dtype={'bf16-mixed' if on_gpu else 'fp32'}"])
    policy = CausalPolicy(config.model, Accelerator(cpu=not on_gpu), temperature=1.0)
    policy.settle_attention()
    engine = start_vllm(
        model,
        policy.tokenizer,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        max_model_len=MAX_LEN,
        process=asked.process,
        gpu_memory_utilization=asked.memory,
        kv_cache_gib=0.5,
    )
    try:
        syncs(policy, engine, asked)
        calls(policy, engine)
    finally:
        engine.close()


def syncs(policy: CausalPolicy, engine: VllmEngine, asked: argparse.Namespace) -> None:
    rows, gaps = [], []
    inside = timed_calls(engine)
    for version in range(1, WARM_UP + asked.syncs + 1 + asked.profile):
        with torch.no_grad():
            for _, parameter in policy.trainable():
                parameter.mul_(1 + 2**-9)
        synchronize()
        inside.clear()
        profiler = cProfile.Profile()
        if is_last := asked.profile and version == WARM_UP + asked.syncs + 1:
            profiler.enable()
        report = publish(engine, policy.weights(), version=version, canary_waits=asked.process == "own")
        profiler.disable()
        before = report.seconds
        report = report.verdict() if report.verdict else report
        if is_last:
            pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
        elif version > WARM_UP:
            rows.append(dict(report.parts) | {"sync": before} | {f"  {k}": v for k, v in inside.items()})
            gaps.append(report.canary_mean_gap)
    num_bytes = sum(held.num_bytes for held in engine.tensors.values())
    size = f"{len(engine.tensors)} tensors, {num_bytes / 1e9:.2f} GB"
    print(f"{size}, median of {len(rows)} syncs; canary {max(gaps):.2g} nats at most, on average")
    for name in dict.fromkeys(name for row in rows for name in row):
        print(f"{name:30s}{spread([row.get(name, 0.0) for row in rows])}", flush=True)


def calls(policy: CausalPolicy, engine: VllmEngine) -> None:
    """What the engine takes for each by itself, with nothing else to do."""
    ids = policy.canary_ids
    draws = iter(range(10**6))

    def one_token() -> None:
        prompt = Prompt(f"p{next(draws)}", "", (*ids[:-1], next(draws) % 100))
        engine.generate(call([prompt], num_completions=1, sampling=SamplingParams(1), seeds=[0]))

    core: Any = engine._core
    timed: dict[str, Callable[[], Any]] = {
        "a call that does nothing": lambda: core._utility("is_scheduler_paused"),
        "a call of the worker": lambda: core.call("cohort_lease", "", 0.0),
        "fingerprints": engine.fingerprints,
        "a completion of one token": one_token,
        "the engine's canary": lambda: engine.prompt_logprobs(ids),
        "the policy's canary": policy.canary,
    }
    for name, work in timed.items():
        seconds = []
        for _ in range(12):
            synchronize()
            began = time.perf_counter()
            work()
            synchronize()
            seconds.append(time.perf_counter() - began)
        print(f"{name:30s}{spread(seconds[WARM_UP:])}", flush=True)


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):8.4f} s  ({min(seconds):.4f} to {max(seconds):.4f})"


if __name__ == "__main__":
    main()
