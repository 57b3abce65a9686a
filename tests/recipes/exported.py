"""Runs to export: tiny models on disk and in a cache of the hub, trained so that their log-probs move."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants

from recipes.grpo import run
from tests.recipes.conftest import write_rows

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_NAME = "house/tiny"
CARD = "---\nlicense: mit\n---\n# tiny\n"
LORA = {"r": 2, "alpha": 8, "target_modules": ["q_proj", "o_proj", "down_proj"]}


def put_into_cache(folder: Path, name: str) -> str:
    """A model in the cache of the hub, as if it had been downloaded; returns its name."""
    root = Path(huggingface_hub.constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}")
    shutil.copytree(folder, root / "snapshots" / COMMIT)
    (root / "snapshots" / COMMIT / "README.md").write_text(CARD)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    return name


def train(folder: Path, model: dict, **more) -> Path:
    """The folder of a run of two steps that moves its weights and saves both."""
    write_rows(folder / "train.jsonl", range(8))
    write_rows(folder / "heldout.jsonl", (70, 71, 72))
    data = {"max_prompt_length": 32}
    tree = {
        "run_dir": str(folder / "run"),
        "model": {"dtype": "fp32", **model},
        "data": {"source": str(folder / "train.jsonl"), **data},
        "sampling": {"max_completion_length": 8},
        "engine": {"name": "transformers"},
        "rewards": {"functions": [{"name": "toy_rewards:low_words"}]},
        "train": {"steps": 2, "prompts_per_step": 2, "group_size": 4, "token_budget": 256},
        "loss": {"kl_coef": 0.0},
        "optimizer": {"lr": 0.05 if model.get("lora") else 1e-3},
        "evaluation": {
            "data": {"source": str(folder / "heldout.jsonl"), **data},
            "metric": "toy_rewards:low_words",
            "sampling": {"max_completion_length": 8},
        },
        "checkpoint": {"every": 1},
    }
    run(tree | more)
    return folder / "run"
