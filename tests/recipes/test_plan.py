"""`cohort plan` judges the config that it is given: what fits exits with 0, and its advice fits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from recipes.cli import main as cohort

VLLM = ["engine.name=auto", "engine.gpu_memory_utilization=0.5"]


def test_a_config_that_fits_says_so_and_its_parts_are_what_it_takes(config_file, capsys):
    assert cohort(["plan", str(config_file), "--gpu-gib", "24", *VLLM]) == 0
    out = capsys.readouterr().out
    # Half of 24 GiB is the engine's, whatever a tiny model needs; 3 GiB of it are its overhead.
    assert gib(out, "engine reserve") == pytest.approx(12 - 3, abs=0.05)
    assert gib(out, "predicted") == pytest.approx(12 + gib(out, "overhead") + 1.0, abs=0.1)
    assert "\nfits: " in out


def test_an_engine_that_reserves_the_gpu_does_not_fit_and_the_advice_does(config_file, capsys):
    words = ["plan", str(config_file), "--gpu-gib", "24", *VLLM[:1], "engine.gpu_memory_utilization=0.9"]
    assert cohort(words) == 1
    out = capsys.readouterr().out
    assert "does not fit: 24.1 GiB, and 22.1 may be filled; fits: train.token_budget=" in out
    assert cohort([*words, *out.split("fits: ")[-1].split()]) == 0
    assert "\nfits: " in capsys.readouterr().out


def test_the_transformers_engine_reserves_nothing(config_file, capsys):
    assert cohort(["plan", str(config_file), "--gpu-gib", "24", "engine.gpu_memory_utilization=0.9"]) == 0
    out = capsys.readouterr().out
    assert "engine reserve" not in out and "gpu_memory_utilization" not in out


def test_where_one_row_is_too_much_no_budget_is_advised(config_file, capsys):
    assert (
        cohort(["plan", str(config_file), "--gpu-gib", "5", *VLLM, "model.gradient_checkpointing=true"]) == 1
    )
    out = capsys.readouterr().out
    assert "no train.token_budget fits, as a prompt and its completion may have 40 tokens" in out
    assert "train.token_budget=" not in out
    assert "use model.lora={r: 16}, a smaller sampling.max_completion_length or" in out


def test_a_share_below_the_engines_parts_is_named(config_file, capsys):
    words = ["plan", str(config_file), "--gpu-gib", "24", *VLLM[:1], "engine.gpu_memory_utilization=0.1"]
    assert cohort(words) == 0
    assert "engine.gpu_memory_utilization=0.1 is less than the engine's parts" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["0", "-3", "nan", "inf"])
def test_a_gpu_without_memory_is_refused(config_file, capsys, size):
    assert cohort(["plan", str(config_file), "--gpu-gib", size]) == 1
    assert f"--gpu-gib {size} is no GPU's memory" in capsys.readouterr().err


def test_a_diffusion_model_is_not_predicted(capsys):
    file = Path(__file__).parents[2] / "recipes" / "configs" / "llada_rl_chain_sum.yaml"
    assert cohort(["plan", str(file), "--gpu-gib", "80"]) == 1
    assert "a diffusion model, whose memory is not predicted" in capsys.readouterr().err


def gib(out: str, name: str) -> float:
    (found,) = re.findall(rf"^{name} +([\d.]+) GiB", out, re.MULTILINE)
    return float(found)
