"""What exact resume needs besides weights and optimizer: random number generators and counters."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rl.store.tensors import TensorFiles, join_tree, read_json, split_tree, write_json, write_tree

TRAINER_FILES = {
    "trainer/optimizer.safetensors": "optimizer state",
    "trainer/optimizer.json": "optimizer state",
    "trainer/rng.safetensors": "random number state",
    "trainer/rng.json": "random number state",
    "trainer/state.json": "step and counters",
}


@dataclass(slots=True)
class TrainerState:
    """The state of training after `step` optimizer steps, without weights and optimizer.

    Attributes:
        rng: rank name -> `capture_rng()` of that rank. The caller gathers them.
        counters: JSON values: prompt cursor, consecutive bad steps, ...
    """

    step: int
    rng: dict[str, Any]
    counters: dict[str, Any] = field(default_factory=dict)


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
    """Writes step, counters and generators into `folder/trainer`, not fsynced; for the main process only.

    Raises:
        NonFiniteError: a number is NaN or infinity.
    """
    write_tree(folder, "rng", state.rng)
    counters = split_tree(state.counters, "counters", None)
    write_json(folder / "trainer" / "state.json", {"step": state.step, "counters": counters})


def read_trainer_state(folder: Path) -> TrainerState:
    """What `write_trainer_state` wrote. The caller has verified the files."""
    state = read_json(folder / "trainer" / "state.json")
    rng = join_tree(read_json(folder / "trainer" / "rng.json"), TensorFiles(folder, "rng").read)
    return TrainerState(state["step"], rng=rng, counters=state["counters"])
