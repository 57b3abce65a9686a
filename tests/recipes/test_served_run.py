"""Whole runs that sample from real vLLM servers: as in process, killed beside living servers, and refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rl.store.folder import run_name
from rl.store.ledger import Ledger
from rollout.vllm.control import Control
from rollout.vllm.lock import make_token, read_token
from tests.vllm_engines import needs_vllm
from tests.vllm_servers import ServerProcess, free_port
from tests.waiting import wait_until

HERE = Path(__file__).parent
pytestmark = [needs_vllm, pytest.mark.timeout(900)]
STEPS = 4


@pytest.fixture(scope="module")
def folder(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a model with heads of 32, for which vLLM's CPU attention has a kernel, and rows."""
    out = tmp_path_factory.mktemp("served")
    config = LlamaConfig.from_pretrained(tiny_model_dir, hidden_size=64, num_attention_heads=2)
    config.num_key_value_heads, config.head_dim = 1, 32
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(out / "model")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(out / "model")
    rows = [{"prompt": f"What is w{i} + w{i + 1} ?"} for i in range(40)]
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_token(out / "token")
    return out


@pytest.fixture(scope="module")
def servers(folder: Path) -> Iterator[list[ServerProcess]]:
    found = [ServerProcess(folder / "model", folder / "token", folder / "server.log") for _ in range(2)]
    try:
        yield [server.wait() for server in found]
    finally:
        for server in found:
            server.kill()


def config_of(folder: Path, engine: dict[str, Any], name: str) -> Path:
    config = {
        "run_dir": str(folder / name),
        "model": {"name": str(folder / "model"), "dtype": "fp32"},
        "data": {"source": str(folder / "rows.jsonl"), "max_prompt_length": 32},
        "sampling": {"max_completion_length": 32},
        "engine": engine,
        "rewards": {"functions": [{"name": "toy_rewards:even_words"}]},
        "train": {"steps": STEPS, "prompts_per_step": 4, "group_size": 4, "token_budget": 512},
        "loss": {"kl_coef": 0.0},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every": 1, "keep": STEPS},
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def start(config: Path, stdout: Any = subprocess.PIPE) -> subprocess.Popen[str]:
    paths = f"{HERE.parents[1]}:{HERE.parent / 'invariants'}"
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "recipes.grpo", str(config)]
    return subprocess.Popen(command, env=environment, stdout=stdout, stderr=subprocess.STDOUT, text=True)


def trained(config: Path) -> str:
    """What a run that ends well says."""
    process = start(config)
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 0, said
    return said


def served_by(servers: list[ServerProcess], folder: Path) -> dict[str, Any]:
    return {"name": "server", "urls": [s.url for s in servers], "token_file": str(folder / "token")}


def weights(folder: Path, name: str, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(next((folder / name / "checkpoints").glob(f"*{step}")) / "model.safetensors")


def test_a_run_samples_as_in_process_and_a_killed_one_goes_on(folder: Path, servers: list[ServerProcess]):
    trained(config_of(folder, {"name": "vllm", "process": "inside", "kv_cache_gib": 0.1}, "inside"))
    said = trained(config_of(folder, served_by(servers, folder), "served"))
    assert "2 server(s): vLLM" in said
    for inside, served in zip(ledger(folder, "inside"), ledger(folder, "served"), strict=True):
        assert [c.token_ids for c in served] == [c.token_ids for c in inside]
        gaps = [
            abs(a - b)
            for c, d in zip(served, inside, strict=True)
            for a, b in zip(c.behavior_logprobs, d.behavior_logprobs, strict=True)
        ]
        assert max(gaps) < 1e-4
    by_http = {"weights_url": f"http://127.0.0.1:{free_port()}"}
    config = config_of(folder, served_by(servers, folder) | by_http, "killed")
    process, checkpoints = start(config), folder / "killed" / "checkpoints"
    deadline = time.monotonic() + 200
    while not list(checkpoints.glob("*2")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(checkpoints.glob(f"*{STEPS}"))
    assert "going on from" in trained(config)
    assert [[c.token_ids for c in step] for step in ledger(folder, "killed")] == [
        [c.token_ids for c in step] for step in ledger(folder, "served")
    ]
    undisturbed = weights(folder, "served")
    assert all(torch.equal(undisturbed[name], found) for name, found in weights(folder, "killed").items())
    for name in ("served", "killed"):
        assert not (folder / name / "weights").exists()
        token = (folder / "token").read_text().strip()
        files = [path for path in (folder / name).rglob("*") if path.is_file()]
        assert not [path for path in files if token.encode() in path.read_bytes()]
    assert token not in (folder / "server.log").read_text()


def ledger(folder: Path, name: str) -> list[list[Any]]:
    """Completions by step."""
    found = Ledger(folder / name, 0, 1)
    steps = [found.read(step) for step in found.steps()]
    assert len(steps) == STEPS
    return [[c for g in step.groups for c in g.completions] for step in steps if step]


def test_a_folder_of_the_same_name_is_another_run(folder: Path, servers: list[ServerProcess]):
    """As in two containers, which have folders of their own under one path."""
    config = config_of(folder, served_by(servers, folder), "same")
    process, own, away = start(config), folder / "same", folder / "away"
    wait_until((own / "run_id").is_file, "the run has begun", 200)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    name = run_name(own)
    for server in servers:  # or it might run out on a slow machine
        control = Control(server.url, read_token(folder / "token"))
        control.lease(name, 600.0)
        control.close()
    own.rename(away)
    process = start(config)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 1
    assert re.search(rf"serves {re.escape(name)}, which has it for [0-9]+ s more", said), said
    shutil.rmtree(own)
    away.rename(own)
    assert "step 4" in trained(config)  # at once: it has them still


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            {"dtype": "bfloat16"},
            r"lacks --dtype bfloat16 \(it has float32\): start it again with that"
            r".* or train with engine\.dtype=float32",
        ),
        (
            {"urls": ["http://127.0.0.1:9"], "timeout_s": 3},
            r"nobody answers yet at http://127.0.0.1:9 \(.*(refused|attempts failed)\); "
            r"waiting for a server for timeout_s=3 at most"
            r".* no server can be used: http://127.0.0.1:9 is dead: no answer within timeout_s=3"
            r": .*(refused|attempts failed)"
            r".*; a server's output is where `cohort serve` was started$",
        ),
    ],
    ids=["another dtype", "nobody there"],
)
def test_a_server_that_is_not_fit_is_refused_before_the_first_step(
    folder: Path, servers: list[ServerProcess], change: dict[str, Any], fault: str
):
    process = start(config_of(folder, served_by(servers, folder) | change, "refused"))
    said = process.communicate(timeout=200)[0]
    assert process.returncode != 0
    assert re.search(fault, " ".join(said.split())), said


def test_a_wrong_token_is_refused_at_once_beside_an_address_where_nobody_answers(
    folder: Path, servers: list[ServerProcess]
):
    make_token(folder / "other")
    change = {"urls": ["http://127.0.0.1:9", servers[0].url], "token_file": str(folder / "other")}
    process = start(config_of(folder, served_by(servers, folder) | change, "other token"))
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 1 and "waiting for a server" not in said
    assert f"server {servers[0].url} rejects this token" in said


@pytest.fixture
def waiting(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], int, Path]]:
    """A run that has said that nobody answers at two addresses, the second one's port, and what it says."""
    ports, log = [free_port(), free_port()], folder / "waiting.log"
    engine = {"name": "server", "token_file": str(folder / "token"), "timeout_s": 200}
    engine["urls"] = [f"http://127.0.0.1:{port}" for port in ports]
    with log.open("wb") as out:
        process = start(config_of(folder, engine, "waiting"), stdout=out)
    said = r"nobody answers yet at {} \(.*\), {} \(.*\); waiting for a server for timeout_s=200 at most"
    found = partial(re.search, said.format(*engine["urls"]))
    try:
        wait_until(lambda: found(" ".join(log.read_text().split())) is not None, "it has found nobody", 100)
        yield process, ports[1], log
    finally:
        process.kill()
        process.wait(30)
        shutil.rmtree(folder / "waiting")


def test_a_run_waits_for_a_server_that_starts_beside_it(waiting: Any, folder: Path):
    process, port, log = waiting
    server = ServerProcess(folder / "model", folder / "token", folder / "late.log", port=port)
    try:
        assert process.wait(300) == 0, log.read_text()
    finally:
        server.kill()
    assert log.read_text().count("nobody answers yet") == 1
    assert len(ledger(folder, "waiting")) == STEPS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_waits_for_a_server_ends_at_the_first_signal(waiting: Any, number: int):
    process, _, log = waiting
    process.send_signal(number)
    assert process.wait(100) in (130, -signal.SIGTERM)
    assert "stopping after this step" not in log.read_text() and "Traceback" not in log.read_text()


def test_a_run_is_refused_whose_server_serves_another_run(folder: Path, servers: list[ServerProcess]):
    control = Control(servers[1].url, read_token(folder / "token"))
    control.lease("the run in /elsewhere", 300.0)
    process = start(config_of(folder, served_by(servers, folder), "second"))
    said = process.communicate(timeout=300)[0]
    control.lease("the run in /elsewhere", 0.0)
    control.close()
    assert process.returncode == 1
    assert re.search(
        f"{servers[1].url} serves the run in /elsewhere, which has it for [12][0-9]+ s more", said
    )
    assert "step 1" not in said and not (folder / "second" / "checkpoints").exists()
