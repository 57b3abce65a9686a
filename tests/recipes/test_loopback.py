"""The processes of a run on one machine: who can reach them, and what they send each other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from rl.world import _decode, _encode
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]


def test_two_processes_listen_on_the_loopback_interface_alone(config_file):
    """Every listening socket of the run, and every address it could be reached at."""
    metrics = config_file.parent / "run" / "metrics.jsonl"
    slow = "rewards.functions=[{name: 'toy_rewards:slow'}]"
    command = [sys.executable, "-m", "recipes.cli", "train", str(config_file), slow, "train.steps=200"]
    launcher = subprocess.Popen([*command, "--processes=2"], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: metrics.is_file() or launcher.poll() is not None, "a step is done", 120)
        assert launcher.poll() is None
        processes = psutil.Process(launcher.pid).children(recursive=True)
        found = [c for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    finally:
        launcher.terminate()
        launcher.wait(60)
    assert len(found) >= 2  # the store, and gloo's pairs
    assert {c.laddr.ip for c in found} == {"127.0.0.1"}


def test_what_processes_send_is_json_and_tensors_and_comes_back_whole():
    value = {"a": [1, 2.5, None, True, "x\ud800"], "t": torch.arange(5), "deep": {"f": torch.tensor([0.1])}}
    value |= {"inf": float("inf"), "tiny": 5e-324, "big": 2**70, "pair": (1, 2)}
    found = _decode(_encode(value))
    assert found["t"].tolist() == [0, 1, 2, 3, 4] and found["t"].dtype == torch.int64
    assert found["deep"]["f"].item() == torch.tensor(0.1).item()
    plain = {name: item for name, item in value.items() if name not in ("t", "deep", "pair")}
    assert {name: found[name] for name in plain} == plain and found["pair"] == [1, 2]
    with pytest.raises(TypeError, match="Path cannot go to other processes"):
        _encode({"p": ROOT})


def test_no_pickle_travels_between_processes():
    """torch's *_object functions pickle what they send and unpickle what they get."""
    names = ("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list")
    texts = {
        path: path.read_text()
        for package in ("rl", "recipes", "rollout")
        for path in (ROOT / package).rglob("*.py")
    }
    assert not [(path, name) for path, text in texts.items() for name in names if f"{name}(" in text]
