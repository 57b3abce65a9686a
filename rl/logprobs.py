"""Token log-probs and entropies from hidden states, in chunks: no tensor of all tokens x vocabulary is ever
held.

The backward pass recomputes a chunk's logits instead of keeping them, which costs one more matrix product of
the head and saves 4 bytes x tokens x vocabulary. Accumulation is in fp32 (fp64 inputs stay fp64).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_BYTES = 128 << 20


def token_logprobs(
    hidden_LD: Float[Tensor, "L D"],
    targets_L: Int[Tensor, " L"],
    *,
    weight_VD: Float[Tensor, "V D"],
    bias_V: Float[Tensor, " V"] | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Float[Tensor, " L"], Float[Tensor, " L"]]:
    """log softmax(softcap(hidden @ weight^T + bias) / temperature)[target] and the entropy of that
    distribution, in nats.

    Both are differentiable. `logit_scale` multiplies the logits before the soft cap (Cohere, Granite),
    `softcap` is Gemma 2's final_logit_softcapping.
    """
    logprobs, entropy = _TokenLogprobs.apply(
        hidden_LD, weight_VD, bias_V, targets_L, temperature, logit_scale, softcap
    )  # type: ignore[misc]
    return logprobs, entropy


def _chunk_rows(num_vocabulary: int, itemsize: int) -> int:
    return max(16, CHUNK_BYTES // (num_vocabulary * itemsize))


def _scaled_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor | None]:
    """Logits over temperature in fp32 or wider, and tanh of the soft cap for the chain rule."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if scale != 1.0:
        logits = logits * scale
    tanh = None
    if softcap is not None:
        tanh = torch.tanh(logits / softcap)
        logits = softcap * tanh
    if temperature != 1.0:
        logits = logits / temperature
    return logits, tanh


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        # Autocast does not reach inside an autograd function's backward: both passes compute in the hidden
        # states' dtype.
        compute = hidden.dtype
        matrix = weight.to(compute)
        offset = None if bias is None else bias.to(compute)
        wide = torch.promote_types(compute, torch.float32)
        rows = _chunk_rows(weight.shape[0], wide.itemsize)
        logprobs, entropy, lse = (hidden.new_empty(len(targets), dtype=wide) for _ in range(3))
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            logits, _ = _scaled_logits(hidden[part], matrix, offset, temperature, scale, softcap)
            lse[part] = torch.logsumexp(logits, dim=-1)
            logprobs[part] = logits.gather(-1, targets[part, None]).squeeze(-1) - lse[part]
            logits -= lse[part, None]
            entropy[part] = -torch.linalg.vecdot(logits.exp(), logits.clamp_min(torch.finfo(wide).min))
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        ctx.settings = (temperature, scale, softcap)
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logprobs, grad_entropy = grads
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        temperature, scale, softcap = ctx.settings
        compute, wide = hidden.dtype, lse.dtype
        matrix = weight.to(compute)
        offset = None if bias is None else bias.to(compute)
        rows = _chunk_rows(weight.shape[0], wide.itemsize)
        needs_weight, needs_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if needs_bias and bias is not None else None
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            logits, tanh = _scaled_logits(hidden[part], matrix, offset, temperature, scale, softcap)
            logits -= lse[part, None]
            probs = logits.exp()
            # d logp[target] = onehot - p;  d H = -p * (log p + H)
            coefficient = torch.zeros_like(lse[part]) if grad_logprobs is None else -grad_logprobs[part]
            if grad_entropy is None:
                grad = probs.mul_(coefficient[:, None])
            else:
                slope = coefficient[:, None] - grad_entropy[part, None] * (logits + entropy[part, None])
                grad = torch.where(probs > 0, probs * slope, 0.0)
            if grad_logprobs is not None:
                grad.scatter_add_(-1, targets[part, None], grad_logprobs[part, None].to(wide))
            factor = scale / temperature
            if tanh is not None:
                grad = grad * (1 - tanh.square())
            if factor != 1.0:
                grad = grad * factor
            narrow = grad.to(compute)
            grad_hidden[part] = narrow @ matrix
            if grad_weight is not None:
                grad_weight += narrow.T @ hidden[part]
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )
