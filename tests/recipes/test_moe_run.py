"""Whole runs of a tiny Qwen3-MoE: routes replayed, a kill in the middle, and engines without routes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from recipes.grpo import main
from rl.store.ledger import Ledger
from rl.store.rows import read_rows
from tests.recipes.conftest import TOYS
from tests.rl.moe.tiny import save
from tests.vllm_engines import needs_vllm, start_vllm


@pytest.fixture
def overrides(tiny_model_dir, tmp_path):
    sizes = {"head_dim": 32, "moe_intermediate_size": 32}  # vLLM's CPU kernels pad nothing of these
    folder = save("qwen3_moe", tmp_path / "moe", tiny_model_dir, **sizes)
    return [f"model.name={folder}", "train.steps=3", "moe.router=train"]


def check_rows(run, *, replays: bool) -> None:
    rows = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert math.isfinite(row["sampler/logprob_gap_max"]) and row["sampler/logprob_gap_max"] < 1e-3
        assert row["policy/grad_norm"] > 0
        assert ("moe/flip_rate" in row) == replays
        if replays:
            assert 0 <= row["moe/flip_rate"] < 0.01
            assert all(0 <= row[f"moe/flip_rate/layer_{i}"] < 0.01 for i in range(4))
            assert 0.6 < row["moe/replayed"] < 1


def test_a_run_replays_the_routes_of_the_transformers_engine(config_file, overrides, capsys):
    assert main([str(config_file), *overrides, "moe.replay=engine"]) == 0
    check_rows(config_file.parent / "run", replays=True)
    assert "mixture of experts: router trained, replay on, balance off" in capsys.readouterr().out
    record = Ledger(config_file.parent / "run").read(0)
    for group in record.groups:
        for completion in group.completions:
            assert completion.routes.shape == (len(completion.token_ids), 4, 2)
            assert completion.routes.dtype == np.int8 and (completion.routes[-1] == -1).all()


VARIANTS = {
    "replay": ([], "router trained, replay on"),
    "gspo": (["moe.replay=none", "loss.name=gspo"], "router trained, replay off"),
    "lora": (["model.lora={r: 16}", "optimizer.lr=1e-5"], "router frozen, replay on"),
    "esft": (["moe.trained_experts=experts.json", "optimizer.weight_decay=0"], "router frozen, replay on"),
}


@pytest.mark.rotation
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_variants_that_the_config_of_mixtures_names_train_experts(
    variant, config_file, overrides, tmp_path, monkeypatch, capsys
):
    settings, said = VARIANTS[variant]
    file = Path("recipes/configs/moe_grpo_gsm8k.yaml").absolute()
    assert all(word in file.read_text() for word in " ".join(settings).split())
    monkeypatch.chdir(tmp_path)
    Path("experts.json").write_text('{"experts": {"0": [0, 1, 2, 3], "3": [4, 5, 6, 7]}}')
    own = [
        "run_dir=run",
        f"data={{source: {tmp_path / 'train.jsonl'}, max_prompt_length: 32}}",
        "model.dtype=fp32",
    ]
    own += ["rewards.functions=[{name: 'toy_rewards:low_words'}]", "train.prompts_per_step=2"]
    own += ["sampling.max_completion_length=8", "engine.name=transformers", overrides[0], "train.steps=3"]
    assert main([str(file), *own, *settings]) == 0
    found = capsys.readouterr().out
    assert said in found and "trained values: routed experts" in found
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 3
    for row in rows:
        assert row["policy/grad_norm"] > 0 and row["sampler/logprob_gap_max"] < 1e-3


@needs_vllm
@pytest.mark.slow
@pytest.mark.rotation
def test_a_vllm_that_returns_no_routes_is_said_or_refused_before_it_starts(config_file, overrides, capsys):
    vllm, run = [*overrides, "engine.name=vllm", "engine.kv_cache_gib=0.1"], config_file.parent / "run"
    assert main([str(config_file), *vllm, "moe.replay=engine"]) == 1
    assert "moe.replay=engine: vLLM on a CPU does not return routes" in capsys.readouterr().err
    assert (run / "engine.log").read_text() == ""
    assert main([str(config_file), *vllm, "run_dir=" + str(run.parent / "second")]) == 0
    check_rows(run.parent / "second", replays=False)
    said = capsys.readouterr().out
    assert "replay off (vLLM on a CPU does not return routes" in said
    assert "warning: the router is trained without replay and without a balance loss" in said


@needs_vllm
@pytest.mark.slow
@pytest.mark.rotation
def test_vllm_itself_refuses_routes_on_a_cpu(overrides):
    folder = Path(overrides[0].removeprefix("model.name="))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.raises(ValueError, match="Model Runner V2"):
        start_vllm(folder, tokenizer, dtype=torch.float32, max_model_len=64, kv_cache_gib=0.1, routes=True)


@pytest.mark.slow
@pytest.mark.rotation
def test_a_killed_run_replays_the_routes_that_its_ledger_holds(config_file, overrides, tmp_path):
    """The engine computes in bf16, so that replayed experts are others than those of the fp32 policy."""
    config = yaml.safe_load(config_file.read_text())
    for override in [*overrides, "engine.dtype=bfloat16", "sampling.max_completion_length=16"]:
        (section, key), value = (
            override.partition("=")[0].split("."),
            yaml.safe_load(override.partition("=")[2]),
        )
        config.setdefault(section, {})[key] = value
    (tmp_path / "killed.yaml").write_text(yaml.safe_dump(config))
    environment = os.environ | {"PYTHONPATH": f"{TOYS.parents[1]}:{TOYS}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOYS / "killed_runs.py"), str(tmp_path / "killed.yaml"), str(tmp_path)]
    subprocess.run([*command, "train:2"], env=environment, check=True, timeout=280)
    assert json.loads((tmp_path / "report.json").read_text()) == {"whole": [0], "train": [-9, 0]}
    weights = [
        load_file(tmp_path / name / "checkpoints" / "step-000003" / "model.safetensors")
        for name in ("whole", "train")
    ]
    assert all(bool((weights[0][n] == weights[1][n]).all()) for n in weights[0])
    whole, resumed = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("whole", "train"))
    # Dead experts are those of a window of steps, which begins anew.
    names = [n for n in whole[1] if n.startswith("moe/") and n != "moe/dead_experts"]
    assert {"moe/flip_rate", "moe/replayed", "moe/flip_rate/layer_3"} <= {*names} and sum(
        row["moe/flip_rate"] for row in whole
    ) > 0
    assert [[row[n] for n in names] for row in whole] == [[row[n] for n in names] for row in resumed]
