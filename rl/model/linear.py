"""Linear layers whose matrix product adds a weight's gradient to the fp32 `grad` itself.

Under autocast a gradient is computed in 16 bits, widened, and added: 20 bytes of memory traffic a weight and
micro-batch, where this takes 8, and rounds less. Outputs and the gradients of inputs are autocast's.
Megatron-LM calls it gradient accumulation fusion.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from rl.model.self_check import reproduces

_adds = False


@contextmanager
def adding() -> Iterator[None]:
    """Inside, backward passes put gradients of weights into `grad` before autograd's hooks are called."""
    global _adds  # a backward pass has a thread of its own, which a context variable would not reach
    before, _adds = _adds, True
    try:
        yield
    finally:
        _adds = before


class AddingLinear(nn.Linear):
    """`nn.Linear`, whose fp32 weight gets its gradient by `plus_product`."""

    def forward(self, input: Tensor) -> Tensor:
        kind, weight = input.device.type, self.weight
        if not (torch.is_grad_enabled() and weight.requires_grad and weight.dtype == torch.float32):
            return super().forward(input)
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        return _Product.apply(input, weight, self.bias)  # type: ignore[return-value]


def add_gradients_in_products(model: nn.Module) -> None:
    """Makes every plain linear layer of the model an `AddingLinear`."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = AddingLinear


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, bias: Tensor | None) -> Tensor:
        narrow = weight.to(x.dtype)
        ctx.save_for_backward(x, narrow)
        ctx.weight = weight
        return linear(x, narrow, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, narrow), weight = ctx.saved_tensors, ctx.weight
        grad_MO, x_MI = (t.reshape(-1, t.shape[-1]) for t in (*grads, x))
        needs_x, _, needs_bias = ctx.needs_input_grad
        adds = _adds and not weight._backward_hooks  # which may change what autograd adds
        found = plus_product(weight.grad if adds else None, grad_MO.T, x_MI)
        if adds:
            weight.grad = found
        grad_bias = grad_MO.sum(0, dtype=found.dtype) if needs_bias else None
        return (grad_MO @ narrow).view_as(x) if needs_x else None, None if adds else found, grad_bias


def plus_product(total: Tensor | None, a: Float[Tensor, "M K"], b: Float[Tensor, "K N"]) -> Tensor:
    """total + a @ b in fp32 or wider, in place; without a total a @ b."""
    wide = torch.promote_types(a.dtype, torch.float32)
    if a.dtype != wide and not (a.is_cuda and wide_products_work()):
        product = (a @ b).to(wide)
        return product if total is None else total.add_(product)
    how: dict[str, Any] = {} if a.dtype == wide else {"out_dtype": wide}
    return torch.mm(a, b, **how) if total is None else torch.addmm(total, a, b, out=total, **how)


@cache
def wide_products_work() -> bool:
    """Compares 16-bit products that are summed in fp32 with plain ones once, and warns if they differ."""

    def gap() -> float:
        a, b = torch.linspace(-2, 2, 2 * 64 * 64, device="cuda").bfloat16().view(2, 64, 64)
        found = torch.addmm(ones := torch.ones(64, 64, device="cuda"), a.T, b, out=ones, out_dtype=ones.dtype)
        plain = 1 + a.double().T @ b.double()
        return ((found - plain).abs().max() / plain.abs().max()).item()

    return reproduces("summing gradients in a product", gap, 1e-5)
