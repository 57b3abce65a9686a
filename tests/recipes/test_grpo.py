"""The recipe as a user meets it: a run on the tiny model, and faults that are refused with a sentence."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from recipes.cli import main as cohort
from recipes.grpo import main
from rl.metrics import read_rows

TOYS = Path(__file__).parents[1] / "invariants"


@pytest.fixture
def config_file(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TOYS))
    monkeypatch.setattr(sys, "path", [str(TOYS), *sys.path])
    rows = [{"prompt": f"What is w{i} ?", "answer": f"w{i}"} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "run_dir": str(tmp_path / "run"),
        "model": {"name": str(tiny_model_dir), "dtype": "fp32"},
        "data": {"source": str(tmp_path / "train.jsonl"), "max_prompt_length": 32},
        "sampling": {"max_completion_length": 8},
        "engine": {"name": "transformers"},
        "rewards": {"functions": [{"name": "toy_rewards:low_words"}]},
        "train": {"steps": 2, "prompts_per_step": 2, "group_size": 4, "token_budget": 256},
        "loss": {"kl_coef": 0.0},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every": 0},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_run_leaves_everything_a_user_looks_for(config_file, capsys):
    rows = [{"prompt": f"What is w{i} ?", "answer": f"w{i}"} for i in (3, 70, 71, 72)]
    path = config_file.parent / "heldout.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    heldout = f"evaluation.data={{source: {path}, max_prompt_length: 32}}"
    overrides = [heldout, "evaluation.metric=toy_rewards:low_words", "trackers=[tensorboard]"]
    assert main([str(config_file), *overrides, "evaluation.sampling.max_completion_length=8"]) == 0
    run = config_file.parent / "run"
    result = json.loads((run / "result.json").read_text())
    assert result.keys() >= {"heldout_before", "heldout_after", "n", "seconds", "steps"}
    assert (result["n"], result["steps"]) == (4, 2)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert (run / "checkpoints" / "step-000002" / "model.safetensors").is_file()
    assert "<!doctype html>" in (run / "report.html").read_text().lower()
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["group_size"] == 4
    out = capsys.readouterr().out
    assert "1 of 8 training prompts are held out" in out
    assert "held-out before:" in out and "step 2/2" in out
    assert cohort(["report", str(run), "--out", str(run / "again.html")]) == 0
    assert (run / "again.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stepz=2"], "did you mean steps?"),
        (["rewards.functions=[{name: math}]", "data.columns=[prompt]"], "needs the column 'answer'"),
        (["rewards.functions=[{name: maht}]"], "math"),
        (["data.source=nowhere.jsonl"], "nowhere.jsonl"),
        (["data.prompt_column=question"], "no column 'question'; it has 'prompt', 'answer'"),
        (["data.max_prompt_length=3"], "raise data.max_prompt_length"),
        (["model.name=/no/such/folder"], "/no/such/folder"),
    ],
)
def test_faults_get_a_sentence_and_exit_code_one(config_file, capsys, overrides, message):
    assert main([str(config_file), *overrides]) == 1
    error = capsys.readouterr().err
    assert error.count("cohort:") == 1 and message in error and "Traceback" not in error


def test_a_failing_reward_stops_the_run_and_names_the_fault(config_file, capsys):
    assert main([str(config_file), "rewards.functions=[{name: 'toy_rewards:broken'}]"]) == 1
    error = capsys.readouterr().err
    assert "graders failed on 8 of 8 completions" in error and "no such thing" in error


def test_a_finished_run_can_be_extended_and_not_be_changed(config_file, capsys):
    assert main([str(config_file)]) == 0
    assert main([str(config_file), "train.steps=3"]) == 0
    rows = [json.loads(r) for r in (config_file.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert main([str(config_file), "train.steps=3", "optimizer.lr=0.5"]) == 1
    assert "optimizer.lr: 0.001 there, 0.5 now" in capsys.readouterr().err


def test_a_run_folder_in_use_is_refused(config_file, capsys):
    from rl.durable import RunLock

    with RunLock(config_file.parent / "run"):
        assert main([str(config_file)]) == 1
    assert "run" in capsys.readouterr().err


def test_a_constant_reward_trains_nothing_and_says_so(config_file):
    assert main([str(config_file), "rewards.functions=[{name: 'toy_rewards:constant'}]"]) == 0
    run = config_file.parent / "run"
    rows = [json.loads(r) for r in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(row["groups/without_spread"] == row["groups/all_right"] == 1.0 for row in rows)
    assert all(row["tokens/trained"] == 0 for row in rows)


def test_two_processes_share_one_run(config_file):
    """Over gloo: every prompt once, one record of each step, and a checkpoint that loads."""
    done = subprocess.run(
        [sys.executable, "-m", "recipes.cli", "train", str(config_file), "--processes=2"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = config_file.parent / "run"
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [1, 2]
    ledgers = sorted((run / "ledger").glob("step-*-rank*.jsonl.gz"))
    assert len(ledgers) == 4  # two steps, two processes
    texts = [gzip.decompress(path.read_bytes()).decode() for path in ledgers]
    lines = [json.loads(line) for text in texts for line in text.splitlines()]
    prompts = [line["prompt"]["id"] for line in lines if "prompt" in line]
    assert len(set(prompts)) == len(prompts) == 4
    AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "step-000002")
