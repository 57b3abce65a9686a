"""A config of a short run on the tiny model with the toy rewards."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml

TOYS = Path(__file__).parents[1] / "invariants"


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
