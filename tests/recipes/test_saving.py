"""Published models are saved as they were loaded, and a run that could not save does not start."""

from __future__ import annotations

import json
import os
import shutil
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from recipes.grpo import main
from rl.model.saving import check_saving, save_model
from rl.store.checkpoint import CheckpointStore

CONTRADICTORY = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 1}  # no do_sample: "not valid" for saving


@pytest.fixture
def published(tiny_model_dir, tmp_path):
    folder = tmp_path / "published"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "generation_config.json").write_text(json.dumps(CONTRADICTORY))
    return folder


@pytest.mark.parametrize("adapter", [[], ["model.lora={r: 2}"]], ids=["full", "lora"])
def test_a_run_saves_a_model_whose_generation_config_contradicts_itself(config_file, published, adapter):
    assert main([str(config_file), f"model.name={published}", "checkpoint.every=1", *adapter]) == 0
    saved = config_file.parent / "run" / "checkpoints" / "step-000002"
    assert (saved / "manifest.json").is_file()
    if not adapter:
        again = json.loads((saved / "generation_config.json").read_text())
        assert again.items() >= CONTRADICTORY.items()
        assert AutoModelForCausalLM.from_pretrained(saved).generation_config.temperature == 0.6


def test_a_model_keeps_its_generation_config_while_it_is_saved(published, tmp_path):
    with pytest.raises(ValueError, match="do_sample"):  # what transformers says
        GenerationConfig.from_pretrained(published).save_pretrained(tmp_path / "theirs")
    model = AutoModelForCausalLM.from_pretrained(published)
    save_model(model, model, tmp_path / "ours")
    assert model.generation_config.temperature == 0.6
    assert GenerationConfig.from_pretrained(tmp_path / "ours").top_p == 0.9


def parts_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_a_model_that_cannot_be_saved_is_refused_before_the_first_step(published, tmp_path):
    model, tokenizer = parts_of(published)
    check_saving(model, tokenizer, root=tmp_path / "checkpoints", adapter=False)
    assert list((tmp_path / "checkpoints").iterdir()) == []
    model.config.note = {1, 2}  # no JSON value
    with pytest.raises(ValueError, match=r"cannot be saved, so its first checkpoint would be lost: .*set"):
        check_saving(model, tokenizer, root=tmp_path / "checkpoints", adapter=False)


class Dying:
    def save_pretrained(self, folder):
        os._exit(0)


def test_what_a_killed_check_left_behind_is_cleared_at_the_next_start(published, tmp_path):
    model, root = AutoModelForCausalLM.from_pretrained(published), tmp_path / "checkpoints"
    if os.fork() == 0:
        check_saving(model, Dying(), root=root, adapter=False)
    os.wait()
    (left,) = root.iterdir()
    assert (left / "config.json").is_file()
    check_saving(*parts_of(published), root=root, adapter=False)
    assert not left.exists()


class Evaluated:
    """A tokenizer; while it is saved, `cohort eval` opens the checkpoints of the run, in any process."""

    def __init__(self, root):
        self.root, self.files = root, []

    def save_pretrained(self, folder):
        CheckpointStore(self.root)
        self.files = os.listdir(folder)


def test_a_check_in_use_is_not_cleared_by_a_reader_of_the_checkpoints(published, tmp_path):
    model, root = AutoModelForCausalLM.from_pretrained(published), tmp_path / "checkpoints"
    tokenizer = Evaluated(root)
    check_saving(model, tokenizer, root=root, adapter=False)
    assert "config.json" in tokenizer.files


def test_a_disk_without_room_for_one_checkpoint_is_refused(published, tmp_path, monkeypatch):
    model, tokenizer = parts_of(published)
    size = 3 * sum(p.nbytes for p in model.parameters())  # weights and two moments
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size - 1))
    with pytest.raises(ValueError, match=r"one checkpoint needs about .* free some space, or set run_dir"):
        check_saving(model, tokenizer, root=tmp_path, adapter=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size))
    check_saving(model, tokenizer, root=tmp_path, adapter=False)


def test_a_moving_reference_counts_and_the_checkpoints_to_come_are_warned_about(
    published, tmp_path, monkeypatch
):
    (model, tokenizer), said = parts_of(published), []
    weights = sum(p.nbytes for p in model.parameters())
    size = 4 * weights  # weights, two moments, a reference
    options = {"root": tmp_path, "adapter": False, "reference": True, "keep": 2, "warn": said.append}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size - 1))
    with pytest.raises(ValueError, match="one checkpoint needs about"):
        check_saving(model, tokenizer, **options)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * size - 1))
    check_saving(model, tokenizer, **options)
    assert "less than 3 of them will take (checkpoint.keep=2, and one that is being written)" in said.pop()
    (tmp_path / "step-000004").mkdir()  # one of the three is there
    check_saving(model, tokenizer, **options)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * size))
    check_saving(model, tokenizer, **options)
    assert not said
