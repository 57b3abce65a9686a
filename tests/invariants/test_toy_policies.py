"""The seams hold what they promise: policies that the library has never seen train, are killed and go on.

Each is a file of at most 80 lines in tests/toys; nothing of the library knows them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
TOYS = {"in_step": 2, "redraws": 1, "follows": 1}  # name -> processes
TIMES = ("time/", "tokens/per_second", "memory/")


def start(name: str, run_dir: Path, *, kill_at: int = -1) -> list[int]:
    """Exit codes of the processes of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    number = TOYS[name]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number)}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.toys.run", name, str(run_dir), str(kill_at)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
            | ({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if number > 1 else {}),
        )
        for rank in range(number)
    ]
    try:
        return [process.wait(120) for process in running]
    finally:
        for process in running:
            process.kill()


def outcome(run_dir: Path) -> tuple[dict, list[dict]]:
    weights = load_file(run_dir / "checkpoints" / "step-000006" / "model.safetensors")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return weights, [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


@pytest.mark.parametrize("name", TOYS)
def test_a_policy_of_its_own_trains_is_killed_and_goes_on_bit_for_bit(name, tmp_path):
    assert set(start(name, tmp_path / "whole")) == {0}
    assert set(start(name, tmp_path / "cut", kill_at=3)) == {-signal.SIGKILL}
    assert len(list((tmp_path / "cut" / "checkpoints").glob("step-*"))) == 1
    assert set(start(name, tmp_path / "cut")) == {0}
    (weights, rows), (again, rows_again) = outcome(tmp_path / "whole"), outcome(tmp_path / "cut")
    assert weights.keys() == again.keys() and rows == rows_again
    assert all((weights[key] == again[key]).all() for key in weights)
    assert weights["table"].abs().max() > 0.1  # it learned something
    own = [row[key] for row in rows for key in row if key.startswith("toy/")]
    assert len(own) >= 4  # a step without any signal says nothing
    if name == "in_step":
        assert set(own) == {2.0}
    if name == "redraws":
        assert 0.1 < sum(own) / len(own) < 0.5


def test_each_toy_is_a_small_file():
    assert {n: len((ROOT / f"tests/toys/{n}.py").read_text().splitlines()) <= 80 for n in TOYS} == (
        dict.fromkeys(TOYS, True)
    )
