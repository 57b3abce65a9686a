"""A run that goes on has the model, the tokenizer and the rows it began with, wherever they are now."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import rl.store.inputs
from recipes.grpo import main
from recipes.llada import main as llada
from rl.store.inputs import changes, fingerprints


@pytest.fixture
def model(config_file, tiny_model_dir) -> Path:
    """A copy of the tiny model, which the test may change."""
    folder = config_file.parent / "model"
    shutil.copytree(tiny_model_dir, folder)
    return folder


def change_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, path, {"format": "pt"})


def change_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 5000.0}))


def change_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"w7"', '"w700"'))


def change_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<assistant>", "<user>"))


def change_rows(folder: Path) -> None:
    path = folder.parent / "train.jsonl"
    path.write_text(path.read_text().replace("What is w3 ?", "What is w4 ?"))


def change_heldout(folder: Path) -> None:
    path = folder.parent / "heldout.jsonl"
    path.write_text(path.read_text().replace('"w70"', '"w69"'))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_weights, "model: model.safetensors (changed)"),
        (change_config, "model: config.json (changed)"),
        (change_tokenizer, "tokenizer: tokenizer.json ("),
        (change_template, "chat template: text (changed)"),
        (change_rows, "data: rows (changed)"),
        (change_heldout, "evaluation data: rows (changed)"),
    ],
)
def test_what_changed_under_a_run_is_named_and_the_run_refused(
    config_file, heldout, model, capsys, change, said
):
    arguments = [str(config_file), f"model.name={model}", *heldout]
    assert main([*arguments, "train.steps=1"]) == 0
    change(model)
    assert main([*arguments, "train.steps=2"]) == 1
    error = capsys.readouterr().err
    assert "began with another model or other data" in error and said in error
    assert "remove" in error and "inputs.json" in error


def test_model_and_data_that_moved_go_on_by_their_new_names(config_file, model, capsys):
    rows = config_file.parent / "train.jsonl"
    run = config_file.parent / "run"
    assert main([str(config_file), f"model.name={model}", "train.steps=1"]) == 0
    moved = [model.rename(model.with_name("elsewhere")), rows.rename(rows.with_name("rows.jsonl"))]
    names = [f"model.name={moved[0]}", f"data.source={moved[1]}"]
    assert main([str(config_file), *names, "train.steps=2"]) == 0
    assert f"name: {moved[0]}" in (run / "config.yaml").read_text()
    change_weights(moved[0])
    there = moved[0].rename(moved[0].with_name("third"))
    assert main([str(config_file), f"model.name={there}", names[1], "train.steps=3"]) == 1
    assert "model: model.safetensors (changed)" in capsys.readouterr().err
    assert f"name: {moved[0]}" in (run / "config.yaml").read_text()  # what was refused leaves no trace


def test_a_run_without_a_record_of_its_inputs_says_so_and_goes_on(config_file, capsys):
    assert main([str(config_file), "train.steps=1"]) == 0
    (config_file.parent / "run" / "inputs.json").unlink()
    assert main([str(config_file), "train.steps=2"]) == 0
    assert (
        "nobody can tell whether model and data are those that the run began with" in capsys.readouterr().out
    )


def test_a_diffusion_run_refuses_other_rows_too(model, tmp_path, capsys):
    path = tmp_path / "text.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"w{i} ?", "completion": f"w{i}"}) + "\n" for i in range(8))
    )
    (tmp_path / "c.yaml").write_text("")
    arguments = [
        str(tmp_path / "c.yaml"),
        f"run_dir={tmp_path / 'run'}",
        f"model={{name: {model}, dtype: fp32, mask_token: <unk>}}",
        f"data={{source: {path}, max_length: 32}}",
        "train={examples_per_step: 4, token_budget: 64, steps: 1}",
    ]
    assert llada(arguments) == 0
    path.write_text(path.read_text().replace("w3", "w5"))
    assert llada([*arguments, "train.steps=2"]) == 1
    assert "data: rows (changed)" in capsys.readouterr().err


def test_who_saved_a_model_does_not_count_and_blocks_of_a_large_file_do(model, monkeypatch):
    def now():
        return fingerprints(str(model), None, {"data": [{"a": 1, "b": {2, 1}, "c": b"x"}]})

    before, path = now(), model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_version": "9.9"}, indent=8))
    (model / "README.md").write_text("hello")
    assert changes(before, now()) == {}
    monkeypatch.setattr(rl.store.inputs, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(rl.store.inputs, "BLOCK_BYTES", 100)
    before = now()
    change_weights(model)
    assert list(changes(before, now()).values()) == ["model: model.safetensors (changed)"]


def test_a_reward_that_was_edited_is_said_and_goes_on(config_file, monkeypatch, capsys):
    folder = config_file.parent / "code"
    folder.mkdir()
    text = "def half(completions, **_):\n    return [0.5] * len(completions)\n"
    (folder / "own_reward.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    arguments = [str(config_file), "rewards.functions=[{name: 'own_reward:half'}]"]
    assert main([*arguments, "train.steps=1"]) == 0
    (folder / "own_reward.py").write_text(text.replace("0.5", "0.25"))
    assert main([*arguments, "train.steps=2"]) == 0
    out = capsys.readouterr().out
    assert "warning: rewards: own_reward:half (" in out and "since the run began" in out
