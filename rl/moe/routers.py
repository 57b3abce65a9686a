"""Routers of mixture-of-experts models: where they are, what they return, and the weights of given experts.

A router returns (logits, weights, experts) for every token, or the same in reverse. `route_weights` repeats
the family's arithmetic on any experts, and `self_check` compares it with the module bit for bit. T tokens, E
experts, K per token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Output = tuple[Tensor, ...]


class UnknownRouter(ValueError):
    """A router whose arithmetic is not known, or is known differently."""


@dataclass(frozen=True)
class Rule:
    """How a router turns logits into weights.

    Attributes:
        score: score of all experts; "chosen": softmax over the logits of the chosen ones only.
        upcast: scores are computed in fp32; else in the logits' dtype, which autocast may have rounded.
        renormalise: weights of a token add up to 1: always, never, or as the attribute of this name says.
        eps: added to that sum; a text names the attribute with the sum's lower bound.
        scale: name of the attribute that weights are multiplied by.
        experts: name of the attribute with the number of experts.
    """

    score: Literal["softmax", "sigmoid", "chosen", "score_fn", "expert_selection_fn"]
    upcast: bool = True
    renormalise: bool | str = True
    eps: float | str = 0.0
    scale: str | None = None
    experts: str = "num_experts"


_DEEPSEEK = Rule(
    "sigmoid", upcast=False, renormalise="norm_topk_prob", eps=1e-20, scale="routed_scaling_factor"
)
_BY_RULE = (
    (Rule("softmax"), "HunYuanMoEV1Gate MiniMaxTopKRouter MixtralTopKRouter Qwen3_5MoeTopKRouter"),
    (
        Rule("softmax", renormalise="norm_topk_prob"),
        "FlexOlmoTopKRouter MellumTopKRouter OlmoeTopKRouter Qwen2MoeTopKRouter Qwen3MoeTopKRouter "
        "Qwen3NextTopKRouter Qwen4ExpTextTopKRouter",
    ),
    (Rule("softmax", upcast=False, renormalise="norm_topk_prob"), "LaraMiniTopKRouter"),
    (Rule("softmax", eps="norm_min"), "Ernie4_5_MoeTopKRouter"),
    (Rule("softmax", renormalise=False), "JambaTopKRouter"),
    (Rule("softmax", renormalise=False, scale="routed_scaling_factor"), "DeepseekV2TopkRouter"),
    (
        replace(_DEEPSEEK, score="softmax", renormalise=False, experts="n_routed_experts"),
        "LongcatFlashTopkRouter",
    ),
    (
        _DEEPSEEK,
        "AXK1TopkRouter AXK2TopkRouter BailingHybridTopkRouter DeepseekV3TopkRouter DeepseekV32TopkRouter "
        "Dots1TopkRouter Dots3NoteTextTopkRouter ExaoneMoeTopkRouter Glm4MoeTopkRouter Glm4MoeLiteTopkRouter "
        "GlmMoeDsaTopkRouter HYV4TopkRouter KimiLinearTopkRouter MiMoV2FlashTopkRouter NemotronHTopkRouter "
        "SolarOpenTopkRouter",
    ),
    (replace(_DEEPSEEK, scale=None), "BeamTopKRouter"),
    (
        replace(_DEEPSEEK, score="score_fn", renormalise=True),
        "DeepseekV4TopKRouter DeepseekV4HashRouter Inkling2TopKRouter Inkling2LoopTopKRouter",
    ),
    (replace(_DEEPSEEK, renormalise=True, scale="router_scaling_factor"), "HYV3TopKRouter"),
    (replace(_DEEPSEEK, eps=1e-6), "Lfm2MoeTopKRouter"),
    (Rule("sigmoid", eps=1e-20, scale="route_scale"), "AfmoeTokenChoiceRouter"),
    (Rule("sigmoid"), "LagunaTopKRouter MiniMaxM2TopKRouter MiniMaxM3VLTopKRouter"),
    (Rule("sigmoid", renormalise="norm_topk_prob"), "FlintTopKRouter Kolibri1TopKRouter"),
    (Rule("expert_selection_fn", renormalise="norm_topk_prob"), "Cohere2MoeTopKRouter"),
    (
        Rule("chosen"),
        "GraniteMoeTopKRouter GraniteMoeSharedTopKRouter GraniteMoeHybridTopKRouter GraniteMoeSWATopKRouter",
    ),
    (Rule("chosen", upcast=False), "GptOssTopKRouter"),
)
RULES: dict[str, Rule] = {name: rule for rule, names in _BY_RULE for name in names.split()}
"""Class name of a router in transformers -> its rule."""

EXPERTS = re.compile(r"Experts$|CDMoE$")
"""Classes that hold experts: each must be in a block with a router that is in `RULES`."""


@dataclass(frozen=True)
class RouterSite:
    """One router of a model.

    Attributes:
        layer: index of its decoder layer, dense ones counted.
        name: path of the module in the model.
        module: its forward returns what `observed` reads.
        family: `model_type` of the model's config.
    """

    layer: int
    name: str
    module: nn.Module
    num_experts: int
    top_k: int
    family: str
    rule: Rule


def find_routers(model: nn.Module) -> list[RouterSite]:
    """All routers in the order of layers, adapters around them or not; empty for a dense model.

    Raises:
        UnknownRouter: a layer has experts but no router in `RULES`, or is computed several times in a pass.
    """
    config: Any = getattr(model, "config", None)
    family = str(getattr(config, "model_type", type(model).__name__))
    modules = dict(model.named_modules())
    routers = {name: rule for name, m in modules.items() if (rule := rule_of(m)) is not None}
    for name, module in modules.items():
        if EXPERTS.search(type(module).__name__) is None:
            continue
        block = re.sub(r"(\.base_layer)*$", "", name).rpartition(".")[0]
        if not any(router.startswith(f"{block}.") for router in routers):
            raise UnknownRouter(
                f"{family}: {type(modules[block]).__name__} ({block}) chooses experts in a way that is not "
                "known here, so its routing can be neither replayed nor balanced; use a family of "
                "rl/moe/routers.py such as qwen3_moe, olmoe, mixtral or deepseek_v3"
            )
    text: Any = config.get_text_config() if routers and config else None
    if (total := getattr(text, "total_num_hidden_layers", 0)) > getattr(text, "num_hidden_layers", total):
        raise UnknownRouter(
            f"{family}: a pass computes {total} layers with the weights of {text.num_hidden_layers}, and a "
            "router chooses anew each time, so its routing can be neither replayed nor balanced"
        )
    sites = [_site(name, modules[name], rule, family) for name, rule in routers.items()]
    return sorted(sites, key=lambda site: site.layer)


def rule_of(module: nn.Module) -> Rule | None:
    """The rule of a router, by its class or a base class (sharding derives classes); None: not a router."""
    return next((RULES[c.__name__] for c in type(module).__mro__ if c.__name__ in RULES), None)


def _site(name: str, module: nn.Module, rule: Rule, family: str) -> RouterSite:
    found = re.search(r"\.(\d+)\.", name)
    assert found is not None, f"{name} is in no numbered layer"
    num_experts: Any = getattr(module, rule.experts)
    top_k: Any = module.top_k
    return RouterSite(int(found[1]), name, module, num_experts, top_k, family, rule)


def observed(
    site: RouterSite, output: Output
) -> tuple[Float[Tensor, "T E"], Float[Tensor, "T K"], Int[Tensor, "T K"]]:
    """(logits, weights, experts) from the output of the router's forward.

    Raises:
        UnknownRouter: the output lacks some of them.
    """
    if len(output) < 3:
        raise UnknownRouter(
            f"{site.family}: {type(site.module).__name__} returns {len(output)} tensors without logits; "
            "install transformers>=5.19, or use moe.replay=none"
        )
    chosen = place_of_experts(output)
    return output[2 - chosen], output[1], output[chosen]


def place_of_experts(output: Output) -> int:
    """Experts are the only integers. They come first from Granite's routers before transformers 5.24."""
    return 2 if output[0].is_floating_point() else 0


def answered(output: Output, weights_TK: Tensor, idx_TK: Tensor) -> Output:
    """The router's output with other experts and their weights, in the form of `output`."""
    changed = list(output)
    changed[1], changed[place_of_experts(output)] = weights_TK, idx_TK
    return tuple(changed)


def scores(site: RouterSite, logits_TE: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """Probability or affinity of each expert before any is chosen; for "chosen" the softmax over all."""
    logits = logits_TE.float() if site.rule.upcast else logits_TE
    match site.rule.score:
        case "sigmoid":
            return logits.sigmoid()
        case "score_fn":
            fn: Any = site.module.score_fn
            return fn(logits)
        case "expert_selection_fn" if site.module.expert_selection_fn == "sigmoid":
            return logits_TE.sigmoid()
        case _:
            return logits.softmax(-1)


def route_weights(
    site: RouterSite,
    logits_TE: Float[Tensor, "T E"],
    idx_TK: Int[Tensor, "T K"],
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "T K"]:
    """Weights of given experts: gathered from the scores of all, renormalised and scaled as the family does.

    Args:
        dtype: dtype of the result, such as that of the router's own weights; default: the arithmetic's.
    """
    rule, module = site.rule, site.module
    chooses = rule.score == "expert_selection_fn" and module.expert_selection_fn == "softmax"
    if rule.score == "chosen" or chooses:
        chosen_TK = logits_TE.gather(-1, idx_TK)
        return (chosen_TK.float() if rule.upcast else chosen_TK).softmax(-1).to(dtype or chosen_TK.dtype)
    weights_TK = scores(site, logits_TE).gather(-1, idx_TK)
    name = rule.renormalise
    if getattr(module, name) if isinstance(name, str) else name:
        total_T1 = weights_TK.sum(-1, keepdim=True)
        if isinstance(rule.eps, str):
            total_T1 = total_T1.clamp(min=getattr(module, rule.eps))
        weights_TK = weights_TK / (total_T1 + rule.eps if isinstance(rule.eps, float) else total_T1)
    if rule.scale is not None:
        weights_TK = weights_TK * getattr(module, rule.scale)
    return weights_TK.to(dtype or weights_TK.dtype)


@contextmanager
def watching(
    sites: Sequence[RouterSite], see: Callable[[RouterSite, Any], Any], *, with_graph: bool = False
) -> Iterator[None]:
    """Calls `see(site, output)` whenever a router returns; unless None, its result replaces the output.

    Args:
        with_graph: whether passes must have a graph.

    Raises:
        ValueError: they lack one under re-entrant gradient checkpointing. What is seen would silently have no
            gradient, and replaced outputs would be missing from the recomputation.
    """

    def seen(site: RouterSite, output: Any) -> Any:
        if with_graph and not torch.is_grad_enabled():
            raise ValueError(
                "gradient checkpointing with use_reentrant=true computes layers without a graph: routers "
                "would have no balance loss and no replay; use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        return see(site, output)

    with ExitStack() as stack:
        for site in sites:
            hook = lambda _module, _args, output, site=site: seen(site, output)  # noqa: E731
            stack.callback(site.module.register_forward_hook(hook).remove)
        yield


@torch.no_grad()
def self_check(compute: Callable[[Tensor], Any], sites: list[RouterSite], ids_1T: Int[Tensor, "1 T"]) -> None:
    """Compares `route_weights` with the weights of every router, as `compute` runs the model, bit for bit.

    Raises:
        UnknownRouter: they differ, so replay would compute another model.
    """
    faults: dict[str, UnknownRouter | None] = {}

    def check(site: RouterSite, output: Output) -> None:
        logits, weights, idx = observed(site, output)
        ours = route_weights(site, logits, idx, weights.dtype)
        if not torch.equal(ours, weights):
            raise UnknownRouter(
                f"{site.family}: weights of {site.name} ({type(site.module).__name__}) differ from ours by "
                f"{(ours - weights).abs().max().item():.2g}, so replayed experts would be weighted wrongly; "
                "use moe.replay=none, or another version of transformers"
            )

    def see(site: RouterSite, output: Output) -> None:
        again = UnknownRouter(f"{site.family}: {site.name} is asked more than once in a pass")
        faults[site.name] = again if site.name in faults else None
        try:
            check(site, output)
        except UnknownRouter as error:  # raised after the pass: one cut short would leave layers gathered
            faults[site.name] = error

    try:
        with watching(sites, see):
            compute(ids_1T)
    finally:
        if fault := next(filter(None, faults.values()), None):
            raise fault
    assert faults.keys() >= {site.name for site in sites}, "a router was not called"
