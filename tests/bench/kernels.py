"""What a GPU computes, by class of kernel: a trace of torch's profiler, summed.

On a CPU the operators' own times stand for kernels, so that a program can be tried without a GPU.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.bench.clock import synchronize

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm")
CLASSES = {
    "attention": r"flash|fmha|attention|attn|merge_state|reshape_and_cache|concat_and_cache",
    "optimizer": r"multi_tensor|adam|lp_?norm",
    "vocabulary": r"gumbel|topk|top_p|softmax|logit|_ranks|sampl|argmax|ArgMax|penalt|exponential|"
    r"^_(forward|backward)_kernel|^_temperature|^_min_p|scatter_gather|cross_entropy",
    "matmul": r"gemm|gemv|nvjet|cutlass|xmma|cublas|splitk|wgmma|aten::(mm|addmm|bmm|baddbmm|_grouped_mm)$",
    "norms, rope, activations": r"rms|norm|rope|rotary|silu|swiglu|gelu|triton_(poi|red|per)",
    "copies": r"copy|memcpy|memset|\bcat|Cat|index|gather|scatter|slot_mapping|fill|aten::(contiguous|clone)",
    "elementwise": r"elementwise|reduce|aten::(add|mul|sum|div|neg|exp|sub)",
}


@dataclass(frozen=True)
class Kernel:
    """A kernel's run. `op` and its `shapes` are those of the operator that started it, if it is known."""

    name: str
    start_us: float
    us: float
    op: str = ""
    shapes: tuple[tuple[int, ...], ...] = ()


def trace(work: Callable[[], object], *, operators: bool) -> tuple[list[Kernel], float]:
    """The kernels that `work` runs, and the FLOP of its matrix products (0 unless `operators`)."""
    on_gpu = torch.cuda.is_available()
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CUDA] * on_gpu + [kinds.CPU] * (operators or not on_gpu)
    synchronize()
    with torch.profiler.profile(activities=activities, record_shapes=operators) as profiler:
        work()
        synchronize()
    if not on_gpu:
        found = profiler.events() or []
        own = [(e, tuple(map(_shape, e.input_shapes or ()))) for e in found if e.self_cpu_time_total > 0]
        kernels = [Kernel(e.name, e.time_range.start, e.self_cpu_time_total, e.name, s) for e, s in own]
        return kernels, sum(_flop(k.op, k.shapes) for k in kernels)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(errors="replace"))["traceEvents"]
    ops: dict[Any, tuple[str, tuple[tuple[int, ...], ...]]] = {}
    for event in events:
        if event.get("cat") == "cpu_op" and (more := event.get("args", {})):
            ops[more.get("External id")] = (event["name"], tuple(map(_shape, more.get("Input Dims", ()))))
    kernels = [
        Kernel(e["name"], e["ts"], e["dur"], *ops.get(e.get("args", {}).get("External id"), ("", ())))
        for e in events
        if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and "dur" in e
    ]
    return kernels, sum(_flop(name, shapes) for name, shapes in ops.values())


def _shape(dims: Any) -> tuple[int, ...]:
    return tuple(dims) if isinstance(dims, list | tuple) and all(isinstance(n, int) for n in dims) else ()


def _flop(op: str, shapes: Sequence[tuple[int, ...]]) -> float:
    """2 x the size of a matrix product; 0 of other operators. A sum that it is added to comes first, and
    the output last.
    """
    if op not in PRODUCTS:
        return 0.0
    found = [shape for shape in shapes if len(shape) >= 2]
    a, b = found[1:3] if len(found) > 2 else found
    return 2.0 * torch.Size(a).numel() * b[-1]


def busy_us(kernels: Iterable[Kernel]) -> float:
    """Microseconds in which at least one kernel ran."""
    total, until = 0.0, 0.0
    for kernel in sorted(kernels, key=lambda k: k.start_us):
        end = kernel.start_us + kernel.us
        total += max(0.0, end - max(until, kernel.start_us))
        until = max(until, end)
    return total


def class_of(kernel: Kernel, weights: frozenset[tuple[int, ...]] = frozenset(), vocabulary: int = 0) -> str:
    """Its class by name; with `weights`, the shapes of parameters, also whether it casts or adds up those."""
    found = next((c for c, p in CLASSES.items() if re.search(p, kernel.name, re.IGNORECASE)), "other")
    if kernel.op in PRODUCTS:
        return "matmul of the head" if any(vocabulary in shape for shape in kernel.shapes) else "matmul"
    if kernel.op == "aten::copy_" and weights.intersection(kernel.shapes):
        return "casts of weights and gradients"
    if kernel.op in ("aten::add_", "aten::add") and weights.intersection(kernel.shapes):
        return "sums of gradients"
    return found


def table(kernels: Sequence[Kernel], steps: int, step_ms: float, **how: Any) -> list[str]:
    """Lines with milliseconds, share and number of kernels by class, and the idle rest of `step_ms`, which
    was measured without the profiler.
    """
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for kernel in kernels:
        row = sums[class_of(kernel, **how)]
        row[0], row[1] = row[0] + kernel.us / 1e3 / steps, row[1] + 1 / steps
    idle = step_ms - busy_us(kernels) / 1e3 / steps
    rows = [*sorted(((c, ms, n) for c, (ms, n) in sums.items()), key=lambda r: -r[1]), ("idle", idle, 0)]
    return [f"{c:<32} {ms:9.3f} ms {ms / step_ms:6.1%} {n:8.1f} kernels" for c, ms, n in rows]


def largest(kernels: Sequence[Kernel], steps: int, count: int = 12, **how: Any) -> list[str]:
    """The kernels that take most, by name and starting operator."""
    sums: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    for kernel in kernels:
        row = sums[class_of(kernel, **how), kernel.op, kernel.name]
        row[0], row[1] = row[0] + kernel.us / 1e3 / steps, row[1] + 1 / steps
    rows = sorted(sums.items(), key=lambda item: -item[1][0])[:count]
    return [f"  {ms:9.3f} ms {n:7.1f} x  [{c}] {op} {name[:90]}" for (c, op, name), (ms, n) in rows]


def gaps(kernels: Sequence[Kernel], count: int = 12) -> list[str]:
    """The longest times without a kernel: when, between which two, and after which operator."""
    found, last = [], None
    begin = min((k.start_us for k in kernels), default=0.0)
    for kernel in sorted(kernels, key=lambda k: k.start_us):
        if last is not None:
            found.append((kernel.start_us - last.start_us - last.us, last, kernel))
        if last is None or kernel.start_us + kernel.us > last.start_us + last.us:
            last = kernel
    found.sort(key=lambda gap: -gap[0])
    return [f"  {len(found)} gaps, of {sum(max(0.0, us) for us, *_ in found) / 1e3:.1f} ms in all"] + [
        f"  {us / 1e3:7.3f} ms at {(a.start_us + a.us - begin) / 1e3:8.1f}: "
        f"{a.op} {a.name[:44]} .. {b.op} {b.name[:44]}"
        for us, a, b in found[:count]
    ]
