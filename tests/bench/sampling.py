"""Tokens per second of the vLLM engine, and seconds of a weight sync by part, on workload W.

    python -m tests.bench.sampling MODEL_DIR|SHAPE [--device cuda] [--process own|inside] [--logprobs 0|1] ...

A burst: `--prompts` x `--group` completions submitted at once, until the last one is done. Steady: as many
kept in flight, refilled in waves of a quarter. Profile, with --process inside: a decode step's time, and
the GPU's part of it, by the number of running completions. Sync: fp32 weights beside the engine, three times
when it is idle and once under running completions. Weights and prompts may be random; the share
`--stop-share` of the vocabulary ends a completion, so that lengths are geometric and cut at `--max-new`.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rl.types import Group, Prompt, SamplingParams
from rollout.vllm.engine import VllmEngine
from rollout.weight_sync import publish
from tests.bench.clock import synchronize
from tests.bench.workload import SHAPES, Workload, write_model
from tests.calling import call
from tests.vllm_engines import start_vllm

WAVES = 4


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.model in SHAPES:
            arguments.model = write_model(Path(scratch) / "model", Workload(shape=arguments.model))
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    config = json.loads((Path(arguments.model) / "config.json").read_text())
    began = time.perf_counter()
    weights = None if arguments.no_sync else TrainerWeights(arguments.model, arguments.device)
    if weights is not None:
        say("trainer", f"{time.perf_counter() - began:.1f} s to load fp32 weights", memory(arguments.device))
    engine = start(arguments)
    try:
        load = Load(engine, config, arguments)
        for number in range(arguments.bursts):
            burst(load, number)
        steady(load)
        if arguments.profile and engine.runs_alone:
            say("profile", "only of --process inside")
        elif arguments.profile:
            profile(load)
        if weights is not None:
            syncs(load, weights)
    finally:
        engine.close()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help=f"folder, or random weights of a shape: {', '.join(SHAPES)}")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--process", choices=["auto", "own", "inside"], default="auto")
    parser.add_argument("--apart", action="store_true", help="with --process own: the worker has one, too")
    parser.add_argument("--logprobs", type=int, choices=[0, 1], default=0)
    parser.add_argument("--seeds", type=int, choices=[0, 1], help="per completion; default: the engine's own")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=200)
    parser.add_argument("--max-new", type=int, default=1024)
    parser.add_argument("--stop-share", type=float, default=512 / 151936)
    parser.add_argument("--bursts", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of the steady state")
    parser.add_argument("--memory", type=float, default=0.35, help="share of the GPU")
    parser.add_argument("--kv-gib", type=float, default=1.0, help="on a CPU")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--recompute-kv", action="store_true")
    parser.add_argument("--no-sync", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--bandwidth", type=float, default=4.8, help="of the memory, TB/s: 4.8 is an H200's")
    return parser.parse_args()


def say(what: str, *cells: str) -> None:
    print(f"{what:9s}" + "  ".join(cell for cell in cells if cell), flush=True)


def memory(device: str) -> str:
    if device != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info()
    return f"{(total - free) / 2**30:.1f} of {total / 2**30:.0f} GiB used"


def start(arguments: argparse.Namespace) -> VllmEngine:
    from transformers import PreTrainedTokenizerFast

    began = time.perf_counter()
    engine = start_vllm(
        arguments.model,
        PreTrainedTokenizerFast.from_pretrained(arguments.model),
        dtype=torch.bfloat16 if arguments.device == "cuda" else torch.float32,
        max_model_len=arguments.prompt_length + arguments.max_new,
        process=arguments.process,
        apart=arguments.apart,
        max_num_seqs=arguments.prompts * arguments.group,
        gpu_memory_utilization=arguments.memory,
        kv_cache_gib=arguments.kv_gib,
        enforce_eager=arguments.eager or None,
        seed_requests=None if arguments.seeds is None else bool(arguments.seeds),
        recompute_kv=arguments.recompute_kv,
        timeout_s=600.0,
    )
    settings = engine._core.engine.vllm_config
    say(
        "start",
        f"{time.perf_counter() - began:.1f} s",
        f"process {'own' if engine.runs_alone else 'inside'}{', worker apart' * arguments.apart}",
        f"asynchronous {settings.scheduler_config.async_scheduling}",
        f"runner v{2 if getattr(settings, 'use_v2_model_runner', False) else 1}",
        f"seeds {engine.seed_requests}",
        f"log-probs {bool(arguments.logprobs)}",
        f"{settings.cache_config.num_gpu_blocks} blocks",
        memory(arguments.device),
    )
    return engine


class Load:
    """Groups with fresh random prompts for an engine, as many as are asked for."""

    def __init__(self, engine: VllmEngine, config: dict[str, Any], arguments: argparse.Namespace) -> None:
        self.engine, self.arguments, self.draw = engine, arguments, random.Random(0)
        self.vocabulary = config["vocab_size"]
        self.num_stops = max(1, round(arguments.stop_share * self.vocabulary))
        self.limit = decode_limit(config, arguments)

    def submit(self, count: int) -> None:
        length, draw = self.arguments.prompt_length, self.draw
        ids = [tuple(draw.choices(range(self.num_stops, self.vocabulary), k=length)) for _ in range(count)]
        self.engine.submit(
            call(
                [Prompt("p", "", row) for row in ids],
                num_completions=self.arguments.group,
                sampling=SamplingParams(self.arguments.max_new, stop_token_ids=tuple(range(self.num_stops))),
                seeds=[draw.randrange(1 << 30) for _ in ids],
                with_logprobs=bool(self.arguments.logprobs),
            )
        )

    def collect_all(self) -> list[Group]:
        groups: list[Group] = []
        while self.engine.in_flight:
            groups += self.engine.collect(timeout_s=60.0)
        return groups

    def of_limit(self, tokens_per_second: float) -> str:
        on_gpu = self.arguments.device == "cuda"
        return f"{tokens_per_second / self.limit:.0%} of the memory's limit" if on_gpu else ""


def num_tokens(groups: list[Group]) -> int:
    return sum(len(c.token_ids) for group in groups for c in group.completions)


def decode_limit(config: dict[str, Any], arguments: argparse.Namespace) -> float:
    """Tokens per second if a decode step only read weights, and keys and values of prompt + 256 tokens."""
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    layers, width = config["num_hidden_layers"], config["hidden_size"]
    attention = 2 * width * head_dim * (config["num_attention_heads"] + heads)
    weights = layers * (attention + 3 * width * config["intermediate_size"]) + config["vocab_size"] * width
    in_flight = arguments.prompts * arguments.group
    cached = in_flight * (arguments.prompt_length + 256) * 2 * layers * heads * head_dim
    return in_flight / (2 * (weights + cached) / (arguments.bandwidth * 1e12))


def burst(load: Load, number: int) -> None:
    engine, began = load.engine, time.perf_counter()
    load.submit(load.arguments.prompts)
    submitted = time.perf_counter() - began
    groups = engine.collect(timeout_s=600.0)
    first = time.perf_counter() - began
    groups += load.collect_all()
    seconds, tokens = time.perf_counter() - began, num_tokens(groups)
    longest = max(len(c.token_ids) for group in groups for c in group.completions)
    say(
        f"burst {number}",
        f"{tokens} tokens in {seconds:.2f} s",
        f"{tokens / seconds:.0f} tok/s",
        load.of_limit(tokens / seconds),
        f"{1e3 * seconds / longest:.2f} ms a step ({longest} steps)",
        f"submitted in {submitted:.2f} s, first group after {first:.2f} s",
    )


def steady(load: Load) -> None:
    """Measured from the first refill on; what is in flight at the end is waited for, and not counted."""
    engine, prompts = load.engine, load.arguments.prompts
    wave = max(1, prompts // WAVES)
    load.submit(prompts)
    tokens, waiting, busy = 0, 0, 0.0
    began: float | None = None
    while began is None or time.perf_counter() - began < load.arguments.seconds:
        groups = engine.collect(timeout_s=60.0)
        waiting += len(groups)
        tokens += num_tokens(groups) if began is not None else 0
        if waiting >= wave:
            before = time.perf_counter()
            load.submit(waiting)
            busy += time.perf_counter() - before
            began, waiting = began or time.perf_counter(), 0
    seconds = time.perf_counter() - began
    load.collect_all()
    say(
        "steady",
        f"{prompts * load.arguments.group} in flight, waves of {wave} groups",
        f"{tokens / seconds:.0f} tok/s over {seconds:.1f} s",
        load.of_limit(tokens / seconds),
        f"{busy / seconds:.1%} of the time in submit",
    )


def profile(load: Load) -> None:
    """Profiles an engine in this process as a burst runs out: 24 steps by clock, 12 by torch's profiler."""
    from torch.autograd import DeviceType

    engine = load.engine
    running = engine._core._client.engine_core.scheduler.requests

    def steps(count: int) -> float:
        """Milliseconds a step."""
        synchronize()
        began = time.perf_counter()
        for _ in range(count):
            engine._advance(time.monotonic(), "a step")
        synchronize()
        return 1e3 * (time.perf_counter() - began) / count

    load.submit(load.arguments.prompts)
    steps(20)
    size = load.arguments.prompts * load.arguments.group
    while size >= 16 and running:
        while len(running) > size:
            steps(1)
        first, wall = len(running), steps(24)
        with torch.profiler.profile() as profiler:
            steps(12)
        kernels = [e for e in profiler.key_averages() if e.device_type == DeviceType.CUDA]
        busy = sum(e.self_device_time_total for e in kernels) / 12e3
        number = sum(e.count for e in kernels) / 12
        what = f"{first} to {len(running)} running"
        say("profile", what, f"{wall:.2f} ms a step", f"{busy:.2f} ms in {number:.0f} kernels")
        size //= 2
    load.collect_all()


class TrainerWeights:
    """A WeightStream of a transformers model with fp32 weights, as a trainer in mixed precision has them."""

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import AutoModelForCausalLM

        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model: Any = loaded.to(device).eval().requires_grad_(False)
        self.device = device

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.model.named_parameters())

    @torch.no_grad()
    def canary(self) -> tuple[list[int], list[float]]:
        vocabulary = self.model.config.vocab_size
        ids = torch.tensor([[(37 * i + 5) % vocabulary for i in range(16)]], device=self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        chosen = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        return ids[0].tolist(), chosen.tolist()

    def train_a_little(self) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1.001)


def syncs(load: Load, weights: TrainerWeights) -> None:
    engine, calls = load.engine, timed_calls(load.engine)
    for number in range(4):
        running = number == 3
        if running:
            load.submit(load.arguments.prompts)
            engine._advance(time.monotonic() + 0.5, "a moment of sampling")
        weights.train_a_little()
        calls.clear()
        report = publish(engine, weights, version=number + 1, tolerance=None)
        parts = "  ".join(f"{name} {seconds:.3f}" for name, seconds in report.parts.items())
        inside = "  ".join(f"{name} {seconds:.3f}" for name, seconds in calls.items())
        num_bytes = sum(held.num_bytes for held in engine.tensors.values())
        what = f"{report.seconds:.3f} s for {len(engine.tensors)} tensors, {num_bytes / 1e9:.2f} GB"
        say(f"sync {number}", what, "under running completions" if running else "idle")
        say("", parts, f"gap {report.canary_max_gap:.2g} nats")
        say("", f"of send: {inside}  the rest {report.parts['send'] - sum(calls.values()):.3f}")
        if running:
            spans = [c.version_spans for g in load.collect_all() for c in g.completions]
            switched = sum(len(s) > 1 for s in spans)
            say("", f"{switched} of {len(spans)} completions go on under the new weights")


def timed_calls(engine: VllmEngine) -> dict[str, float]:
    """Seconds of the calls into the core that an update makes, by name; filled in from now on."""
    calls: dict[str, float] = {}
    stock = engine._core._utility

    def timed(method: str, *rest: Any) -> Any:
        began = time.perf_counter()
        answer = stock(method, *rest)
        name = rest[0].removeprefix("cohort_") if method == "collective_rpc" else method.split("_")[0]
        if name != "fingerprints":
            calls[name] = calls.get(name, 0.0) + time.perf_counter() - began
        return answer

    engine._core._utility = timed  # pyright: ignore
    return calls


if __name__ == "__main__":
    main()
