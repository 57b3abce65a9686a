"""Whole runs of the recipe with `RolloutSource`: on-policy at staleness 0, and two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import recipes.grpo
from recipes.kinds import KINDS
from recipes.sources import dynamic_sampling, group_sampling
from rl.config import Config
from rl.store.ledger import Ledger
from rl.store.rows import read_rows
from tests.rollout.on_policy import OnPolicySource
from tests.rollout.protocol_engine import ProtocolEngine

HERE = Path(__file__).parent
STEPS = 4


@pytest.fixture
def config_file(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{HERE.parents[1]}:{HERE}")
    monkeypatch.setattr(sys, "path", [str(HERE), *sys.path])
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"What is w{i} ?"}) + "\n" for i in range(10)))
    config = {
        "model": {"name": str(tiny_model_dir), "dtype": "fp32"},
        "data": {"source": str(data), "max_prompt_length": 32},
        "sampling": {"max_completion_length": 8},
        "engine": {"name": "transformers"},
        "rewards": {"functions": [{"name": "toy_rewards:even_words"}]},
        "train": {"steps": STEPS, "prompts_per_step": 4, "group_size": 3, "token_budget": 256},
        "advantage": {"dynamic_sampling": {"max_rounds": 3}},
        "loss": {"kl_coef": 0.0},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every": 0},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def records(run_dir: Path) -> list:
    """What the ledger holds, the graders' clock left out."""
    found = []
    for step in range(STEPS):
        record = Ledger(run_dir).read(step)
        assert record is not None
        for group in (*record.groups, *record.rejected):
            group.rewards = [replace(reward, elapsed_ms=0.0) for reward in group.rewards]
        found.append(record)
    return found


def test_without_staleness_a_run_is_the_on_policy_run_bit_for_bit(config_file, monkeypatch):
    def on_policy_source(config, world, engine, scorer, stream, ends, phases):
        sampling = group_sampling(config, ends)
        return OnPolicySource(engine, scorer, stream, sampling, dynamic=dynamic_sampling(config), team=world)

    folders = [config_file.parent / name for name in ("on_policy", "rollout")]
    assert recipes.grpo.main([str(config_file), f"run_dir={folders[1]}"]) == 0
    monkeypatch.setattr(recipes.grpo, "make_source", on_policy_source)
    assert recipes.grpo.main([str(config_file), f"run_dir={folders[0]}"]) == 0
    assert records(folders[0]) == records(folders[1])
    assert sum(record.counts["replaced"] for record in records(folders[1])) > 0
    for file in ("model.safetensors", "trainer/optimizer.safetensors"):
        a, b = (load_file(folder / "checkpoints" / f"step-{STEPS:06d}" / file) for folder in folders)
        assert all(bool((a[name] == b[name]).all()) for name in a), file


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_run_asks_no_more_of_its_engine_than_the_protocol_names(config_file, monkeypatch, max_staleness):
    """Another class around the same engine: the same groups and the same weights, bit for bit."""
    folders = [config_file.parent / name for name in ("own", "theirs")]
    causal = KINDS[Config]
    wrapped = replace(causal, engine=lambda *given: ProtocolEngine(causal.engine(*given)))
    arguments = [str(config_file), f"train.max_staleness={max_staleness}"]
    assert recipes.grpo.main([*arguments, f"run_dir={folders[0]}"]) == 0
    monkeypatch.setitem(KINDS, Config, wrapped)
    assert recipes.grpo.main([*arguments, f"run_dir={folders[1]}"]) == 0
    assert records(folders[0]) == records(folders[1])
    weights = [load_file(f / "checkpoints" / f"step-{STEPS:06d}" / "model.safetensors") for f in folders]
    assert all(bool((weights[0][name] == weights[1][name]).all()) for name in weights[0])


def test_two_processes_sample_ahead_together(config_file):
    """Over gloo, with dynamic sampling that leaves the processes uneven, and a second start that goes on."""
    run = config_file.parent / "run"
    command = [sys.executable, "-m", "recipes.cli", "train", str(config_file), f"run_dir={run}"]
    for steps in (2, STEPS):
        done = subprocess.run(
            [*command, "train.max_staleness=2", f"train.steps={steps}", "--processes=2"],
            cwd=HERE.parents[1],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    rows = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert max(row["staleness/max"] for row in rows) >= 1 and rows[0]["staleness/max"] == 0
    consumed = Counter()
    for step in range(STEPS):
        shares = Ledger(run, 0, 2).read_all(step)
        assert shares is not None and [len(share.groups) for share in shares] == [2, 2]
        assert shares[0].cursor_after == shares[1].cursor_after
        consumed.update(g.prompt.id for share in shares for g in (*share.groups, *share.rejected))
    least = min(consumed[f"train/{i:06d}"] for i in range(10))
    assert consumed.total() >= 4 * STEPS and max(consumed.values()) - least <= 1
