"""Saves a model in Hugging Face form, whatever its generation config holds; checks early that this works."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rl.model.hollow import in_files

INDEX = "model.safetensors.index.json"


def save_model(target: Any, model: PreTrainedModel, folder: Path, **options: Any) -> None:
    """`target.save_pretrained(folder)`, with the generation config of `model` as it was loaded.

    transformers loads a generation config that contradicts itself with a warning, and refuses to save it: a
    temperature without do_sample, which many published models have.

    Args:
        target: `model`, or the adapter around it, whose folder has no generation config.
    """
    with _generation_config_as_loaded(model, folder):
        target.save_pretrained(folder, **options)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty template, with a local path as its base


def save_settings(model: PreTrainedModel, folder: Path) -> None:
    """Writes all that `model.save_pretrained(folder)` writes, except the weights."""
    config: Any = model.config
    config.architectures = [type(model).__name__]
    with _generation_config_as_loaded(model, folder):
        config.save_pretrained(folder)
        if (stand_in := model.generation_config) is not None:
            stand_in.save_pretrained(folder)


def name_dtype(folder: Path, dtype: str) -> None:
    """Writes into a model's config in which dtype others load it; an adapter's folder has none."""
    if (path := folder / "config.json").exists():
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": dtype}, indent=2) + "\n")


def check_saving(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    root: Path,
    adapter: bool,
    keep: int = 1,
    reference: bool = False,
    warn: Callable[[str], None] = print,
) -> None:
    """Writes all of a checkpoint except its tensors into a temporary folder below `root`. The size of its
    tensors is compared with the free space there. The caller holds the lock of the run's folder.

    Args:
        adapter: only the trained parameters are saved, not the whole model.
        keep: checkpoints to keep; the next one needs room beside them while it is written.
        reference: a moving copy of the model is part of a checkpoint.

    Raises:
        ValueError: something cannot be written, or the disk has no room for one checkpoint.
    """
    root.mkdir(parents=True, exist_ok=True)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    whole = sum(p.nbytes for p in model.parameters())
    size = 2 * trained + (trained if adapter else whole) + whole * reference
    free, more = shutil.disk_usage(root).free, max(1, keep + 1 - len(list(root.glob("step-*"))))
    sentence = (
        f"one checkpoint needs about {size / 1e6:,.0f} MB (weights and two moments of the optimizer); "
        f"{root} has {free / 1e6:,.0f} MB free"
    )
    if free < size:
        raise ValueError(f"{sentence}; free some space, or set run_dir to another disk")
    if free < more * size:
        warn(
            f"{sentence}, less than {more} of them will take (checkpoint.keep={keep}, and one that is being "
            "written); free some space, or lower checkpoint.keep"
        )
    for left_by_a_killed_one in root.glob(".saving-*"):
        shutil.rmtree(left_by_a_killed_one, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=root) as scratch:
        folder = Path(scratch)
        try:
            save_settings(model, folder)
            tokenizer.save_pretrained(folder)
        except (OSError, ValueError, TypeError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"the model cannot be saved, so its first checkpoint would be lost: {first}; correct its "
                "config.json or tokenizer files in a copy of its folder, and set model.name to the copy"
            ) from error


@contextmanager
def _generation_config_as_loaded(model: Any, folder: Path) -> Iterator[None]:
    """Lets the block save a generation config that can be saved, and then overwrites it with the model's."""
    loaded: Any = model.generation_config
    model.generation_config = type(loaded)() if loaded is not None else None
    try:
        yield
    finally:
        model.generation_config = loaded
    if loaded is not None and (path := folder / "generation_config.json").exists():
        loaded.to_json_file(path, use_diff=True, keys_to_pop=["compile_config"])


def shard_name(rank: int, size: int) -> str:
    return f"model-{rank + 1:05d}-of-{size:05d}.safetensors"


def write_index(
    folder: Path, model: PreTrainedModel, *, named: Mapping[str, Tensor], owners: Sequence[int], size: int
) -> None:
    """Where each tensor is, as transformers and engines look it up."""
    whole = {name: torch.empty(tensor.shape, device="meta") for name, tensor in named.items()}
    places = {
        key: shard_name(owner, size)
        for name, owner in zip(named, owners, strict=True)
        for key in in_files(model, {name: whole[name]})
    }
    total = {"total_size": sum(tensor.nbytes for tensor in named.values())}
    (folder / INDEX).write_text(json.dumps({"metadata": total, "weight_map": places}, indent=1) + "\n")
