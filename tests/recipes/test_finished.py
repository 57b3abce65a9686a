"""A run that is done says so at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipes.finished import is_finished
from recipes.grpo import main
from rl.config.read import load_config
from rl.store.folder import read_result

ROOT = Path(__file__).parents[2]


def test_a_finished_run_says_so_before_anything_is_loaded(config_file, heldout, capsys):
    run = config_file.parent / "run"
    assert main([str(config_file), *heldout]) == 0
    before = (run / "result.json").read_text()
    capsys.readouterr()
    assert main([str(config_file), *heldout, "checkpoint.keep=3"]) == 0
    assert capsys.readouterr().out.startswith("already finished: 2 of 2 steps, held-out ")
    code = "import sys, time; from recipes.cli import main; main(); print('torch' in sys.modules)"
    began = time.monotonic()
    command = [sys.executable, "-c", code, "train", str(config_file), *heldout]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ})
    assert done.stdout.splitlines()[-1] == "False" and "already finished: 2 of 2 steps" in done.stdout
    assert time.monotonic() - began < 60  # 1 s on an idle machine
    assert (run / "result.json").read_text() == before


@pytest.mark.parametrize(
    ("result", "overrides", "expected"),
    [
        ({"steps": 2}, [], True),
        ({"steps": 2}, ["train.steps=1", "rewards.workers=2"], True),
        ({"steps": 2}, ["train.steps=3"], False),
        ({"steps": 2}, ["optimizer.lr=0.5"], False),
        ({"steps": 2}, ["data.source=other.jsonl"], False),
        ({"steps": "2"}, [], False),
        ({}, [], False),
    ],
)
def test_it_is_finished_if_all_steps_of_the_same_settings_are_done(
    config_file, result, overrides, expected, capsys
):
    config = load_config(config_file)
    (config.run_dir / "checkpoints" / "step-000002").mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(config_file.read_text())
    (config.run_dir / "result.json").write_text(json.dumps(result))
    assert is_finished(load_config(config_file, overrides)) is expected
    assert bool(capsys.readouterr().out) is expected


def test_a_missing_number_config_or_checkpoint_is_left_to_a_start(config_file, heldout):
    config = load_config(config_file, heldout)
    checkpoint = config.run_dir / "checkpoints" / "step-000002"
    checkpoint.mkdir(parents=True)
    result = {"steps": 2, "heldout_before": 0.5, "heldout_after": None}
    (config.run_dir / "result.json").write_text(json.dumps(result))
    assert not is_finished(config)
    (config.run_dir / "config.yaml").write_text(config.model_dump_json())
    assert not is_finished(config)
    (config.run_dir / "result.json").write_text(json.dumps({**result, "heldout_after": 1.0}))
    assert is_finished(config)
    checkpoint.rmdir()
    assert not is_finished(config)


@pytest.mark.parametrize("written", ["checkpoints/step-000002", "/gone/run/checkpoints/step-000002"])
def test_the_checkpoint_of_a_result_is_in_the_folder_that_is_read(tmp_path, written):
    """Even in a run folder that was moved, and in a file of a version that wrote whole paths."""
    (tmp_path / "result.json").write_text(json.dumps({"steps": 2, "checkpoint": written}))
    assert read_result(tmp_path)["checkpoint"] == str(tmp_path / "checkpoints" / "step-000002")
