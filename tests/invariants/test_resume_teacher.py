"""Law 6 with a teacher: a distilling run that was killed ends bitwise as an undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

HERE = Path(__file__).parent
STEPS = 6
TIMES = ("time/", "sync/seconds", "tokens/per_second", "memory/")


def start(script: list[str], timeout_s: int = 240) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{HERE.parents[1]}:{HERE}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["sampled", "reverse", "self"])
def test_a_killed_distillation_goes_on_bit_for_bit(tiny_model_dir, other_model_dir, tmp_path, kind):
    """Without rewards, each group of completions samples its teacher's words more often as it goes; self: the
    policy teaches itself by top-k ids, and reads a demonstration for that.
    """
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(
            json.dumps({"prompt": f"What is w{i} ?", "solution": f"w{9 * i % 17} w{i}"}) + "\n"
            for i in range(10)
        )
    )
    teacher = tmp_path / "teacher"
    teacher.symlink_to(other_model_dir)
    config = {
        "model": {"name": str(tiny_model_dir), "dtype": "fp32"},
        "teacher": {"name": str(teacher), "dtype": "fp32", "divergence": kind, "top_k": 8}
        if kind != "self"
        else {"demonstration": "solution", "divergence": "forward"},
        "data": {"source": str(data), "max_prompt_length": 32},
        "sampling": {"max_completion_length": 10},
        "engine": {"name": "transformers"},
        "rewards": {"functions": []},
        "train": {"steps": STEPS, "prompts_per_step": 4, "group_size": 4, "token_budget": 64},
        "loss": {"kl_coef": 0.0},
        "optimizer": {"lr": 3e-3},
        "checkpoint": {"every": 2},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    done = start([str(HERE / "killed_runs.py"), str(file), str(tmp_path), "train:4"])
    assert done.returncode == 0, done.stdout + done.stderr
    codes = json.loads((tmp_path / "report.json").read_text())
    assert codes == {"whole": [0], "train": [-signal.SIGKILL, 0]}
    whole, resumed = (
        load_file(tmp_path / which / "checkpoints" / f"step-{STEPS:06d}" / "model.safetensors")
        for which in ("whole", "train")
    )
    assert all(bool((whole[key] == resumed[key]).all()) for key in whole)
    rows = [
        [
            {k: v for k, v in json.loads(line).items() if not k.startswith(TIMES)}
            for line in (tmp_path / which / "metrics.jsonl").read_text().splitlines()
        ]
        for which in ("whole", "train")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == STEPS
    kls = [row["teacher/kl"] for row in rows[0]]
    assert (0.1 if kind != "self" else 0.0) < kls[-1] < 0.8 * kls[0]
    assert ("teacher/tail" in rows[0][0]) == (kind != "sampled")
    assert not {"reward/abstained", "groups/without_spread"} & rows[0][0].keys()
    assert "teacher/kl" in (tmp_path / "whole" / "report.html").read_text()
    again = ["-m", "recipes.cli", "train", str(file), f"run_dir={tmp_path / 'train'}", "train.steps=8"]
    if kind == "reverse":
        teacher.unlink()
        teacher.symlink_to(tiny_model_dir)
    elif kind == "self":  # a model of its own in place of the policy
        again.append(f"teacher.name={teacher}")
    else:
        return
    refused = start(again)
    assert refused.returncode != 0
    assert "began with another model" in refused.stderr
    changed = "model.safetensors (changed)" if kind == "reverse" else "config.json (new)"
    assert f"teacher: {changed}" in refused.stderr
