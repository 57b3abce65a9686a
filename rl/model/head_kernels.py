"""Triton kernels over a chunk of logits: their statistics in one read, the gradient in one pass.

They are for 16-bit logits of a large vocabulary, where moving them costs more than the (fp32) arithmetic.
The module is imported only if Triton is installed; `rl.model.head` first compares it with plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 4096


@triton.jit
def _forward_kernel(
    logits, targets, lse, logprobs, entropy, stride, factor, num_columns, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    largest = -float("inf")
    total = 0.0
    moment = 0.0
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < num_columns
        x = tl.load(base + columns, mask=inside, other=-float("inf")).to(tl.float32) * factor
        new = tl.maximum(largest, tl.max(x, 0))
        weights = tl.where(inside, tl.exp(x - new), 0.0)
        scale = tl.exp(largest - new)
        total = total * scale + tl.sum(weights, 0)
        moment = moment * scale + tl.sum(tl.where(inside, weights * x, 0.0), 0)
        largest = new
    normaliser = largest + tl.log(total)
    target = tl.load(targets + row)
    chosen = tl.load(base + target).to(tl.float32) * factor
    tl.store(lse + row, normaliser)
    tl.store(logprobs + row, chosen - normaliser)
    tl.store(entropy + row, normaliser - moment / total)


@triton.jit
def _backward_kernel(
    logits, targets, lse, entropy, by_logprob, by_entropy, stride, factor, num_columns, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    places = logits + row * stride + columns
    g, h = tl.load(by_logprob + row), tl.load(by_entropy + row)
    x = tl.load(places, mask=inside, other=0.0).to(tl.float32) * factor - tl.load(lse + row)
    probs = tl.exp(x)
    slope = tl.where(columns == tl.load(targets + row), g, 0.0)
    slope -= probs * (g + h * (x + tl.load(entropy + row)))
    tl.store(places, (slope * factor).to(logits.dtype.element_ty), mask=inside)


def logit_statistics(
    logits_RV: Float[Tensor, "R V"], targets_R: Int[Tensor, " R"], *, factor: float
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"], Float[Tensor, " R"]]:
    """log-sum-exp, log-prob of the target and entropy of softmax(logits * factor), fp32 nats."""
    num_rows, num_columns = logits_RV.shape
    rows = [torch.empty(num_rows, device=logits_RV.device) for _ in range(3)]
    given: Any = (logits_RV, targets_R, *rows, logits_RV.stride(0), factor, num_columns)
    _forward_kernel[(num_rows,)](*given, BLOCK=BLOCK)  # pyright: ignore[reportArgumentType]
    lse, logprobs, entropy = rows
    return lse, logprobs, entropy


def logit_gradient_(
    logits_RV: Float[Tensor, "R V"],
    targets_R: Int[Tensor, " R"],
    statistics: Sequence[Float[Tensor, " R"]],
    *,
    factor: float,
) -> Float[Tensor, "R V"]:
    """Overwrites the logits with the gradient of the loss with respect to them, and returns them.

    `statistics` are log-sum-exp, entropy, and the loss's slopes by log-prob and entropy: one number per row.
    """
    num_rows, num_columns = logits_RV.shape
    rows = [x.contiguous() for x in statistics]
    given: Any = (logits_RV, targets_R, *rows, logits_RV.stride(0), factor, num_columns)
    _backward_kernel[(num_rows, triton.cdiv(num_columns, BLOCK))](*given, BLOCK=BLOCK)  # pyright: ignore[reportArgumentType]
    return logits_RV
