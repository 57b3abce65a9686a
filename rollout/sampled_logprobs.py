"""Triton kernels for log-probs and ranks of sampled tokens, in which many programs share a row of logits.

vLLM's own read a row three times over, in one program each, which takes as long for 8 completions as for
240. The module is imported only on a GPU, where Triton is installed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 4096


@triton.jit(do_not_specialize=["num_rows"])
def _part_of_row_kernel(logits, ids, parts, stride, num_columns, num_rows, BLOCK: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    base = logits + row * stride
    x = tl.load(base + columns, mask=columns < num_columns, other=-float("inf")).to(tl.float32)
    chosen = tl.load(base + tl.load(ids + row)).to(tl.float32)
    largest = tl.max(x, 0)
    terms = tl.where(x == -float("inf"), 0.0, tl.exp(x - largest))
    higher = tl.where((columns < num_columns) & (x >= chosen), 1.0, 0.0)
    place = parts + row * tl.num_programs(1) + part
    step = num_rows * tl.num_programs(1)
    tl.store(place, largest)
    tl.store(place + step, tl.sum(terms, 0))
    tl.store(place + 2 * step, tl.sum(higher, 0))


@triton.jit(do_not_specialize=["num_rows"])
def _whole_row_kernel(logits, ids, parts, logprobs, ranks, stride, num_parts, num_rows, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    numbers = tl.arange(0, BLOCK)
    inside = numbers < num_parts
    place = parts + row * num_parts + numbers
    step = num_rows * num_parts
    maxima = tl.load(place, mask=inside, other=-float("inf"))
    sums = tl.load(place + step, mask=inside, other=0.0)
    higher = tl.load(place + 2 * step, mask=inside, other=0.0)
    largest = tl.max(maxima, 0)
    total = tl.sum(tl.where(sums == 0.0, 0.0, sums * tl.exp(maxima - largest)), 0)
    chosen = tl.load(logits + row * stride + tl.load(ids + row)).to(tl.float32)
    tl.store(logprobs + row, chosen - largest - tl.log(total))
    tl.store(ranks + row, tl.sum(higher, 0).to(tl.int64))


def sampled_logprobs(
    logits_NV: Float[Tensor, "N V"], ids_N: Int[Tensor, " N"]
) -> tuple[Float[Tensor, " N"], Int[Tensor, " N"]]:
    """log softmax(logits) at each row's id in fp32 nats, and how many logits of the row are at least its.

    Logits of -inf stand for ids that cannot be drawn; a row with a NaN has the log-prob NaN.
    """
    (num_rows, num_columns), device = logits_NV.shape, logits_NV.device
    num_parts = triton.cdiv(num_columns, BLOCK)
    parts = torch.empty((3, num_rows, num_parts), device=device)
    logprobs_N = torch.empty(num_rows, device=device)
    ranks_N = torch.empty(num_rows, dtype=torch.int64, device=device)
    given: Any = (logits_NV, ids_N.contiguous(), parts)
    sizes: Any = (logits_NV.stride(0), num_columns, num_rows)
    _part_of_row_kernel[(num_rows, num_parts)](*given, *sizes, BLOCK=BLOCK)  # pyright: ignore
    sizes = (logits_NV.stride(0), num_parts, num_rows)
    block = triton.next_power_of_2(num_parts)
    _whole_row_kernel[(num_rows,)](*given, logprobs_N, ranks_N, *sizes, BLOCK=block)  # pyright: ignore
    return logprobs_N, ranks_N
