"""Attention in windows and with sinks: varlen calls beside whole scores, one layer, forward and backward.

    python -m tests.bench.windows [--prompts 8] [--prompt 300] [--longest 1024]

Shapes of attention are those of Gemma 3 4B and of gpt-oss-20b; lengths of completions are drawn. On a GPU in
bf16. On a CPU, for a try with small numbers, by torch's CPU kernels in fp32: there no memory is measured, and
the seconds say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import random
import statistics

import torch
from torch import nn

from rl.model.packed import Block, Layout, packed_attention
from rl.plan.memory import GIB
from tests.bench.clock import synchronize
from tests.bench.workload import now
from tests.rl.cpu_kernels import KERNELS

SHAPES = {  # query heads, key heads, head size, window, sinks
    "gemma3-4b local": (8, 4, 256, 1024, False),
    "gpt-oss-20b local": (64, 8, 64, 128, True),
    "gpt-oss-20b full": (64, 8, 64, None, True),
}
GROUP = 8
KERNELS_FOR = Layout.kernels_for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=300)
    parser.add_argument("--longest", type=int, default=1024)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    draw, blocks, start = random.Random(0), list[Block](), 0
    for _ in range(arguments.prompts):
        lengths = tuple(draw.randint(arguments.longest // 8, arguments.longest) for _ in range(GROUP))
        blocks.append(Block(start, arguments.prompt, lengths))
        start = blocks[-1].end
    print(f"{arguments.prompts} prompts x {GROUP} completions, {start} columns")
    for name, shape in SHAPES.items():
        compare(name, shape, tuple(blocks), device)


def compare(name: str, shape: tuple, blocks: tuple[Block, ...], device: torch.device) -> None:
    heads, key_heads, size, window, has_sinks = shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    columns = blocks[-1].end
    q, k, v = (
        torch.randn(1, n, columns, size, device=device, dtype=dtype, generator=generator).requires_grad_()
        for n in (heads, key_heads, key_heads)
    )
    sinks = torch.randn(heads, device=device, dtype=dtype, requires_grad=True) if has_sinks else None
    given = [x for x in (q, k, v, sinks) if x is not None]
    layout = Layout(blocks, device, None if device.type == "cuda" else KERNELS)
    kernels, found = layout.kernels_for(q, v, window), {}
    assert kernels is not None, "it would not be used"
    for way, those in (("whole scores", None), ("varlen", kernels)):
        Layout.kernels_for = lambda *_, those=those: those
        found[way] = measure(layout, (q, k, v), sinks, window, given)
    Layout.kernels_for = KERNELS_FOR
    (seconds, peak, results), (ours_s, our_peak, our_results) = found["whole scores"], found["varlen"]
    gap = max(
        ((a.float() - b.float()).norm() / b.float().norm()).item()
        for a, b in zip(our_results, results, strict=True)
    )
    memory = f", {peak:.2f} -> {our_peak:.2f} GiB ({peak / our_peak:.1f}x)" if device.type == "cuda" else ""
    times = f"{1e3 * seconds:.1f} -> {1e3 * ours_s:.1f} ms ({seconds / ours_s:.1f}x)"
    print(f"{name:20s} {times}{memory}; relative gap {gap:.1e}", flush=True)


def measure(layout: Layout, tensors: tuple, sinks: torch.Tensor | None, window: int | None, given: list):
    """Median seconds of three passes after one, peak GiB beside what was there, output and gradients."""
    times, results = list[float](), []
    on_gpu = layout.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    for attempt in range(4):
        results.clear()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        synchronize()
        began = now()
        how = {"sliding_window": window, "s_aux": sinks, "cohort_layout": layout}
        out, _ = packed_attention(nn.Module(), *tensors, None, **how)
        results += [out.detach(), *torch.autograd.grad(out.float().square().sum(), given)]
        synchronize()
        if attempt:
            times.append(now() - began)
    peak = (torch.cuda.max_memory_allocated() - before) / GIB if on_gpu else 0.0
    return statistics.median(times), peak, results


if __name__ == "__main__":
    main()
