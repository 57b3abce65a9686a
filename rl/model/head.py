"""Token log-probs and entropies from hidden states, in chunks: logits of all tokens are never held at once.

The backward pass recomputes a chunk's logits, unless they are kept: one more matrix product of the head
against tokens x vocabulary numbers of memory. Accumulation is in fp32 (fp64 inputs stay fp64).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rl.model.linear import plus_product
from rl.model.self_check import reproduces

CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
"""Bytes of logits held at once: small on a CPU (fits the cache), large on a GPU (one product fills it)."""
NO_MASS = -69.0
"""log 1e-30, in nats, which stands for the log of probability 0."""


def token_logprobs(
    hidden_LD: Float[Tensor, "L D"],
    targets_L: Int[Tensor, " L"],
    *,
    weight_VD: Float[Tensor, "V D"],
    bias_V: Float[Tensor, " V"] | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    keep: bool = False,
) -> tuple[Float[Tensor, " L"], Float[Tensor, " L"]]:
    """log softmax(softcap(hidden @ weight^T + bias) / temperature)[target], and the entropy, in nats.

    Both are differentiable. `logit_scale` multiplies the logits before the soft cap (Cohere, Granite),
    `softcap` is Gemma 2's final_logit_softcapping. With `keep` a backward pass takes the logits of the
    forward pass, if it is the first one.
    """
    settings, keep = (temperature, logit_scale, softcap), keep and torch.is_grad_enabled()
    logprobs, entropy = _TokenLogprobs.apply(hidden_LD, weight_VD, bias_V, targets_L, settings, keep)  # type: ignore[misc]
    return logprobs, entropy


def head_logprobs(
    model: Any,
    hidden_LD: Float[Tensor, "L D"],
    targets_L: Int[Tensor, " L"],
    *,
    temperature: float,
    keep: bool = False,
) -> tuple[Float[Tensor, " L"], Float[Tensor, " L"]]:
    """`token_logprobs` by the head of a transformers model; on CUDA in the dtype of autocast, if it is on."""
    if hidden_LD.is_cuda and torch.is_autocast_enabled("cuda"):
        hidden_LD = hidden_LD.to(torch.get_autocast_dtype("cuda"))
    head = model.get_output_embeddings()
    return token_logprobs(
        hidden_LD,
        targets_L,
        weight_VD=head.weight,
        bias_V=getattr(head, "bias", None),
        temperature=temperature,
        keep=keep,
        **head_settings(model),
    )


def asked_logprobs(
    model: Any, hidden_LD: Float[Tensor, "L D"], ids_LK: Int[Tensor, "L K"], *, temperature: float
) -> tuple[Float[Tensor, "L K"], Float[Tensor, " L"]]:
    """log p(id) for K ids of each token, and the log of all other ids' total probability, in nats.

    It works on chunks of tokens, whose logits are recomputed in the backward pass. The other ids are summed,
    not subtracted from 1, so that a small rest is exact; if there are none, it is about NO_MASS.
    """

    def found(hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = head_logits(model, hidden)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        logprobs = wide.log_softmax(-1)
        return logprobs.gather(-1, ids), logprobs.scatter(-1, ids, NO_MASS).logsumexp(-1)

    pieces = zip(*(x.split(_full_rows(model, hidden_LD)) for x in (hidden_LD, ids_LK)), strict=True)
    chunks = [cast(Any, checkpoint(found, *piece, use_reentrant=False)) for piece in pieces]
    logprobs, rests = zip(*chunks, strict=True)
    return torch.cat(logprobs), torch.cat(rests)


def top_ids(model: Any, hidden_LD: Float[Tensor, "L D"], k: int, *, num_ids: int) -> Int[Tensor, "L k"]:
    """The k likeliest of the first `num_ids` ids for each token, computed in chunks of tokens."""
    chunks = hidden_LD.split(_full_rows(model, hidden_LD))
    return torch.cat([head_logits(model, x)[:, :num_ids].topk(k).indices for x in chunks])


def _full_rows(model: Any, hidden: Tensor) -> int:
    """Tokens of a chunk for which autograd keeps four tensors of logits."""
    return _chunk_rows(hidden.device, 4 * 4 * len(model.get_output_embeddings().weight))


def head_settings(model: Any) -> dict[str, Any]:
    """Scale (Cohere, Granite, Inkling) and soft cap (Gemma, xLSTM) from the head's product to the logits."""
    config = model.config.get_text_config()
    divisors = (getattr(config, k, None) for k in ("logits_scaling", "logits_mup_width_multiplier"))
    scale = getattr(config, "logit_scale", None) or 1.0 / next(filter(None, divisors), 1.0)
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return {
        "logit_scale": scale,
        "softcap": next(filter(None, (getattr(config, k, None) for k in caps)), None),
    }


def head_logits(model: Any, hidden_LD: Float[Tensor, "L D"]) -> Float[Tensor, "L V"]:
    """Logits of a transformers model from its last hidden states, in the model's dtype. L x V numbers."""
    logits, settings = model.get_output_embeddings()(hidden_LD), head_settings(model)
    if (scale := settings["logit_scale"]) != 1.0:
        logits = logits * scale
    cap = settings["softcap"]
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _chunk_rows(device: torch.device, row_bytes: int) -> int:
    return max(16, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // row_bytes)


Settings = tuple[float, float, float | None]
"""Temperature, scale and soft cap of logits."""


@dataclass(frozen=True)
class _Head:
    """softmax(softcap(hidden @ weight^T + bias) * factor) of a chunk of R rows of hidden states [R, D]."""

    weight: Tensor
    bias: Tensor | None
    temperature: float
    scale: float
    softcap: float | None
    fused: bool = False

    def product(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight.T

    def logits(self, product: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits over temperature in fp32 or wider, and tanh of the soft cap for the chain rule."""
        logits = product
        if self.bias is not None:
            logits = logits + self.bias
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        tanh = None
        if self.softcap is not None:
            tanh = torch.tanh(logits / self.softcap)
            logits = self.softcap * tanh
        if self.temperature != 1.0:
            logits = logits / self.temperature
        return logits, tanh

    def statistics(self, product: Tensor, targets: Tensor, *, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
        """log-sum-exp, log-prob of the target, and entropy, one per row; with `keep` it leaves `product`."""
        if self.fused:
            from rl.model.head_kernels import logit_statistics

            return logit_statistics(product, targets, factor=self.scale / self.temperature)
        logits, _ = self.logits(product)
        lse = torch.logsumexp(logits, dim=-1)
        logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - lse
        logits = logits - lse[:, None] if keep else logits.sub_(lse[:, None])
        entropy = -torch.linalg.vecdot(logits.exp(), logits.clamp_min(torch.finfo(logits.dtype).min))
        return lse, logprobs, entropy

    def gradient(
        self, product: Tensor, targets: Tensor, lse: Tensor, entropy: Tensor, *grads: Tensor | None
    ) -> Tensor:
        """d loss / d (product + bias) [R, V], in place: d logp = onehot - p; d H = -p * (log p + H).

        Args:
            grads: slopes of the loss by log-prob and by entropy, one number per row; None: 0.
        """
        grad_logprobs, grad_entropy = grads
        factor = self.scale / self.temperature
        if self.fused:
            from rl.model.head_kernels import logit_gradient_

            slopes = [torch.zeros_like(lse) if g is None else g for g in grads]
            return logit_gradient_(product, targets, [lse, entropy, *slopes], factor=factor)
        logits, tanh = self.logits(product)
        logits -= lse[:, None]
        probs = logits.exp()
        coefficient = torch.zeros_like(lse) if grad_logprobs is None else -grad_logprobs
        if grad_entropy is None:
            grad = probs.mul_(coefficient[:, None])
        else:
            slope = coefficient[:, None] - grad_entropy[:, None] * (logits + entropy[:, None])
            grad = torch.where(probs > 0, probs * slope, 0.0)
        if grad_logprobs is not None:
            grad.scatter_add_(-1, targets[:, None], grad_logprobs[:, None].to(grad.dtype))
        if tanh is not None:
            grad = grad * (1 - tanh.square())
        return grad * factor if factor != 1.0 else grad


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> tuple[_Head, int]:
    """The head in the hidden states' dtype, and the rows of a chunk.

    Autocast does not reach inside a backward pass, so both passes cast by hand. The Triton kernels take
    16-bit logits on a CUDA device, without bias and soft cap.
    """
    compute = hidden.dtype
    *_, softcap = settings
    fused = hidden.is_cuda and compute.itemsize == 2 and bias is None and softcap is None and kernels_work()
    itemsize = compute.itemsize if fused else torch.promote_types(compute, torch.float32).itemsize
    head = _Head(weight.to(compute), None if bias is None else bias.to(compute), *settings, fused)
    return head, _chunk_rows(weight.device, len(weight) * itemsize)


@cache
def kernels_work() -> bool:
    """Compares the Triton kernels with plain torch once, and warns if they cannot be used."""
    installed = importlib.util.find_spec("triton") is not None
    exactly = torch.autocast("cuda", enabled=False)
    return installed and reproduces("the fused log-prob kernel", exactly(_kernel_gap), 5e-3)


def _kernel_gap() -> float:
    """Largest difference on three rows; gradients relative to the largest one, which bf16 rounds."""
    generator = torch.Generator("cuda").manual_seed(0)
    draw = partial(torch.randn, device="cuda", generator=generator)
    hidden, weight = draw(3, 64).bfloat16(), draw(5001, 64).bfloat16() / 4
    targets = torch.tensor([0, 17, 5000], device="cuda")
    plain, fused = (_Head(weight, None, 0.7, 1.0, None, fused) for fused in (False, True))
    expected, found = (head.statistics(head.product(hidden), targets, keep=False) for head in (plain, fused))
    gaps = [(a - b).abs().max() for a, b in zip(expected, found, strict=True)]
    slopes = (expected[0], expected[2], draw(3), draw(3))
    wide, narrow = (head.gradient(head.product(hidden), targets, *slopes) for head in (plain, fused))
    gaps.append((wide - narrow).abs().max() / wide.abs().max())
    return torch.stack(gaps).max().item()


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        settings: Settings,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        head, rows = _head(hidden, weight, bias, settings)
        ctx.kept = {}  # first row of a chunk -> its product
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropy, lse = (hidden.new_empty(len(targets), dtype=wide) for _ in range(3))
        # Autocast would narrow the entropy's dot product to 16 bits.
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(targets), rows):
                part = slice(start, start + rows)
                product = head.product(hidden[part])
                found = head.statistics(product, targets[part], keep=keep)
                lse[part], logprobs[part], entropy[part] = found
                if keep:
                    ctx.kept[start] = product
                del product
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        head, rows = _head(hidden, weight, bias, ctx.settings)
        grad_hidden = torch.empty_like(hidden)
        _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_weight = None
        grad_bias = torch.zeros_like(bias, dtype=lse.dtype) if needs_bias else None
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            slopes = (None if g is None else g[part] for g in grads)
            product = ctx.kept.pop(start, None)
            product = head.product(hidden[part]) if product is None else product
            grad = head.gradient(product, targets[part], lse[part], entropy[part], *slopes)
            del product
            narrow = grad.to(hidden.dtype)
            grad_hidden[part] = narrow @ head.weight
            if needs_weight:
                grad_weight = plus_product(grad_weight, narrow.T, hidden[part])
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            del grad, narrow  # before the next chunk takes as much
        pairs = ((grad_weight, weight), (grad_bias, bias))
        return grad_hidden, *(None if g is None else g.to(x.dtype) for g, x in pairs), None, None, None
