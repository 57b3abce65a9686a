"""Milliseconds of a decode step on workload W's model, by kernel class and by options of vLLM.

    python -m tests.bench.decode_step [--shape 1.5b] [--only default,triton] [--limit-s 300]

A batch of `--sizes` completions runs steadily: nothing ends, nothing is added. A step is the median of 100,
with the engine in this process; then 20 more are traced and summed by class (`tests.bench.kernels`). Every
set of options has a process of its own; one that fails, or for which no time is left, is one line.
`default` measures, from one start, no log-probs (the trace's), log-probs by our kernels and by vLLM's, and
logits that are not copied to fp32 before the draw. vLLM's fusion passes need quantised weights, several GPUs
or ROCm: none applies here.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MIN_START_S = 45  # with less left, another set of options is not begun


def graphs(**more: Any) -> dict[str, Any]:
    return {"compilation_config": more}


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "default": ({}, {}),
    "one-split": ({"attention_config": {"flash_attn_max_num_splits_for_cuda_graph": 1}}, {}),
    "triton": ({"attention_backend": "TRITON_ATTN"}, {}),
    "triton-split": ({"attention_backend": "TRITON_ATTN"}, {}),  # each completion's, however many there are
    "compile-sizes": (graphs(compile_sizes=[16, 64, 240]), {}),
    "flash-2": ({"attention_config": {"flash_attn_version": 2}}, {}),
    "flashinfer": ({"attention_backend": "FLASHINFER"}, {}),
    "full": (graphs(cudagraph_mode="FULL"), {}),
    "full-and-piecewise": (graphs(cudagraph_mode="FULL_AND_PIECEWISE"), {}),
    "full-decode-only": (graphs(cudagraph_mode="FULL_DECODE_ONLY"), {}),
    "piecewise": (graphs(cudagraph_mode="PIECEWISE"), {}),
    "sizes": (
        {"cudagraph_capture_sizes": [1, 2, 4, *range(8, 257, 8)], "max_cudagraph_capture_size": None},
        {},
    ),
    "no-async": ({"async_scheduling": False}, {}),
    "custom-ops": (graphs(custom_ops=["all"]), {}),
    "combo-kernels": (graphs(inductor_compile_config={"combo_kernels": True}), {}),
    "max-autotune": (graphs(inductor_compile_config={"max_autotune": True}), {}),
    "runner-1": ({}, {"VLLM_USE_V2_MODEL_RUNNER": "0"}),
    "no-compile": (graphs(mode=0), {}),
}
BY_DEFAULT = "default,one-split,triton,triton-split"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="1.5b")
    parser.add_argument("--only", default=BY_DEFAULT, help=f"of {', '.join(OPTIONS)}")
    parser.add_argument("--sizes", default="240,64,16", help="running completions, multiples of 8")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--traced", type=int, default=20)
    parser.add_argument("--limit-s", type=float, default=300.0)
    parser.add_argument("--largest", type=int, default=12, help="kernels listed by name")
    parser.add_argument("--folder", type=Path, help="of the model; for the processes of this program")
    parser.add_argument("--measure", choices=OPTIONS, help="in this process")
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments)
        return
    until = time.monotonic() + arguments.limit_s
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.only.split(","):
            if name not in OPTIONS:
                sys.exit(f"--only={name}: choose from {', '.join(OPTIONS)}")
            begun = time.monotonic()
            if until - begun < MIN_START_S:
                print(f"{name}: not run, {until - begun:.0f} s are left of --limit-s", flush=True)
                continue
            fault = run_child(name, Path(scratch), until - begun)
            said = f"failed: {fault}" if fault else "done"
            print(f"{name}: {said} after {time.monotonic() - begun:.0f} s", flush=True)


def run_child(name: str, scratch: Path, limit_s: float) -> str | None:
    """Measures one set of options in a process of its own; returns what went wrong, in one line."""
    words = [*sys.argv[1:], "--measure", name, "--folder", str(scratch / "model")]
    environment = {**os.environ, **OPTIONS[name][1], "PYTHONUNBUFFERED": "1"}
    log = scratch / f"{name}.log"
    with log.open("w") as errors:
        command = [sys.executable, "-m", "tests.bench.decode_step", *words]
        child = subprocess.Popen(command, stderr=errors, env=environment)
        try:
            code = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            return f"not done within {limit_s:.0f} s"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return None if code == 0 else f"code {code}: {' | '.join(lines[-2:])[-500:]}"


def measure(arguments: argparse.Namespace) -> None:
    from tests.bench.workload import Workload, write_model

    workload = Workload(shape=arguments.shape)
    began = time.perf_counter()
    if not (arguments.folder / "config.json").exists():
        write_model(arguments.folder, workload)
    written = time.perf_counter() - began
    engine = start(arguments)
    of = engine._core.engine.vllm_config
    print(
        f"== {arguments.measure}: started in {time.perf_counter() - began - written:.0f} s, "
        f"graphs {getattr(of.compilation_config.cudagraph_mode, 'name', None)}, "
        f"runner v{2 if getattr(of, 'use_v2_model_runner', False) else 1}, "
        f"asynchronous {of.scheduler_config.async_scheduling}, {backends(engine)}"
    )
    try:
        sizes = [int(size) for size in arguments.sizes.split(",")]
        for size in sizes:
            steady(engine, workload, arguments, size, logprobs=False)
        if arguments.measure == "default":
            for size in sizes:
                steady(engine, workload, arguments, size, logprobs=True)
            with_own_logprobs(engine, workload, arguments, sizes)
            with_narrow_logits(engine, workload, arguments, sizes)
    finally:
        engine.close()


def start(arguments: argparse.Namespace) -> Any:
    """An engine in this process with the options of `--measure`."""
    import torch
    from transformers import PreTrainedTokenizerFast

    from rollout.vllm import local
    from tests.vllm_engines import start_vllm

    plain, more = local.engine_arguments, OPTIONS[arguments.measure][0]
    if arguments.measure == "triton-split":
        backend: Any = importlib.import_module("vllm.v1.attention.backends.triton_attn")
        backend.MIN_LAUNCH_GRID_SIZE_2D = 1 << 20

    def with_options(settings: Any) -> dict[str, Any]:
        return {name: value for name, value in (plain(settings) | more).items() if value is not None}

    local.engine_arguments = with_options
    return start_vllm(
        arguments.folder,
        PreTrainedTokenizerFast.from_pretrained(arguments.folder),
        dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
        max_model_len=200 + 1024,
        process="inside",
        max_num_seqs=256,
        gpu_memory_utilization=0.35,
        kv_cache_gib=1.0,
        timeout_s=600.0,
    )


def backends(engine: Any) -> str:
    """Classes that compute attention, by vLLM's own record of its layers."""
    layers = engine._core.engine.vllm_config.compilation_config.static_forward_context
    return ", ".join(sorted({type(getattr(layer, "impl", layer)).__name__ for layer in layers.values()}))


def steady(
    engine: Any, workload: Any, arguments: argparse.Namespace, size: int, *, logprobs: bool, what: str = ""
) -> None:
    """Prints a step's milliseconds for `size` running completions, and without log-probs its classes."""
    from rl.types import Prompt, SamplingParams
    from tests.bench.kernels import busy_us, largest, table, trace
    from tests.calling import call

    draw, group = random.Random(size), min(8, size)
    stops, count = len(workload.stop_ids), 3 * (arguments.steps + arguments.traced) + 100
    ids = [
        tuple(draw.choices(range(stops, workload.vocabulary), k=workload.prompt_length))
        for _ in range(size // group)
    ]
    prompts = [Prompt(f"{what}{size}-{logprobs}-{i}", "", row) for i, row in enumerate(ids)]
    sampling = SamplingParams(min(count, 1024))
    seeds = [draw.randrange(1 << 30) for _ in ids]
    engine.submit(
        call(prompts, num_completions=group, sampling=sampling, seeds=seeds, with_logprobs=logprobs)
    )
    requests = engine._core._client.engine_core.scheduler.requests

    def step() -> None:
        engine._advance(time.monotonic(), "a step")

    for _ in range(20):
        step()
    before, times = tokens_of(requests), []
    for _ in range(arguments.steps):
        began = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - began))
    ms, per_step = statistics.median(times), (tokens_of(requests) - before) / len(times) / size
    label = (what or ("log-probs" if logprobs else "no log-probs")) + f", {size} running"
    odd = "" if 0.97 < per_step < 1.03 else f" ({per_step:.2f} tokens a step and completion)"
    print(f"{label}: {ms:.3f} ms a step, mean {statistics.mean(times):.3f}{odd}", end="")
    kernels, _ = trace(lambda: [step() for _ in range(arguments.traced)], operators=False)
    number, busy = len(kernels) / arguments.traced, busy_us(kernels) / 1e3 / arguments.traced
    print(f"; traced: {busy:.3f} ms busy in {number:.0f} kernels", flush=True)
    if arguments.measure == "default" and not what:
        print("\n".join(table(kernels, arguments.traced, ms)))
        if size == int(arguments.sizes.split(",")[0]) or size < 32:
            print("\n".join(largest(kernels, arguments.traced, arguments.largest)), flush=True)
    engine.abort(prompts)
    while requests:
        step()


def tokens_of(requests: Any) -> int:
    return sum(len(request._output_token_ids) for request in requests.values())


def with_own_logprobs(engine: Any, workload: Any, arguments: argparse.Namespace, sizes: list[int]) -> None:
    """The same with vLLM's own kernels for log-probs (`internals.quicken_logprobs` replaces them)."""
    from rollout.vllm.internals import OF_SAMPLED

    try:
        from vllm.v1.worker.gpu.sample import sampler
    except ImportError as error:
        print(f"vLLM's log-probs: not measured, {error}")
        return
    quick = {name: getattr(sampler, name) for name in OF_SAMPLED if hasattr(sampler, name)}
    for name, ours in quick.items():
        setattr(sampler, name, getattr(ours, "__wrapped__", ours))
    for size in sizes:
        steady(engine, workload, arguments, size, logprobs=True, what="vLLM's log-probs")
    for name, ours in quick.items():
        setattr(sampler, name, ours)


def with_narrow_logits(engine: Any, workload: Any, arguments: argparse.Namespace, sizes: list[int]) -> None:
    """The same without vLLM's copy of all logits to fp32, where temperature 1 leaves them as they are."""
    try:
        from vllm.v1.worker.gpu.sample.sampler import Sampler
    except ImportError as error:
        print(f"narrow logits: not measured, {error}")
        return
    plain = Sampler.apply_sampling_params
    if not getattr(engine._core.engine.vllm_config, "use_v2_model_runner", False):
        print("narrow logits: not measured, vLLM's first model runner has another sampler")
        return
    Sampler.apply_sampling_params = lambda self, logits, *_, **__: logits
    try:
        for size in sizes:
            steady(engine, workload, arguments, size, logprobs=False, what="narrow logits")
    except Exception as error:
        print(f"narrow logits: failed, {type(error).__name__}: {error}")
    finally:
        Sampler.apply_sampling_params = plain


if __name__ == "__main__":
    main()
