"""RL of a diffusion model as a user meets it: the recipe of every run, on a tiny model and a toy reward."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from recipes.diffusion_rl import check_canvas
from recipes.grpo import main
from rl.config.diffusion_rl import MaskedRunConfig
from rl.config.read import load_config
from rl.diffusion.model import load_diffusion_model
from rl.store.ledger import Ledger
from rl.store.rows import read_rows
from tests.diffusion import killed_run

ROOT = Path(__file__).parents[2]
TOYS = ROOT / "tests" / "invariants"


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
        "diffusion": {"mask_token": "<unk>", "block_length": 4},
        "rewards": {"functions": [{"name": "toy_rewards:low_words"}]},
        "train": {"steps": 12, "prompts_per_step": 4, "group_size": 8, "token_budget": 2048},
        "loss": {"kl_coef": 0.0, "sampler_correction": None},
        "optimizer": {"lr": 3e-3},
        "checkpoint": {"every": 0},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


METHODS = {
    "diffu-GRPO": ["diffusion.estimator.name=one_step", "loss.name=bnpo", "advantage.name=centered"],
    "wd1": ["diffusion.estimator.name=one_step", "loss.name=reinforce", "advantage.name=wd1"],
    "ESPO": ["diffusion.estimator.num_draws=2", "loss.kl_coef=0.001", "loss.kl_estimator=k2"],
    "SPG": ["diffusion.estimator={name: sandwich, num_draws: 2}", "loss.name=reinforce"],
    "TraceRL": ["diffusion.estimator.name=trace", "loss.sampler_correction={}", "train.num_epochs=2"],
    "JustGRPO": [
        "diffusion.estimator={name: trace, max_canvases: 4}",
        "diffusion.block_length=1",
        "loss.sampler_correction={}",
    ],
}


@pytest.mark.parametrize("method", METHODS)
def test_reward_rises(config_file, method):
    """Share of words below w40 that a random model writes: 0.4 at first."""
    assert main([str(config_file), *METHODS[method]]) == 0
    rewards = [row["reward/mean"] for row in read_rows(config_file.parent / "run" / "metrics.jsonl")]
    assert len(rewards) == 12
    assert rewards[0] < 0.5
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.15


@pytest.mark.rotation("split weights")
@pytest.mark.parametrize("adapter", [[], ["model.lora={r: 4}"]])
def test_two_processes_that_split_the_weights_train_as_one_does(config_file, adapter):
    """One repeats their steps from the groups that they recorded, and goes on from their checkpoint."""
    run, again = config_file.parent / "run", config_file.parent / "again"
    words = [*METHODS["ESPO"], "train.sharding=full", "train.steps=2", "optimizer.lr=1e-4", *adapter]
    two = [sys.executable, "-m", "recipes.cli", "train", str(config_file), *words, "--processes", "2"]
    path = os.pathsep.join([str(ROOT), str(TOYS)])
    assert subprocess.run(two, cwd=ROOT, timeout=300, env=os.environ | {"PYTHONPATH": path}).returncode == 0
    shutil.copytree(run, again, ignore=shutil.ignore_patterns("checkpoints", "result.json"))
    assert main([str(config_file), *words, f"run_dir={again}"]) == 0
    ours, theirs = (weights_in(r / "checkpoints" / "step-000002") for r in (run, again))
    first = {n: torch.zeros(1) for n in ours if "lora_B" in n} or weights_in(model_of(config_file))
    moved = sum((ours[n] - first[n]).double().square().sum() for n in first) ** 0.5
    assert ours.keys() == theirs.keys() and moved > 1e-4
    assert sum((ours[n] - theirs[n]).double().square().sum() for n in ours) ** 0.5 <= 1e-3 * moved
    assert main([str(config_file), *words, "train.steps=3"]) == 0
    rows = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[2]["sync/canary_gap_max"] < 1e-4


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model or an adapter, in one file or in several."""
    files = folder.glob("*model*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def model_of(config_file: Path) -> Path:
    return Path(yaml.safe_load(config_file.read_text())["model"]["name"])


def test_a_run_leaves_what_every_run_leaves(config_file, capsys):
    rows = [{"prompt": f"What is w{i} ?", "answer": f"w{i}"} for i in (3, 70, 71, 72)]
    path = config_file.parent / "heldout.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        f"evaluation.data={{source: {path}, max_prompt_length: 32}}",
        "evaluation.metric=toy_rewards:low_words",
        "evaluation.sampling={max_completion_length: 16, temperature: 0}",
        "train.steps=2",
        "memory.engine_sleeps=true",
    ]
    assert main([str(config_file), *overrides]) == 0
    run = config_file.parent / "run"
    assert json.loads((run / "result.json").read_text()).keys() >= {"heldout_before", "heldout_after"}
    step = Ledger(run).read(1)
    assert step is not None
    completion = step.groups[0].completions[0]
    assert len(completion.facts["trace"]["steps"]) == 8
    assert completion.behavior_logprobs == []
    out = capsys.readouterr().out
    assert "held-out after:" in out and "memory.engine_sleeps has no effect" in out
    assert '<figure class="denoising"' in (run / "report.html").read_text()
    saved = run / "checkpoints" / "step-000002"
    assert json.loads((saved / "config.json").read_text())["architectures"] == ["MaskedDiffusionLM"]
    load_diffusion_model(str(saved))


@pytest.mark.parametrize("method", ["ESPO", "JustGRPO"])
def test_a_stopped_and_a_killed_run_end_like_an_undisturbed_one(config_file, method):
    """Same weights bit for bit, with masks, replies and rewards of the steps in between."""
    whole, parts, killed = (str(config_file.parent / name) for name in ("whole", "parts", "killed"))
    keys = [*METHODS[method], "checkpoint.every=2", "train.num_epochs=2", "train.steps=4"]
    assert main([str(config_file), *keys, f"run_dir={whole}"]) == 0
    assert main([str(config_file), *keys, f"run_dir={parts}", "train.steps=2"]) == 0
    assert main([str(config_file), *keys, f"run_dir={parts}"]) == 0
    command = [sys.executable, killed_run.__file__, "recipes.grpo", "3", str(config_file), *keys]
    done = subprocess.run([*command, f"run_dir={killed}"], timeout=200)
    assert done.returncode == -signal.SIGKILL
    assert main([str(config_file), *keys, f"run_dir={killed}"]) == 0
    file = "checkpoints/step-000004/model.safetensors"
    expected = load_file(f"{whole}/{file}")
    for run in (parts, killed):
        found = load_file(f"{run}/{file}")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_sampling_ahead_trains_on_traces(config_file):
    """A step ahead, corrected by what the sampler drew from."""
    keys = [*METHODS["TraceRL"], "train.max_staleness=1", "train.steps=3"]
    assert main([str(config_file), *keys]) == 0
    assert len(read_rows(config_file.parent / "run" / "metrics.jsonl")) == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampling.max_completion_length=10"], "use gen_length=8 or 12, or block_length in [1, 2, 5, 10]"),
        (["sampling.max_completion_length=600"], "has 512 positions; lower sampling.max_completion_length"),
        (["diffusion.mask_token=<mask>"], "cohort: diffusion.mask_token='<mask>' is not in the vocabulary"),
        (["diffusion.remasking=best"], "low_confidence"),
        (["diffusion.estimator.draws=2"], "did you mean num_draws?"),
    ],
)
def test_faults_get_a_sentence_and_exit_code_one(config_file, capsys, overrides, message):
    assert main([str(config_file), *overrides]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "configs").glob("llada_rl_*.yaml")))
def test_the_recipes_configs_are_valid(path):
    config = load_config(path)
    assert isinstance(config, MaskedRunConfig)
    check_canvas(config)
