"""Turns a dense model into a mixture of experts that computes the same, and a mixture into a dense model.

Upcycling (arXiv:2212.05055) copies the MLP of each layer into every expert and adds a new router. Weights of
a token's experts add up to 1, so equal experts together are the dense layer, whatever the router chooses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rl.moe.routers import find_routers

TARGETS = {
    "llama": ("mixtral", "qwen2_moe"),
    "mistral": ("mixtral",),
    "qwen2": ("qwen2_moe",),
    "qwen3": ("qwen3_moe",),
}
"""Dense family -> mixtures with the same attention that vLLM serves; new biases are 0."""
SOURCES = {mixtures[0]: dense for dense, mixtures in TARGETS.items()}
OWN = ("architectures", "model_type", "transformers_version", "layer_types", "_name_or_path", "dtype")
MLP = ("gate_proj", "up_proj", "down_proj")


def upcycle(
    model: Any,
    *,
    num_experts: int = 8,
    top_k: int = 2,
    family: str | None = None,
    noise: float = 0.0,
    seed: int = 0,
) -> PreTrainedModel:
    """A mixture whose experts are copies of the MLPs of `model`; logits are equal without noise.

    Args:
        family: family of the mixture, where `TARGETS` leaves a choice; default: the first.
        noise: standard deviation of noise added to experts' weights, in units of the weights' own.
        seed: seed of routers and noise.

    Raises:
        ValueError: the family has no mixture with the same attention; or top_k is beyond num_experts.
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k} must be 1 to num_experts={num_experts}")
    config = _moe_config(model.config, family, num_experts, top_k)
    mixture = _empty(config, model)
    weights, generator = model.state_dict(), torch.Generator().manual_seed(seed)
    found = {name: value for name, value in weights.items() if ".mlp." not in name}
    draw = lambda like, scale: torch.randn(like.shape, generator=generator).to(like) * scale  # noqa: E731
    for name, like in mixture.state_dict().items():
        block = name.partition(".mlp.")[0] + ".mlp."
        match name.removeprefix(block):
            case "experts.gate_up_proj":
                value = torch.cat([weights[f"{block}{part}.weight"] for part in MLP[:2]])
                found[name] = _copies(value, num_experts, noise, draw)
            case "experts.down_proj":
                found[name] = _copies(weights[f"{block}down_proj.weight"], num_experts, noise, draw)
            case "gate.weight":
                found[name] = draw(like, config.initializer_range)
            case rest if rest.startswith("shared_expert") or name not in weights:
                found[name] = torch.zeros_like(like)
    mixture.load_state_dict(found)
    return mixture


def _copies(value: Tensor, number: int, noise: float, draw: Any) -> Tensor:
    copies = value.expand(number, *value.shape).clone()
    return copies + draw(copies, noise * value.float().std()) if noise else copies


def _moe_config(dense: Any, family: str | None, num_experts: int, top_k: int) -> Any:
    width = dense.hidden_size // dense.num_attention_heads
    choices = TARGETS.get(dense.model_type, ())
    target = family or next(iter(choices), None)
    biases = [name for name in ("attention_bias", "mlp_bias") if getattr(dense, name, False)]
    if target is None or target not in choices or biases:
        known = ", ".join(f"{name} ({' or '.join(mixtures)})" for name, mixtures in TARGETS.items())
        raise ValueError(
            f"a mixture can be made from {known}, without attention_bias and mlp_bias, but not from "
            f"{dense.model_type}{f' with {biases[0]}' if biases else f' as {family}' if family else ''}"
        )
    fields = {name: value for name, value in dense.to_dict().items() if name not in OWN}
    fields |= {"num_experts_per_tok": top_k, "router_aux_loss_coef": 0.0, "output_router_logits": False}
    if target == "mixtral":
        return AutoConfig.for_model(target, **fields, num_local_experts=num_experts)
    fields |= {"num_experts": num_experts, "norm_topk_prob": True}
    fields |= {"moe_intermediate_size": dense.intermediate_size}
    if target == "qwen2_moe":
        if fields.pop("head_dim", width) not in (None, width):
            raise ValueError(f"qwen2_moe needs heads of {width} units, unlike this model; leave family out")
        # Its shared expert is not optional in transformers: it has one unit, of weight 0.
        fields |= {"shared_expert_intermediate_size": 1, "qkv_bias": True}
    return AutoConfig.for_model(target, **fields)


def _empty(config: Any, like: Any) -> Any:
    """A model of the config, into which weights will be loaded."""
    with torch.device(like.device):
        model = AutoModelForCausalLM.from_config(config, dtype=like.dtype, attn_implementation="sdpa")
    model.generation_config = like.generation_config
    return model.eval()


def dense_of(mixture: Any, loads_LE: Tensor, *, num_experts: int) -> PreTrainedModel:
    """A dense model, to be distilled into, whose MLPs are the busiest experts of each layer side by side.

    The output of expert i is scaled by its share of the load among the kept experts. With all experts and
    equal loads it is the mean of all experts, as in a mixture with K = E and uniform gates.

    Args:
        loads_LE: how many tokens chose each expert, such as `rl.moe.balance.Load.counts_LE` of some batches.

    Raises:
        ValueError: the family has no dense model with the same attention; or a layer has no experts.
    """
    config, sites = mixture.config, find_routers(mixture)
    family = SOURCES.get(config.model_type)
    if family is None or len(sites) != config.num_hidden_layers:
        raise ValueError(
            f"a dense model can be made from mixtures of these families, with experts in every layer: "
            f"{', '.join(SOURCES)}; this one is {config.model_type}, with experts in {len(sites)} of "
            f"{config.num_hidden_layers} layers"
        )
    weights = mixture.state_dict()
    found = {name: value for name, value in weights.items() if ".mlp." not in name}
    for site, load_E in zip(sites, loads_LE, strict=True):
        block = site.name.removesuffix("gate")
        share, chosen = (load_E.float() / load_E.sum()).topk(num_experts)
        gate, up = weights[f"{block}experts.gate_up_proj"][chosen].chunk(2, 1)
        down = weights[f"{block}experts.down_proj"][chosen] * (share / share.sum()).to(gate)[:, None, None]
        parts = gate.flatten(0, 1), up.flatten(0, 1), down.transpose(0, 1).flatten(1)
        found |= {f"{block}{name}.weight": part for name, part in zip(MLP, parts, strict=True)}
    width = getattr(config, "moe_intermediate_size", config.intermediate_size)
    fields = {name: value for name, value in config.to_dict().items() if name not in OWN}
    fields |= {"intermediate_size": width * num_experts}
    dense: Any = _empty(AutoConfig.for_model(family, **fields), mixture)
    dense.load_state_dict(found)
    return dense
