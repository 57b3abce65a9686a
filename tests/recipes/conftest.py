"""A config of a short run on the tiny model with the toy rewards."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml

ROOT = Path(__file__).parents[2]
TOYS = Path(__file__).parents[1] / "invariants"
REWARDS = """
import re

def even(completions, **columns):
    \"\"\"1 if the first w-word has an even number, None without any.\"\"\"
    found = [re.search(r"w(\\d+)", c[-1]["content"]) for c in completions]
    return [w and float(int(w[1]) % 2 == 0) for w in found]

def breaks(completions, answer, **columns):
    \"\"\"Fails on one prompt.\"\"\"
    if answer[0] == "w5":
        raise OSError("no such service")
    return even(completions)
"""


@pytest.fixture
def config_file(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TOYS))
    monkeypatch.setattr(sys, "path", [str(TOYS), *sys.path])
    write_rows(tmp_path / "train.jsonl", range(8))
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


@pytest.fixture
def heldout(config_file) -> list[str]:
    """Overrides that evaluate on one training prompt and three others, before and after."""
    path = write_rows(config_file.parent / "heldout.jsonl", (3, 70, 71, 72))
    return [
        f"evaluation.data={{source: {path}, max_prompt_length: 32}}",
        "evaluation.metric=toy_rewards:low_words",
        "evaluation.sampling.max_completion_length=8",
    ]


def write_rows(path: Path, numbers) -> Path:
    rows = [{"prompt": f"What is w{i} ?", "answer": f"w{i}"} for i in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """Graders find the toy rewards; the hub's cache is a folder of the module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TOYS))
        patch.setattr(sys, "path", [str(TOYS), *sys.path])
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        yield patch


@pytest.fixture
def traces_config(tiny_model_dir, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    (tmp_path / "even_rewards.py").write_text(REWARDS)
    config = {
        "run_dir": str(tmp_path / "traces"),
        "model": {"name": str(tiny_model_dir), "dtype": "fp32"},
        "data": {"source": str(write_rows(tmp_path / "train.jsonl", range(12)))},
        "sampling": {
            "max_completion_length": 24,
            "stop": ["+", "-", "=", ".", "?", "What", "is", "the"],
        },
        "engine": {"name": "transformers"},
        "rewards": {"functions": [{"name": "even_rewards:even"}]},
        "sample": {"num_samples": 8, "prompts_per_record": 3, "seed": 5},
    }
    path = tmp_path / "traces.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
