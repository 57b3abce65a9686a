"""A vLLM server whose two workers split the model (tensor parallel): each slice arrives, and is proved."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from sync_faults import DOWN, Q0
from tiny_llama import (
    END,
    Stream,
    changed,
    collect_all,
    largest_gap_to,
    make_model,
    make_prompts,
    make_tokenizer,
    save,
)

from rl.causal import CausalPolicy
from rl.config.read import load_config
from rl.types import SamplingParams
from rollout.vllm import broadcast
from rollout.vllm.broadcast import WeightBroadcast
from rollout.vllm.control import Control, ServerDead
from rollout.vllm.engine import VllmEngine
from rollout.vllm.fleet import Fleet
from rollout.vllm.lock import make_token, read_token
from rollout.vllm.member import connect
from rollout.vllm.weight_files import WeightFiles
from rollout.weight_sync import WeightSyncError, publish
from tests.calling import call
from tests.conftest import make_tiny_tokenizer
from tests.rl.families import save_tiny
from tests.vllm_engines import needs_vllm, served_config
from tests.vllm_servers import ServerProcess, free_port
from tests.waiting import wait_until

SHORT = SamplingParams(24, stop_token_ids=(END,))
CORES = sorted(os.sched_getaffinity(0))
pytestmark = [
    needs_vllm,
    pytest.mark.rotation,
    pytest.mark.timeout(600),
    pytest.mark.skipif(len(CORES) < 2, reason="vLLM on a CPU gives each worker cores of its own"),
]
K0, EMBED, SECOND = "model.layers.0.self_attn.k_proj.weight", "model.embed_tokens.weight", " (worker 1)"


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder: Path = tmp_path_factory.mktemp("split")
    with serving(save(make_model(0), folder / "model")) as started:
        yield started


@contextmanager
def serving(model: Path, workers: int = 2) -> Iterator[ServerProcess]:
    """A server of that many workers; it writes beside the model's folder."""
    folder = model.parent
    make_token(folder / "token")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(str(core) for core in CORES[:workers]))
        options: dict[str, Any] = {"tensor-parallel-size": workers}
        started = ServerProcess(model, folder / "token", folder / "server.log", **options)
    try:
        yield started.wait()
    finally:
        started.kill()


def engine_of(
    *processes: ServerProcess, by_broadcast: bool = False, reached: set[str] | None = None
) -> VllmEngine:
    """`reached`: the first server, and those whose addresses are in it, can be reached; None: all can."""
    folder = processes[0].log.parent
    token = read_token(folder / "token")
    fit = {"dtype": torch.float32, "max_model_len": 128, "timeout_s": 120.0}
    files: Any = partial(WeightFiles, folder / "weights")
    if by_broadcast:
        files = partial(WeightBroadcast, url=f"nccl://127.0.0.1:{free_port()}", timeout_s=120.0)

    def reach(url: str) -> Control:
        if reached is not None and url not in {processes[0].url, *reached}:
            raise ServerDead(f"server {url}: no way there")
        return connect(url, token, **fit)

    fleet = Fleet(
        [process.url for process in processes],
        token,
        connect=reach,
        files=files,
        tolerance=0.0025,
        timeout_s=120.0,
        note=print,
    )
    return VllmEngine(fleet, make_tokenizer(), max_model_len=128, sample_while_training=True, timeout_s=120.0)


@pytest.mark.parametrize("by_broadcast", [False, True], ids=["files", "broadcast"])
def test_every_slice_arrives_whole_and_as_a_delta(
    process: ServerProcess, by_broadcast: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(broadcast, "BROADCAST_BYTES", 1 << 16)  # three broadcasts or more for a version
    engine = engine_of(process, by_broadcast=by_broadcast)
    shapes = {name: held.own_shape for name, held in engine.tensors.items()}
    halves = (shapes[Q0 + SECOND], shapes[DOWN + SECOND], shapes[EMBED], shapes[EMBED + SECOND])
    assert halves == ((32, 64), (64, 48), (160, 64), (140, 64))  # 300 ids, padded to 320
    assert shapes[K0] == shapes[K0 + SECOND] == (32, 64)  # one head of keys, which both have
    models = {1: make_model(1), 2: changed(make_model(1))}
    for version, model in models.items():
        report = publish(engine, Stream(model), version=version)
        assert report.canary_max_gap < 1e-5
        assert len(engine.tensors) == 2 * len(list(model.parameters())) + 2
        push = engine._core.files.whole() if by_broadcast else engine._core.files._committed
        assert bool(push.base) == (version == 2 and not by_broadcast)
        engine.submit(call(make_prompts(5, 9), num_completions=4, sampling=SHORT, seeds=range(2)))
        groups = collect_all(engine)
        assert {s.policy_version for g in groups for c in g.completions for s in c.version_spans} == {version}
        assert max(largest_gap_to(models, g) for g in groups) < 1e-4
    engine.close()


@pytest.fixture(scope="module")
def single(process: ServerProcess) -> Iterator[ServerProcess]:
    with serving(process.log.parent / "model", 1) as started:
        yield started


@pytest.mark.parametrize("by_broadcast", [False, True], ids=["files", "broadcast"])
@pytest.mark.parametrize("split_first", [False, True], ids=["one and two workers", "two and one"])
def test_servers_with_one_worker_and_with_two_serve_one_run(
    process: ServerProcess, single: ServerProcess, by_broadcast: bool, split_first: bool
):
    servers = (process, single) if split_first else (single, process)
    engine, models = (
        engine_of(*servers, by_broadcast=by_broadcast),
        {1: make_model(1), 2: changed(make_model(1))},
    )
    members = engine._core.members
    for version, model in models.items():
        assert publish(engine, Stream(model), version=version).canary_max_gap < 1e-5
        assert [str(member.state) for member in members] == ["up", "up"]
        expected = engine._core._expected
        assert {workers: len(found) for workers, found in expected.items()} == {1: 21, 2: 42}
        engine.submit(call(make_prompts(5, 9), num_completions=4, sampling=SHORT, seeds=range(2)))
        assert all(member.streams for member in members)
        groups = collect_all(engine)
        assert {s.policy_version for g in groups for c in g.completions for s in c.version_spans} == {version}
        assert max(largest_gap_to(models, g) for g in groups) < 1e-4
    engine.close()


def test_a_slice_that_is_wrong_beside_a_server_with_whole_tensors_is_named(
    process: ServerProcess, single: ServerProcess, capfd: pytest.CaptureFixture[str]
):
    """The second worker of the split server is told another fingerprint than that of the policy's slice."""
    engine = engine_of(single, process)
    met = engine._core._layouts[2][Q0 + SECOND]
    engine._core._layouts[2] = {**engine._core._layouts[2], Q0 + SECOND: replace(met, ranges=[[31, 63]])}
    publish(engine, Stream(make_model(1)), version=1)
    assert [member.is_up for member in engine._core.members] == [True, False]
    assert (
        f"fingerprints of 1 of 42 tensors differ from the policy's: {Q0 + SECOND}" in capfd.readouterr().out
    )
    engine.close()


def test_servers_of_another_number_of_workers_that_come_late_get_the_next_weights(
    process: ServerProcess, single: ServerProcess, capfd: pytest.CaptureFixture[str]
):
    engine = engine_of(single, process, reached=(reached := set()))
    assert [str(member.state) for member in engine._core.members] == ["stale", "dead"]
    publish(engine, Stream(make_model(1)), version=1)
    reached.add(process.url)
    said: list[str] = []
    words = "has 2 worker(s), as none had when the current weights were sent; it gets the next ones"
    wait_until(lambda: said.append(capfd.readouterr().out) or words in "".join(said), "it is refused", 120)
    publish(engine, Stream(make_model(2)), version=2)
    assert [str(member.state) for member in engine._core.members] == ["up", "up"], capfd.readouterr().out
    engine.close()


FAULTS = {
    "rows of one worker": (Q0, lambda t: torch.cat([t[:32], 1.001 * t[32:]]), [Q0 + SECOND]),
    "columns of one worker": (DOWN, lambda t: torch.cat([1.001 * t[:, :48], t[:, 48:]], 1), [DOWN]),
    "rows of the two exchanged": (Q0, lambda t: t.roll(32, 0), [Q0, Q0 + SECOND]),
    "a head that both have": (K0, lambda t: 1.001 * t, [K0, K0 + SECOND]),
    "an id of one worker": (
        EMBED,
        lambda t: torch.cat([t[:299], 2 * t[299:]]),
        ["lm_head.weight" + SECOND, EMBED + SECOND],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_slice_that_is_not_the_policys_is_named_with_its_worker(
    process: ServerProcess, fault: str, monkeypatch: pytest.MonkeyPatch
):
    """The files get other values than the trainer's stream has, in slices of one worker or of both."""
    at, change, names = FAULTS[fault]
    plain = WeightFiles._changed
    monkeypatch.setattr(
        WeightFiles, "_changed", lambda s, name, t: plain(s, name, change(t) if name == at else t)
    )
    engine = engine_of(process)
    with pytest.raises(WeightSyncError) as caught:
        publish(engine, Stream(make_model(1)), version=1)
    named = f"fingerprints of {len(names)} of 42 tensors differ from the policy's: {', '.join(names)}"
    assert str(caught.value).endswith(named)
    engine.close()
    monkeypatch.undo()
    engine = engine_of(process)
    assert publish(engine, Stream(make_model(1)), version=1).canary_max_gap < 1e-5  # and heals
    engine.close()


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe"])
def test_slices_of_other_families_arrive(name: str, tmp_path: Path):
    """Biases of slices; experts, whose workers have rows of gate and up, and columns of down."""
    model = tmp_path / "model"
    save_tiny(name, model, served_config(name, moe_intermediate_size=64))
    make_tiny_tokenizer(model)
    config = load_config(None, [f"model.name={model}", "model.dtype=fp32", "loss.kl_coef=0"])
    policy = CausalPolicy(config.model, Accelerator(cpu=True), temperature=1.0)
    with serving(model) as process:
        engine = engine_of(process)
        for version, share in ((1, 1.0), (2, 0.01), (3, 0.01)):
            changed(policy.model, share)
            assert publish(engine, policy.weights(), version=version).canary_max_gap < 1e-4
        engine.close()


def test_the_facts_say_how_many_workers_there_are(process: ServerProcess):
    control = Control(process.url, read_token(process.log.parent / "token"))
    assert control.facts().num_workers == 2
    control.close()
