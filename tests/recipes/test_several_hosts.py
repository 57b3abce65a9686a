"""Processes of several hosts: what they must share is compared before the first step; two agents stand in."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator

from recipes.fit import fit_to_cards
from recipes.program import check_alike, check_replay, first_difference
from rl.config.read import load_config
from tests.vllm_servers import free_port

ROOT = Path(__file__).parents[2]
GOOD = {
    "host": "a",
    "config": {"train.steps": 4, "optimizer.lr": 1e-6},
    "versions": {"torch": "2.11.0", "python": "3.12.1"},
    "sees": True,
    "gpu": "GPU-1",
    "clock": 1000.0,
}
OTHER = GOOD | {"host": "b", "gpu": "GPU-2", "clock": 1059.0}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        (
            {"config": {"train.steps": 5, "optimizer.lr": 1e-6}, "sees": False},  # the first fault alone
            "process 1 on host b has train.steps=5, but process 0 on host a has 4: start every process with "
            "the same file and the same key=value",
        ),
        (
            {"versions": {"torch": "2.11.0", "python": "3.12.1", "peft": "0.18"}},
            "process 1 on host b has peft=0.18, but process 0 on host a has missing: install the same on "
            "every host",
        ),
        (
            {"sees": False},
            "process 1 on host b does not see what process 0 on host a wrote into /runs/1: let run_dir be on "
            "a disk that all hosts share",
        ),
        (
            {"gpu": "GPU-1"},
            "process 1 on host b has the GPU of process 0 on host a (GPU-1): start one process for each GPU "
            "of a host",
        ),
        (
            {"clock": 939.0},
            "process 1 on host b has a clock -61 s off that of process 0 on host a: set it by chrony or ntpd",
        ),
    ],
    ids=["nothing", "config", "versions", "folder", "gpu", "clock"],
)
def test_the_first_difference_is_named(change: dict[str, Any], fault: str | None):
    assert first_difference([GOOD, OTHER | change], "/runs/1") == fault


@dataclass(frozen=True)
class TwoOnOneCpu:
    """Two processes on the CPU of a machine with a GPU, as `accelerate launch --cpu` starts them."""

    accelerator: Accelerator = field(default_factory=lambda: Accelerator(cpu=True))
    size = 2
    is_main = True

    def gather(self, mine: Any) -> list[Any]:
        return [mine, mine]

    def wait(self) -> None: ...


def test_processes_that_leave_a_gpu_alone_do_not_contend_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check_alike(TwoOnOneCpu(), load_config(None, [f"run_dir={tmp_path}"]))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_processes_that_met_other_servers_do_not_train_one_with_replay_and_one_without():
    class WithReplay(TwoOnOneCpu):
        def gather(self, mine: Any) -> list[Any]:
            return [True, mine]

    world = WithReplay()
    check_replay(world, SimpleNamespace(replays=True))  # type: ignore[arg-type]
    check_replay(TwoOnOneCpu(), object())  # type: ignore[arg-type]  # a policy without experts
    words = "process 1 found a server that does not say which experts .* and process 0 found none: start all"
    with pytest.raises(ValueError, match=words):
        check_replay(world, SimpleNamespace(replays=False))  # type: ignore[arg-type]


def test_the_host_with_the_least_memory_decides_what_is_pinned(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The second host's processes may pin 1 byte each; its GPU is the same."""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (80 << 30, 80 << 30))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    config = load_config(
        None, [f"run_dir={tmp_path}", f"model.name={tiny_model_dir}", "memory.optimizer_on_host=true"]
    )

    class OnGpus(TwoOnOneCpu):
        def max(self, values: list[float]) -> list[float]:
            return [max(pair) for pair in zip(values, [-80.0 * 2**30, -80.0 * 2**30, -1.0], strict=True)]

    with pytest.raises(ValueError, match=r"each process would keep .* may take 0\.0"):
        fit_to_cards(config, OnGpus(SimpleNamespace(device=SimpleNamespace(type="cuda"))))  # type: ignore[arg-type]


def agents(config: Path, *own: str) -> list[tuple[int, str]]:
    """(exit code, output) of two agents of torchrun, each with a process; `own` goes to the second one."""
    paths = f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'invariants'}"
    port, environment = free_port(), os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    line += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    started = [
        subprocess.Popen(
            [*line, "--node-rank", str(k), "-m", "recipes.grpo", str(config), *(own if k else ())],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for k in range(2)
    ]
    said = [process.communicate(timeout=280)[0] for process in started]
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


@pytest.mark.rotation
def test_two_agents_train_together_or_are_refused_by_name(tiny_model_dir: Path, tmp_path: Path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"run_dir: {tmp_path / 'run'}\nmodel: {{name: {tiny_model_dir}, dtype: fp32}}\n"
        f"data: {{source: {tmp_path / 'rows.jsonl'}}}\nengine: {{name: transformers}}\n"
        "rewards: {functions: [{name: 'toy_rewards:even_words'}]}\n"
        "train: {steps: 2, prompts_per_step: 2, group_size: 2}\nsampling: {max_completion_length: 8}\n"
    )
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w1 w2"}\n' * 8)
    for code, said in agents(config, "train.steps=3"):
        assert code == 1, said
        assert "has train.steps=3, but process 0 on host" in said
    assert not (tmp_path / "run" / "checkpoints").exists()
    for code, said in agents(config):
        assert code == 0, said
    assert (tmp_path / "run" / "result.json").exists()
