"""What training needs besides weights and optimizer to go on undisturbed: random numbers and counters.

In memory these are trees of dicts and lists with tensors and JSON values as leaves. On disk a tree is its
tensors as safetensors, and its form as JSON where `{"$tensor": NAME}` stands for a tensor. No pickles.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TRAINER_FILES = {
    "optimizer.safetensors": "optimizer state",
    "optimizer.json": "optimizer state",
    "rng.safetensors": "random number state",
    "rng.json": "random number state",
    "state.json": "step and counters",
}
_TENSOR = "$tensor"


class NonFiniteError(ValueError):
    """A tensor that was about to be saved holds NaN or infinity."""


@dataclass(slots=True)
class TrainerState:
    """The state of training after `step` optimizer steps, weights and optimizer aside.

    Attributes:
        rng: rank name -> `capture_rng()` of that rank. The caller gathers them.
        counters: JSON values: prompt cursor, bad steps in a row, ...
    """

    step: int
    rng: dict[str, Any]
    counters: dict[str, Any] = field(default_factory=dict)


def check_finite(named_tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Raises NonFiniteError, with the names, if a floating-point tensor holds NaN or infinity.

    A sum is finite only if every term is, so one pass decides the usual case; overflows get the exact test.
    """
    bad = []
    for name, tensor in named_tensors:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        values = tensor.detach()
        if values.element_size() == 1:  # float8 has no sum
            values = values.float()
        wide = torch.float64 if values.dtype == torch.float64 else torch.float32
        if not math.isfinite(values.sum(dtype=wide).item()) and not values.isfinite().all():
            bad.append(f"{name} ({int((~values.isfinite()).sum())} of {values.numel()} values)")
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise NonFiniteError(
            f"{what}: NaN or infinity in {', '.join(bad[:3])}{more}; nothing was saved. "
            "Resume from the last checkpoint; lower optimizer.lr or optimizer.max_grad_norm if it recurs"
        )


def capture_rng() -> dict[str, Any]:
    """States of this process's generators: python, numpy, torch on the CPU and on the current CUDA device."""
    version, words, gauss_next = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    key = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    state = {
        "python": {"version": version, "words": torch.tensor(words), "gauss_next": gauss_next},
        "numpy": {**numpy_state, "state": {"key": key, "pos": int(numpy_state["state"]["pos"])}},
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: Mapping[str, Any]) -> list[str]:
    """Sets the generators to what `capture_rng` saw; returns a sentence for each that could not be set."""
    python, numpy_state = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss_next"]))
    key = numpy_state["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**numpy_state, "state": {"key": key, "pos": numpy_state["state"]["pos"]}})
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" not in state:
        return []
    if not torch.cuda.is_available():
        return ["the saved CUDA generator has no device here: random numbers drawn on the GPU will differ"]
    torch.cuda.set_rng_state(state["cuda"].cpu())
    return []


def write_trainer_state(folder: Path, state: TrainerState) -> None:
    """Writes step, counters and generators into `folder`, not fsynced.

    Raises:
        ValueError: a value is neither tensor nor JSON (finite numbers, strings, lists, dicts of strings).
    """
    tensors: dict[str, Tensor] = {}
    shape = split_tree(state.rng, "rng", tensors)
    save_file(unshared(tensors), folder / "rng.safetensors")
    write_json(folder / "rng.json", shape)
    counters = split_tree(state.counters, "counters", None)
    write_json(folder / "state.json", {"step": state.step, "counters": counters})


def read_trainer_state(folder: Path) -> TrainerState:
    """What `write_trainer_state` wrote. The caller has verified the files."""
    saved, state = load_file(folder / "rng.safetensors"), read_json(folder / "state.json")
    rng = join_tree(read_json(folder / "rng.json"), saved.__getitem__)
    return TrainerState(state["step"], rng=rng, counters=state["counters"])


def split_tree(tree: Any, path: str, tensors: dict[str, Tensor] | None) -> Any:
    """The tree as JSON values; its tensors go into `tensors` under their path (None: tensors are refused)."""
    if isinstance(tree, Tensor) and tensors is not None:
        assert path not in tensors, f"two tensors at {path}"
        tensors[path] = tree
        return {_TENSOR: path}
    if isinstance(tree, Mapping):
        for key in tree:
            if not isinstance(key, str) or key == _TENSOR:
                raise ValueError(f"{path} has the key {key!r}; keys must be strings other than {_TENSOR!r}")
        return {key: split_tree(value, f"{path}/{key}", tensors) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [split_tree(value, f"{path}/{i}", tensors) for i, value in enumerate(tree)]
    if isinstance(tree, float) and not math.isfinite(tree):
        raise NonFiniteError(f"{path} is {tree}; only finite numbers are saved")
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    allowed = "JSON values" if tensors is None else "tensors and JSON values"
    raise ValueError(
        f"{path} is a {type(tree).__name__}; only {allowed} are saved (numbers, strings, lists, dicts, None)"
    )


def join_tree(tree: Any, tensor_of: Callable[[str], Tensor]) -> Any:
    """The tree that `split_tree` took apart."""
    if isinstance(tree, dict):
        if _TENSOR in tree:
            return tensor_of(tree[_TENSOR])
        return {key: join_tree(value, tensor_of) for key, value in tree.items()}
    return [join_tree(value, tensor_of) for value in tree] if isinstance(tree, list) else tree


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as safetensors wants (flat optimizers hand out views)."""
    seen: set[tuple[torch.device, int]] = set()
    result = {}
    for name, tensor in tensors.items():
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        result[name] = (
            tensor.clone(memory_format=torch.contiguous_format) if storage in seen else tensor.contiguous()
        )
        seen.add(storage)
    return result


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, allow_nan=False), encoding="ascii")


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())
