"""Seconds of a step of the training phase by class of kernel, on workload W's lengths.

    python -m tests.bench.train_profile [--shape 1.5b|0.5b] [--budget 12288] [--compare KEY=VALUE ...]

The step is that of `tests.bench.train_phase`: the median of three without a profiler, after two, then one
that is traced. `idle` is the measured step without the time in which kernels ran. MFU counts useful FLOP
only; the rate of the matrix products counts all that they computed, the head's second pass included.
`--compare` measures the same step with other settings of the config afterwards, `--compare-attention` with
a call per crossing in place of copied keys (`rl.model.varlen_plan`), `--compare-sums` with gradients that
autograd adds up (`rl.model.linear`), in this process. `waits` are the places where a step's host waits for
the GPU; the last lines are the longest times without a kernel.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from rl.model import linear, loading, varlen_plan
from rl.types import ScoredGroup
from tests.bench.flops import peak_flops, training_flops
from tests.bench.kernels import PRODUCTS, gaps, largest, table, trace
from tests.bench.train_phase import MEASURED, WARM_UP, draw_groups, training_config, training_step
from tests.bench.workload import Workload, write_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    Workload.add_arguments(parser)
    parser.add_argument("--budget", type=int, default=12288, help="tokens of a micro-batch")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the config")
    parser.add_argument("--compare", nargs="*", default=[], help="overrides of a second measurement")
    parser.add_argument("--compare-attention", action="store_true")
    parser.add_argument("--compare-sums", action="store_true")
    parser.add_argument("--largest", type=int, default=16, help="kernels listed by name")
    arguments = parser.parse_args()
    workload = Workload.of(arguments)
    workload.export()
    groups = draw_groups(workload)
    overrides = [f"train.token_budget={arguments.budget}", *arguments.set]
    with tempfile.TemporaryDirectory() as scratch:
        model = write_model(Path(scratch) / "model", workload)
        seconds = profiled(model, groups, overrides, arguments.largest)
        if arguments.compare:
            other = profiled(model, groups, [*overrides, *arguments.compare], arguments.largest)
            print(f"{' '.join(arguments.compare)}: {other / seconds:.3f} of the seconds before")
        if arguments.compare_attention:
            varlen_plan.MOST_KEYS = 0
            other = profiled(model, groups, overrides, arguments.largest)
            print(f"a call per crossing: {other / seconds:.3f} of the seconds of copied keys")
        if arguments.compare_sums:
            loading.add_gradients_in_products = id
            linear.wide_products_work = lambda: False
            other = profiled(model, groups, overrides, arguments.largest)
            print(f"gradients added by autograd: {other / seconds:.3f} of the seconds within products")


def profiled(model: Path, groups: list[ScoredGroup], overrides: list[str], count: int) -> float:
    """Prints one measurement; returns the step's seconds."""
    began = time.perf_counter()
    policy, step, note = training_step(training_config(model, overrides), groups)
    print(
        f"== {' '.join(overrides)}: policy after {time.perf_counter() - began:.1f} s {note or ''}", flush=True
    )
    on_gpu = policy.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    warm = [step()[1] for _ in range(WARM_UP)]
    seconds = statistics.median(step()[1] for _ in range(MEASURED))
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    config = json.loads((model / "config.json").read_text())
    lengths = [(len(g.prompt.token_ids), [len(c.token_ids) for c in g.completions]) for g in groups]
    mfu = training_flops(config, lengths) / seconds / peak_flops()
    print(f"train {seconds:.3f} s, first {warm[0]:.3f} s, MFU {mfu:.3f}, peak {peak:.1f} GiB", flush=True)
    if on_gpu:
        print(f"waits: {', '.join(waits(step))}")
    kernels, flop = trace(step, operators=True)
    weights = frozenset(tuple(p.shape) for _, p in policy.trainable() if p.ndim > 1)
    how = {"weights": weights, "vocabulary": config["vocab_size"]}
    print("\n".join(table(kernels, 1, 1e3 * seconds, **how)))
    of_products = sum(k.us for k in kernels if k.op in PRODUCTS) / 1e6
    if of_products:
        rate = flop / of_products
        print(
            f"products: {flop / 1e12:.3g} TFLOP in {of_products:.3f} s, {rate / peak_flops():.3f} of the peak"
        )
    print("\n".join(largest(kernels, 1, count, **how)))
    print("\n".join(gaps(kernels)), flush=True)
    del policy, step
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return seconds


def waits(step: Callable[[], object]) -> list[str]:
    """`count x file:line` of what synchronises with the GPU in a step."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in found if "synchroniz" in str(w.message))
    return [f"{number} x {place}" for place, number in places.most_common(12)]


if __name__ == "__main__":
    main()
