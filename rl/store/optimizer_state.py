"""An optimizer's state under parameter names: it outlives the parameters' order and the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rl.store.tensors import TensorFiles, join_tree, read_json, write_tree

KIND = "optimizer"

# Flags of how a step is computed. The live ones stay, so that a run of a GPU resumes on a CPU.
_NOT_HYPERPARAMETERS = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})


def optimizer_writer(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]
) -> Callable[[Path], None]:
    """A writer of this process's part of the optimizer's state, under parameter names.

    It holds the optimizer's own tensors, not copies: call it before the next step.
    """
    members = _members_by_group(optimizer, named_parameters)
    own = {name: parameter for group in members for name, parameter in group.items()}
    groups = [{**g, "params": list(named)} for g, named in zip(optimizer.param_groups, members, strict=True)]
    state = {name: optimizer.state.get(parameter, {}) for name, parameter in own.items()}
    shapes = {name: list(parameter.shape) for name, parameter in own.items()}
    tree = {"state": state, "param_groups": groups, "shapes": shapes}
    return lambda folder: write_tree(folder, KIND, tree)


def state_bytes(optimizer: torch.optim.Optimizer, *, copies: int = 1) -> int:
    """Bytes of the optimizer's state, and of `copies` copies of the parameters that it moves.

    A sharded tensor counts as a whole, which all processes write together.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    held = [value for p in parameters for value in optimizer.state.get(p, {}).values()]
    return copies * sum(p.nbytes for p in parameters) + sum(x.nbytes for x in held if isinstance(x, Tensor))


def load_optimizer(
    folder: Path, optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]
) -> None:
    """Loads what `optimizer_writer` wrote into `optimizer`, bit for bit and in the saved dtypes.

    `Optimizer.load_state_dict` would cast the moments to the parameters' dtype. Sharded parameters get their
    slices, so the number of processes may differ from the saved one.

    Raises:
        ValueError: parameters, groups or shapes are not the saved ones; the optimizer is left as it was.
    """
    saved, files = read_json(folder / "trainer" / f"{KIND}.json"), TensorFiles(folder, KIND)
    groups = _members_by_group(optimizer, named_parameters)
    live = [{name: list(parameter.shape) for name, parameter in members.items()} for members in groups]
    wanted = [{name: saved["shapes"][name] for name in group["params"]} for group in saved["param_groups"]]
    if live != wanted:
        raise ValueError(_describe_mismatch(live, wanted))
    options, states = [], {}
    for group, given, members in zip(optimizer.param_groups, saved["param_groups"], groups, strict=True):
        keys = given.keys() - _NOT_HYPERPARAMETERS
        options.append({key: _like(join_tree(given[key], files.read), group.get(key)) for key in keys})
        step_on_device = bool(group.get("capturable") or group.get("fused"))
        moments_on_device = not getattr(optimizer, "moments_on_host", False)
        for name, parameter in members.items():
            place = partial(_placed, files, parameter=parameter)
            states[parameter] = {
                key: join_tree(
                    value, partial(place, on_device=step_on_device if key == "step" else moments_on_device)
                )
                for key, value in saved["state"][name].items()
            }
    for group, values in zip(optimizer.param_groups, options, strict=True):
        group.update(values)
    optimizer.state.update(states)


def _members_by_group(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]
) -> list[dict[str, torch.nn.Parameter]]:
    names = {id(parameter): name for name, parameter in named_parameters}
    members = [group["params"] for group in optimizer.param_groups]
    assert all(id(p) in names for parameters in members for p in parameters), "a parameter without a name"
    return [{names[id(p)]: p for p in parameters} for parameters in members]


def _like(value: Any, live: Any) -> Any:
    """A hyperparameter in the live one's form: JSON has no tuples (AdamW's betas), and files no device."""
    if isinstance(live, tuple):
        return tuple(value)
    return value.to(live.device) if isinstance(value, Tensor) and isinstance(live, Tensor) else value


def _placed(files: TensorFiles, name: str, *, parameter: torch.nn.Parameter, on_device: bool) -> Tensor:
    """A tensor of a parameter's state, sharded as the parameter is if it has its shape."""
    tensor = files.read(name, parameter)
    if not on_device:
        return tensor
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor) or files.shapes[name] != list(parameter.shape):
        return tensor
    whole: dict[str, Any] = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
    return DTensor.from_local(tensor, parameter.device_mesh, parameter.placements, **whole)


def _describe_mismatch(live: list[dict[str, list[int]]], wanted: list[dict[str, list[int]]]) -> str:
    here, there = ({n: s for group in groups for n, s in group.items()} for groups in (live, wanted))
    found = {
        "saved parameters are gone": sorted(there.keys() - here.keys()),
        "parameters are new": sorted(here.keys() - there.keys()),
        "shapes differ": [
            f"{n} is {here[n]}, was {there[n]}"
            for n in sorted(here.keys() & there.keys())
            if here[n] != there[n]
        ],
    }
    parts = [f"{len(some)} {what} such as {', '.join(some[:3])}" for what, some in found.items() if some]
    moved = f"{len(wanted)} parameter groups were saved, there are {len(live)}, or their members moved"
    return (
        f"the saved optimizer state does not fit this optimizer: {'; '.join(parts or [moved])}. "
        "Resume with the model and lora settings of the checkpoint, or start another run_dir from its weights"
    )
