"""On one GPU and on several: a run's exit code says how it ended, and nothing complains of shared memory.

python -m pytest tests/gpu/test_ends.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from rl.store.rows import read_rows
from tests.bench.workload import Workload, write_model
from tests.vllm_engines import needs_vllm

COUNTS = [n for n in (1, 2, 4) if n <= max(1, torch.cuda.device_count())]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    needs_vllm,
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), Workload(shape="0.5b"))


def command(launcher: str, processes: int, config: Path) -> list[str]:
    if launcher == "cohort":
        return [sys.executable, "-m", "recipes.cli", "train", str(config), "--processes", str(processes)]
    several = ["--multi_gpu"] if processes > 1 else []
    start = ["-m", "accelerate.commands.launch", "--num_processes", str(processes), *several]
    return [sys.executable, *start, "--mixed_precision", "no", "-m", "recipes.grpo", str(config)]


def started(launcher: str, processes: int, model: Path, folder: Path, steps: int) -> subprocess.Popen[str]:
    workload = Workload(shape="0.5b", max_length=64, steps=steps)
    workload.export()
    config = {
        "run_dir": str(folder / "run"),
        "model": {"name": str(model)},
        "data": {"source": "tests.bench.workload:rows", "max_prompt_length": workload.prompt_length},
        "sampling": {"max_completion_length": 64, "stop_token_ids": workload.stop_ids},
        "engine": {"enforce_eager": True},
        "rewards": {"functions": [{"name": "tests.bench.workload:coin"}]},
        "train": {"steps": steps, "prompts_per_step": 8, "group_size": 4},
        "checkpoint": {"every": 0},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return subprocess.Popen(
        command(launcher, processes, path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )


def check_quiet(out: str, err: str) -> None:
    for word in ("CudaIPC", "Producer process", "destroy_process_group", "Traceback", "SIGSEGV"):
        assert word not in out + err, (out + err)[-3000:]


@pytest.mark.parametrize("launcher", ["cohort", "accelerate"])
@pytest.mark.parametrize("processes", COUNTS)
def test_a_run_that_is_done_ends_with_0(launcher, processes, model, tmp_path):
    run = started(launcher, processes, model, tmp_path, steps=2)
    out, err = run.communicate(timeout=240)
    assert run.returncode == 0, (out + err)[-3000:]
    check_quiet(out, err)
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 2


@pytest.mark.parametrize("processes", COUNTS)
def test_a_run_that_is_asked_to_stop_ends_with_128_and_the_signal(processes, model, tmp_path):
    run = started("cohort", processes, model, tmp_path, steps=100_000)
    rows, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 200
    while not rows.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=100)
    assert run.returncode == 128 + signal.SIGTERM, (out + err)[-3000:]
    check_quiet(out, err)


def test_a_core_that_died_leaves_no_shared_memory_to_a_destructor(model, tmp_path):
    run = started("cohort", 1, model, tmp_path, steps=100_000)
    rows, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 200
    while not rows.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    names = {p: Path(f"/proc/{p}/comm") for p in os.listdir("/proc") if p.isdigit()}
    cores = [int(p) for p, path in names.items() if path.exists() and "VLLM" in path.read_text()]
    assert cores
    for core in cores:
        os.kill(core, signal.SIGKILL)
    out, err = run.communicate(timeout=100)
    assert run.returncode == 1, (out + err)[-3000:]
    assert "CudaIPC" not in err and "Producer process" not in err
