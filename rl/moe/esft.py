"""Expert-specialised fine-tuning (ESFT, arXiv:2407.01906): only the experts that a task uses are trained.

`expert_relevance` -> `select_experts` -> `save_experts` writes the file that `moe.trained_experts` names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor

from rl.model.hollow import own_slice
from rl.moe.adapters import expert_stacks, part_of
from rl.moe.routers import RouterSite, find_routers, observed, watching


@dataclass(frozen=True)
class TrainedExperts:
    """What is trained: experts by decoder layer, and whether shared experts and all other modules are."""

    experts: dict[int, list[int]]
    shared_experts: bool = False
    non_expert_modules: bool = False


@torch.no_grad()
def expert_relevance(
    model: Any, rows: Iterable[Tensor], *, kind: Literal["gate", "token"] = "token"
) -> dict[int, Float[Tensor, " E"]]:
    """Decoder layer -> relevance of its experts, which adds up to 1 (section 3.2).

    "token": share of the choices that an expert got; "gate": share of the gate weights that it got.

    Args:
        rows: token ids [1, T] of samples of the task; ValueError if there are none.
    """
    sites = find_routers(model)
    sums = {site.layer: torch.zeros(site.num_experts, dtype=torch.float64) for site in sites}

    def see(site: RouterSite, output: Any) -> None:
        _, weights_TK, idx_TK = observed(site, output)
        given = torch.ones_like(weights_TK) if kind == "token" else weights_TK
        given, chosen = given.double().cpu().flatten(), idx_TK.cpu().flatten()
        sums[site.layer].index_add_(0, chosen, given)

    with watching(sites, see):
        for ids in rows:
            model(input_ids=ids.to(model.device), use_cache=False)
    if not all(total.sum() > 0 for total in sums.values()):
        raise ValueError("expert_relevance needs at least one row of tokens")
    return {layer: (total / total.sum()).float() for layer, total in sums.items()}


def select_experts(scores: Mapping[int, Float[Tensor, " E"]], *, top_p: float = 0.2) -> dict[int, list[int]]:
    """The most relevant experts of each layer, added one by one until their relevance reaches `top_p` in
    total. ValueError unless 0 < top_p <= 1.
    """
    if not 0 < top_p <= 1:
        raise ValueError(
            f"top_p={top_p} must be in (0, 1], such as 0.2 for token scores and 0.1 for gate scores"
        )
    found = {}
    for layer, score_E in scores.items():
        sorted_E, order_E = score_E.double().sort(descending=True, stable=True)
        before_E = sorted_E.cumsum(0) - sorted_E
        found[layer] = sorted(order_E[before_E < top_p].tolist())
    return found


def save_experts(chosen: TrainedExperts, path: Path) -> None:
    """Writes the format of DeepSeek's expert_configs."""
    tree = {
        "experts": {str(layer): ids for layer, ids in sorted(chosen.experts.items())},
        "shared_experts": chosen.shared_experts,
        "non_expert_modules": chosen.non_expert_modules,
    }
    path.write_text(json.dumps(tree, indent=2) + "\n")


def load_experts(path: str | Path) -> TrainedExperts:
    """What `save_experts` wrote; raises ValueError if the file is not of that format."""
    form = '{"experts": {"1": [0, 5]}, "shared_experts": false, "non_expert_modules": false}'
    try:
        tree = json.loads(Path(path).read_text())
        experts = {int(layer): [int(i) for i in ids] for layer, ids in tree["experts"].items()}
        return TrainedExperts(experts, bool(tree.get("shared_experts")), bool(tree.get("non_expert_modules")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"moe.trained_experts={path}: {error}; the file must have the form {form}"
        ) from error


def train_only(model: Any, chosen: TrainedExperts) -> None:
    """Freezes all except the chosen experts. The gradient of the others is 0, and without weight decay so is
    Adam's step.

    Raises:
        ValueError: the model does not have such a layer or expert.
    """
    sites = {site.layer: site for site in find_routers(model)}
    for layer, ids in chosen.experts.items():
        known = sites[layer].num_experts if layer in sites else 0
        if wrong := [i for i in ids if not 0 <= i < known]:
            raise ValueError(
                f"moe.trained_experts: layer {layer} has {known} routed experts, but expert {wrong[0]} is "
                f"not one of them; layers with experts are {', '.join(map(str, sites))}"
            )
    stacks = expert_stacks(model)
    for name, p in model.named_parameters():
        part = part_of(model, name)
        if part == "routed experts":
            continue
        p.requires_grad_(chosen.shared_experts if part == "shared experts" else chosen.non_expert_modules)
    for name, stack in stacks.items():
        layer = next(int(step) for step in name.split(".") if step.isdigit())
        mask_E = torch.zeros(sites[layer].num_experts, dtype=torch.bool)
        mask_E[chosen.experts.get(layer, [])] = True
        for p in stack.parameters():
            p.requires_grad_(bool(mask_E.any()))
            if p.requires_grad:
                p.register_hook(partial(_masked, mask_E))
                cast(Any, p).trained_share = mask_E.float().mean().item()  # for `audit`
        cast(Any, stack).trained_E = mask_E


def mask_split_gradients(model: Any) -> None:
    """Does what the hooks of `train_only` do, where processes split the weights: a shard has no hooks."""
    for stack in expert_stacks(model).values():
        for p in stack.parameters() if hasattr(stack, "trained_E") else ():
            if isinstance(p.grad, DTensor):
                own, first = own_slice(p.grad)
                own.copy_(_masked(cast(Any, stack).trained_E[first : first + len(own)], own))


def _masked(mask_E: Tensor, gradient: Tensor) -> Tensor:
    """The gradient, with 0 for all other experts."""
    mask = mask_E.to(gradient.device).view(-1, *[1] * (gradient.ndim - 1))
    return torch.where(mask, gradient, 0.0)
