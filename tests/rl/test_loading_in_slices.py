"""Which files a split policy reads in slices, and when it must not: the whole model is the oracle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from rl.causal import CausalPolicy
from rl.config.read import load_config
from rl.model.hollow import digest_of, weight_files
from rl.model.loading import load_model
from rl.sharded import check_same_files, load_split

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def config_of(folder: Path):
    return load_config(None, [f"model.name={folder}", "model.dtype=fp32"]).model


def split_of(folder: Path) -> tuple[CausalPolicy, str | None] | None:
    return load_split(config_of(folder), Accelerator(cpu=True), temperature=1.0, plan=None, longest=60)


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that ties its head, by its config."""
    copy = tmp_path / "model"
    shutil.copytree(tiny_model_dir, copy)
    tree = json.loads((copy / "config.json").read_text()) | {"tie_word_embeddings": True}
    (copy / "config.json").write_text(json.dumps(tree))
    tensors = load_file(copy / FILE)
    tensors.pop(HEAD, None)
    save_file(tensors, copy / FILE, {"format": "pt"})
    return copy


@pytest.mark.parametrize("same", [True, False])
def test_a_head_of_its_own_is_read_although_the_config_ties_it(folder: Path, same: bool):
    """transformers ties a head that the files hold, too, only where it equals the embedding."""
    tensors = load_file(folder / FILE)
    tensors[HEAD] = tensors[EMBEDDING].clone() if same else tensors[EMBEDDING].flip(0).contiguous()
    save_file(tensors, folder / FILE, {"format": "pt"})
    head = load_model(config_of(folder)).get_output_embeddings().weight  # type: ignore[union-attr]
    assert torch.equal(head, tensors[HEAD])
    assert (split_of(folder) is not None) == same


def test_of_a_file_and_an_index_the_one_is_read_that_transformers_reads(folder: Path):
    tensors = {name: tensor + 1 for name, tensor in load_file(folder / FILE).items()}
    save_file(tensors, folder / "older.safetensors", {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "older.safetensors")}))
    read = weight_files(config_of(folder))
    own: Any = load_model(config_of(folder)).get_input_embeddings().weight
    assert torch.equal(load_file(read[0])[EMBEDDING], own) and len(read) == 1
    (folder / FILE).unlink()
    assert [file.name for file in weight_files(config_of(folder))] == ["older.safetensors"]


def test_a_model_that_lacks_a_file_is_refused_in_words(folder: Path):
    (folder / FILE).rename(folder / "a.safetensors")
    names = dict.fromkeys(load_file(folder / "a.safetensors"), "a.safetensors")
    names["model.norm.weight"] = "b.safetensors"
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises(ValueError, match=r"model\.name=.*: the model cannot be loaded: .*b\.safetensors"):
        split_of(folder)


def test_processes_with_other_weights_of_the_same_shapes_are_refused(folder: Path, tmp_path: Path):
    tensors = load_file(folder / FILE)
    other = tmp_path / "other" / FILE
    other.parent.mkdir()
    save_file({name: tensor * 1.001 for name, tensor in tensors.items()}, other, {"format": "pt"})
    assert other.stat().st_size == (folder / FILE).stat().st_size
    mine, theirs = ({FILE: digest_of(file)} for file in (folder / FILE, other))
    check_same_files("m", [mine, dict(mine)])
    with pytest.raises(
        ValueError, match=r"model\.safetensors differs between the hosts of processes 0 and 1"
    ):
        check_same_files("m", [mine, theirs])
    with pytest.raises(ValueError, match="processes 0 and 2"):
        check_same_files("m", [mine, mine, {}])
