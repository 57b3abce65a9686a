"""Adapters of mixture-of-experts models: what `model.lora.target_modules` adapts, what is really trained, and
experts adapted without a copy of their weights. E experts, r rank, S rows: tokens times experts per token.
"""

from __future__ import annotations

import re
from types import MethodType
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations import moe as integration

from rl.config.sections import LoraConfig
from rl.moe.routers import EXPERTS, rule_of

PARTS: tuple[str, ...] = (
    "routed experts",
    "shared experts",
    "dense MLP",
    "attention",
    "router",
    "embeddings and head",
)
# Linear layers of an expert, by their names from before transformers kept all experts in one tensor.
_OF_EXPERTS = {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "down_proj": "down_proj",
    "w1": "gate_up_proj",
    "w3": "gate_up_proj",
    "w2": "down_proj",
}


_MAMBA, _OF_MAMBA = ("nemotron_h",), (".out_proj", ".conv1d")  # peft refuses adapters of these layers


def lora_plan(model: nn.Module, lora: LoraConfig) -> dict[str, Any] | None:
    """peft's target_modules and target_parameters for a model with experts; None: it has none.

    What peft's own all-linear adapts depends on the family: routers in some, no experts in others. Here
    "all-linear" is every linear layer and every routed expert, except routers and the head. In a list,
    gate_proj, up_proj and down_proj (w1, w3, w2) are those of dense layers, shared and routed experts;
    `experts` are the routed ones. A text is a regex of whole names.

    Raises:
        ValueError: experts are asked for but have no tensor that an adapter can be put on; or gate without
            up.
    """
    stacks = expert_stacks(model)
    if not stacks:
        return None
    named = f"model.lora.target_modules={lora.target_modules!r}"
    head = cast(Any, model).get_output_embeddings()
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    refused = _OF_MAMBA if cast(Any, model).config.model_type in _MAMBA else ()
    of_layers = [n for n in layers if part_of(model, n) != "router" and not n.endswith(refused)]
    matrices = [
        f"{n}.{p}" for n, m in stacks.items() for p, t in m.named_parameters(recurse=False) if t.ndim == 3
    ]
    targets = lora.target_modules
    if targets == "all-linear":
        found = of_layers, matrices
    elif isinstance(targets, str):
        found = tuple([n for n in names if re.fullmatch(targets, n)] for names in (layers, matrices))
    else:
        fused = {_OF_EXPERTS.get(t, t) for t in targets} | (
            {"gate_up_proj", "down_proj"} if "experts" in targets else set()
        )
        if any(t in targets for t in ("gate_proj", "w1")) != any(t in targets for t in ("up_proj", "w3")):
            raise ValueError(
                f"{named}: gate_proj and up_proj of experts are one tensor; name both of them, or neither"
            )
        ends = tuple(f".{t}" for t in targets)
        known = {"experts", *(n.rpartition(".")[2] for n in matrices)}
        if any(
            not any(f".{n}".endswith(f".{t}") for n in layers) and _OF_EXPERTS.get(t, t) not in known
            for t in targets
        ):
            return None  # peft then refuses the name that fits nothing
        found = (
            [n for n in layers if f".{n}".endswith(ends)],
            [n for n in matrices if n.endswith(ends) or n.split(".")[-1] in fused],
        )
    if not matrices and (targets == "all-linear" or "experts" in targets):
        raise ValueError(
            f"{named} asks for experts, but {type(model).__name__} keeps them in no tensor of its own that "
            "peft can adapt; name the layers to adapt, such as [q_proj, v_proj]"
        )
    modules = sorted(n for n in found[0] if n.rpartition(".")[2] not in _OF_EXPERTS)
    # Given as parameters: peft mistakes modules of these names for routed experts and drops them.
    parameters = sorted([*found[1], *(f"{n}.weight" for n in found[0] if n not in modules)])
    return {"target_modules": modules, "target_parameters": parameters} if modules or parameters else None


def expert_stacks(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that hold the routed experts of a layer, by name, whether adapters wrap them or not."""
    return {n: m for n, m in model.named_modules() if EXPERTS.search(type(m).__name__)}


def part_of(model: nn.Module, name: str) -> str:
    """The one of `PARTS` that a parameter or module of this name belongs to; adapters belong to what they
    adapt.
    """
    at: Any = model
    for step in name.split("."):
        at = getattr(at, step, None)
        if not isinstance(at, nn.Module):
            break
        inner = innermost(at)
        if step == "router" or "Router" in type(inner).__name__ or rule_of(inner) is not None:
            return "router"
        if EXPERTS.search(type(inner).__name__):
            return "routed experts"
    if "shared" in name:
        return "shared experts"
    if re.search(r"attn|attention|mixer|mamba|conv", name):
        return "attention"
    return (
        "dense MLP" if re.search(r"\.(mlp\w*|feed_forward|ffn|block_sparse_moe)\.", f"{name}.") else PARTS[-1]
    )


def innermost(module: Any) -> nn.Module:
    """The module below its adapters."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def audit(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Part -> (values that are trained, values of the model without adapters)."""
    found: dict[str, tuple[int, int]] = dict.fromkeys(PARTS, (0, 0))
    for name, p in model.named_parameters():
        part, own = part_of(model, name), ".lora_" not in name
        share = getattr(p, "trained_share", 1.0) * p.requires_grad
        found[part] = (found[part][0] + int(p.numel() * share), found[part][1] + p.numel() * own)
    return found


def check_trained(model: nn.Module, lora: LoraConfig | None) -> str:
    """One line about how much of each part is trained.

    Raises:
        ValueError: adapters of experts were asked for, but no routed expert has one.
    """
    found = audit(model)
    targets = lora.target_modules if lora is not None else ""
    asked = targets == "all-linear" or (
        isinstance(targets, list) and {"experts", *_OF_EXPERTS} & set(targets)
    )
    shared_only = (
        isinstance(targets, list)
        and "experts" not in targets
        and sum(found["shared experts"]) + sum(found["dense MLP"])
    )
    if asked and not shared_only and found["routed experts"][1] and not found["routed experts"][0]:
        raise ValueError(
            f"model.lora.target_modules={targets!r} asks for experts, but none of the "
            f"{found['routed experts'][1]:,} values of routed experts would be trained; name the layers to "
            "adapt, such as [q_proj, v_proj]"
        )
    said = (
        f"{part} {_short(trained)} of {_short(total)}" for part, (trained, total) in found.items() if total
    )
    return f"trained values: {', '.join(said)}"


def _short(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def split_experts(model: nn.Module) -> list[str]:
    """Lets experts compute y = x W + s (x A) B with adapters instead of x (W + s A B). It returns the names
    of those that do, with adapters or without.

    In every forward pass, peft builds W + s A B for all experts of a layer. It keeps that for the backward
    pass, whose gradient has its size too. Parameters, their names and saved files stay peft's own. Experts
    that have biases or a norm, are transposed, or are not dispatched by transformers keep peft's way.

    Experts without adapters are included: transformers' grouped_mm ignores autocast, and computes experts
    whose weights are fp32 in fp32. Ways other than grouped_mm stay transformers' own.
    """
    done = []
    for name, outer in list(model.named_modules()):
        experts: Any = innermost(outer)
        if not EXPERTS.search(type(experts).__name__) or name.endswith("base_layer"):
            continue
        others = "has_bias", "is_transposed", "has_post_expert_norm"  # the latter since transformers 5.24
        plain = getattr(experts, "has_gate", False) and not any(getattr(experts, x, False) for x in others)
        if (
            not plain
            or getattr(experts, "_is_expert_parallel", False)
            or not hasattr(integration, "_grouped_linear")
        ):
            continue
        adapters, at = {}, cast(Any, outer)
        while at is not experts:
            adapters[at.parameter_name], at = at, at.base_layer
        # In a dict: as plain attributes, modules would become parts of each other in a circle.
        experts.adapters, experts.forward = {"of": adapters}, MethodType(_split_forward, experts)
        if adapters:
            cast(Any, outer).forward = MethodType(_past_adapters, outer)
        done.append(name)
    return done


def _past_adapters(outer: Any, *arguments: Any, **named: Any) -> Tensor:
    return innermost(outer)(*arguments, **named)


def _split_forward(
    experts: Any, x_TD: Float[Tensor, "T D"], idx_TK: Int[Tensor, "T K"], weights_TK: Float[Tensor, "T K"]
) -> Float[Tensor, "T D"]:
    """transformers' `grouped_mm_experts_forward` and products with adapters. Tokens are weighted before the
    down projection, which is linear: its input is narrower than its output.
    """
    if not experts.adapters["of"] and experts.config._experts_implementation != "grouped_mm":
        return type(experts).forward(experts, x_TD, idx_TK, weights_TK)
    sorted_S, order_S = idx_TK.reshape(-1).sort()
    back_S = torch.empty_like(order_S)
    back_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    numbers_E = torch.arange(experts.num_experts, device=order_S.device)
    # Without `bincount`, for which the CPU would wait for the GPU.
    ends_E = torch.searchsorted(sorted_S, numbers_E, right=True, out_int32=True)
    rows_SD = _Permuted.apply(x_TD, order_S, back_S, idx_TK.shape[1])
    hidden_SI = experts._apply_gate(_product(experts, "gate_up_proj", rows_SD, ends_E))
    hidden_SI = hidden_SI * _Permuted.apply(weights_TK.reshape(-1, 1), order_S, back_S, 1)
    out_SD = _Permuted.apply(_product(experts, "down_proj", hidden_SI, ends_E), back_S, order_S, 1)
    return out_SD.view(*idx_TK.shape, -1).sum(1).to(x_TD.dtype)


class _Permuted(torch.autograd.Function):
    """Rows of x, each `copies` times, by an order and its inverse: its gradient is gathered, where that of
    indexing is sorted and added up.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order_S: Tensor, back_S: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(back_S)
        ctx.copies = copies
        return x[order_S // copies if copies > 1 else order_S]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows = gradients[0][ctx.saved_tensors[0]]
        return rows.view(-1, ctx.copies, rows.shape[1]).sum(1) if ctx.copies > 1 else rows, None, None, None


def _product(experts: Any, name: str, rows: Tensor, ends_E: Tensor) -> Tensor:
    weight, kind, linear = getattr(experts, name), rows.device.type, cast(Any, integration)._grouped_linear
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype

    def multiply(x: Tensor, w_EOI: Tensor) -> Tensor:
        return linear(x.to(dtype), w_EOI.to(dtype), ends_E)

    y, adapter = multiply(rows, weight), experts.adapters["of"].get(name)
    if adapter is None or adapter.disable_adapters or adapter.merged:
        return y
    for active in adapter.active_adapters:
        a_ErI, b_EOr = expert_factors(adapter, active)
        # The kernel needs rows of multiples of 16 bytes: additional ranks of zeros change nothing.
        more = -a_ErI.shape[1] % (16 // dtype.itemsize)
        b_EOr = functional.pad(b_EOr * adapter.scaling[active], (0, more))  # smaller than S rows
        y = y + multiply(multiply(rows, functional.pad(a_ErI, (0, 0, 0, more))), b_EOr)
    return y


def expert_factors(adapter: Any, active: str) -> tuple[Float[Tensor, "E r I"], Float[Tensor, "E O r"]]:
    """A and B of each expert. In peft's stacks the expert is A's outermost and B's innermost axis."""
    a, b = adapter.lora_A[active].weight, adapter.lora_B[active].weight
    number = adapter.num_experts
    return a.view(number, -1, a.shape[1]), b.view(b.shape[0], -1, number).permute(2, 0, 1).contiguous()
