"""An optimizer's state under parameter names: it outlives the parameters' order and the number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

# The flags say how a step is computed, not from what: the live ones stay, so a GPU's run resumes on a CPU.
_NOT_HYPERPARAMETERS = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})


def optimizer_state_by_name(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]
) -> dict[str, Any]:
    """The optimizer's state under parameter names: `state`, `param_groups` and the parameters' `shapes`.

    The tensors are the optimizer's own, not copies: save them before its next step. Where parameters are
    sharded (FSDP2) every rank must call this, because it gathers; ranks other than 0 get an empty dict.

    Raises:
        ValueError: the optimizer holds a parameter that `named_parameters` lacks.
    """
    groups, state, shapes = [], {}, {}
    for group, members in zip(
        optimizer.param_groups, _members_by_group(optimizer, named_parameters), strict=True
    ):
        for name, parameter in members.items():
            state[name] = _map_tensors(optimizer.state.get(parameter, {}), _gathered)
            shapes[name] = list(parameter.shape)
        hyperparameters = {key: value for key, value in group.items() if key != "params"}
        groups.append({**hyperparameters, "params": list(members)})
    if _is_sharded(optimizer) and torch.distributed.get_rank() != 0:
        return {}
    return {"state": state, "param_groups": groups, "shapes": shapes}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    saved: Mapping[str, Any],
) -> None:
    """Puts what `optimizer_state_by_name` returned into `optimizer`, bit for bit and in the saved dtypes.

    `Optimizer.load_state_dict` would cast the moments to the parameters' dtype. Sharded parameters get their
    shard, so the number of ranks may differ from the one that saved.

    Raises:
        ValueError: parameters, groups or shapes are not the saved ones; the optimizer is left as it was.
    """
    groups = _members_by_group(optimizer, named_parameters)
    live = [{name: list(parameter.shape) for name, parameter in members.items()} for members in groups]
    wanted = [{name: saved["shapes"][name] for name in group["params"]} for group in saved["param_groups"]]
    if live != wanted:
        raise ValueError(_describe_mismatch(live, wanted))
    for group, saved_group, members in zip(
        optimizer.param_groups, saved["param_groups"], groups, strict=True
    ):
        for key in saved_group.keys() - _NOT_HYPERPARAMETERS:
            group[key] = _like(saved_group[key], group.get(key))
        step_on_device = bool(group.get("capturable") or group.get("fused"))
        for name, parameter in members.items():
            optimizer.state[parameter] = {
                key: _placed(value, parameter, on_device=step_on_device or key != "step")
                for key, value in saved["state"][name].items()
            }


def _members_by_group(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]
) -> list[dict[str, torch.nn.Parameter]]:
    names = {id(parameter): name for name, parameter in named_parameters}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise ValueError(
                    f"the optimizer trains a parameter of shape {list(parameter.shape)} that is none of the "
                    f"{len(names)} named ones; pass named_parameters() of the model it was made for"
                )
    return [
        {names[id(parameter)]: parameter for parameter in group["params"]} for group in optimizer.param_groups
    ]


def _is_sharded(optimizer: torch.optim.Optimizer) -> bool:
    return any(
        hasattr(parameter, "device_mesh") for group in optimizer.param_groups for parameter in group["params"]
    )


def _like(value: Any, live: Any) -> Any:
    """A hyperparameter as the live one is: JSON has no tuples (AdamW's betas), and files know no device."""
    if isinstance(live, tuple):
        return tuple(value)
    device = live.device if isinstance(live, Tensor) else None
    return _map_tensors(value, lambda tensor: tensor.to(device, copy=True))


def _gathered(tensor: Tensor) -> Tensor:
    if not hasattr(tensor, "full_tensor"):
        return tensor.detach()
    whole = tensor.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]
    return whole.cpu() if torch.distributed.get_rank() == 0 else whole.new_empty(0)


def _placed(value: Any, parameter: torch.nn.Parameter, *, on_device: bool) -> Any:
    def place(tensor: Tensor) -> Tensor:
        if not on_device:
            return tensor.clone()
        if hasattr(parameter, "device_mesh") and tensor.shape == parameter.shape:
            from torch.distributed.tensor import DTensor, distribute_tensor

            assert isinstance(parameter, DTensor)
            # Every rank has read the whole tensor, so none has to send it.
            return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
        return tensor.to(parameter.device, copy=True)

    return _map_tensors(value, place)


def _map_tensors(tree: Any, fn: Any) -> Any:
    if isinstance(tree, Tensor):
        return fn(tree)
    if isinstance(tree, Mapping):
        return {key: _map_tensors(value, fn) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_map_tensors(value, fn) for value in tree]
    return tree


def _describe_mismatch(live: list[dict[str, list[int]]], wanted: list[dict[str, list[int]]]) -> str:
    here, there = ({n: s for group in groups for n, s in group.items()} for groups in (live, wanted))
    missing, extra = sorted(there.keys() - here.keys()), sorted(here.keys() - there.keys())
    reshaped = [
        f"{n} is {here[n]}, was {there[n]}" for n in sorted(here.keys() & there.keys()) if here[n] != there[n]
    ]
    parts = [
        f"{len(names)} {label} such as {', '.join(names[:3])}"
        for names, label in (
            (missing, "saved parameters are gone"),
            (extra, "parameters are new"),
            (reshaped, "shapes differ"),
        )
        if names
    ] or [f"{len(wanted)} parameter groups were saved, there are {len(live)}, or their members moved"]
    return (
        f"the saved optimizer state does not fit this optimizer: {'; '.join(parts)}. "
        "Resume with the model and lora settings of the checkpoint, or start another run_dir from its weights"
    )
