"""What may change in a run that goes on, with `--change`, and where that is recorded."""

from __future__ import annotations

import pytest
import yaml

from recipes.cli import main as cohort
from recipes.grpo import main, run
from rl.config import Config
from rl.config.diffusion import DiffusionConfig, TextConfig
from rl.config.environment import EnvironmentConfig
from rl.config.read import flatten
from rl.config.resume import FREE, ON_REQUEST, PLACES
from rl.config.teacher import TeacherConfig
from rl.store.folder import write_config
from rl.store.rows import read_rows


def test_a_learning_rate_changes_when_that_is_asked_for_and_is_recorded(config_file, capsys):
    folder, words = config_file.parent / "run", ["train", str(config_file), "train.steps=3"]
    assert cohort(["train", str(config_file), "checkpoint.every=1"]) == 0
    assert cohort([*words, "optimizer.lr=0.5"]) == 1
    error = capsys.readouterr().err
    assert "optimizer.lr: 0.001 there, 0.5 now" in error and "add --change (change=True in Python)" in error
    assert not (folder / "changes.jsonl").exists()
    assert cohort([*words, "--change", "optimizer.lr=0.5", "checkpoint.every=1"]) == 0
    assert [row["policy/lr"] for row in read_rows(folder / "metrics.jsonl")] == [0.001, 0.001, 0.5]
    rows = sorted(read_rows(folder / "changes.jsonl"), key=lambda row: row["key"])
    assert rows == [
        {"step": 2, "key": "optimizer.lr", "old": 0.001, "new": 0.5},
        {"step": 2, "key": "train.steps", "old": 2, "new": 3},
    ]
    text = (folder / "config.yaml").read_text()
    assert "# after step 2: optimizer.lr 0.001 -> 0.5\n" in text
    assert yaml.safe_load(text)["optimizer"]["lr"] == 0.5
    assert run(folder / "config.yaml", train={"steps": 4})["steps"] == 4  # it goes on by itself now
    assert "# after step 2: optimizer.lr 0.001 -> 0.5\n" in (folder / "config.yaml").read_text()
    assert read_rows(folder / "metrics.jsonl")[-1]["policy/lr"] == 0.5


def test_a_change_is_recorded_only_once_the_start_has_succeeded(config_file, capsys):
    folder, words = config_file.parent / "run", ["train", str(config_file), "checkpoint.every=1"]
    assert cohort([*words, "train.steps=1"]) == 0
    kept = {name: (folder / name).read_bytes() for name in ("config.yaml", "plan.json")}
    rows = (config_file.parent / "train.jsonl").read_bytes()
    (config_file.parent / "train.jsonl").write_bytes(rows.replace(b"w1", b"w9"))
    assert cohort([*words, "--change", "optimizer.lr=0.5", "train.token_budget=300"]) == 1
    assert "began with another model or other data" in capsys.readouterr().err
    assert {name: (folder / name).read_bytes() for name in kept} == kept
    assert not (folder / "changes.jsonl").exists()
    (config_file.parent / "train.jsonl").write_bytes(rows)
    assert cohort([*words, "train.steps=2"]) == 0  # there is nothing to go back from
    assert [row["key"] for row in read_rows(folder / "changes.jsonl")] == ["train.steps"]


@pytest.mark.parametrize(
    "override",
    [
        "train.seed=1",
        "train.group_size=2",
        "loss.name=dapo",
        "optimizer.weight_decay=0.1",
        "model.dtype=bf16",
    ],
)
def test_what_makes_it_another_run_is_refused_with_change_too(config_file, capsys, override):
    assert main([str(config_file), "train.steps=1"]) == 0
    assert main([str(config_file), "--change", "train.steps=2", "optimizer.lr=0.5", override]) == 1
    error = capsys.readouterr().err
    assert override.split("=")[0] + ": " in error and "use another run_dir" in error
    assert "optimizer.lr: 0.001" not in error  # that one could change


def test_the_keys_that_may_change_are_keys():
    """An unknown name would be a rule that never holds."""
    known = {
        *flatten(Config().model_dump(mode="json")),
        *(f"teacher.{key}" for key in TeacherConfig.model_fields),
        *(f"environment.{key}" for key in EnvironmentConfig.model_fields),
        *flatten(DiffusionConfig(data=TextConfig(source="x")).model_dump(mode="json")),
        *(f"evaluation.data.{key}" for key in TextConfig.model_fields),
    }
    assert known >= FREE | ON_REQUEST | PLACES
    assert not FREE & ON_REQUEST and not PLACES & (FREE | ON_REQUEST)


def test_a_config_whose_run_did_no_step_changes_without_a_record(tmp_path):
    for lr in (0.1, 0.2):
        write_config(Config.model_validate({"run_dir": tmp_path, "optimizer": {"lr": lr}}))
    assert not (tmp_path / "changes.jsonl").exists()
    (tmp_path / "checkpoints" / "step-000007").mkdir(parents=True)
    secret = {"functions": [{"name": "math", "options": {"api_key": "hunter2"}}]}
    write_config(Config.model_validate({"run_dir": tmp_path, "rewards": secret}))
    text = (tmp_path / "changes.jsonl").read_text()
    assert "optimizer.lr" in text and '"step": 7' in text and "hunter2" not in text


def test_weights_may_be_split_otherwise_where_that_is_left_to_the_machine(config_file, capsys):
    assert cohort(["train", str(config_file), "train.sharding=full"]) == 0
    assert "train.sharding=full: one process holds all weights" in capsys.readouterr().out
    assert cohort(["train", str(config_file), "train.steps=3"]) == 0
    assert cohort(["train", str(config_file), "train.steps=4", "train.sharding=none"]) == 1
    assert "train.sharding: 'auto' there, 'none' now" in capsys.readouterr().err
    assert cohort(["train", str(config_file), "train.steps=4", "train.sharding=none", "--change"]) == 0
