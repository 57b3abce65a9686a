"""Rollouts from real vLLM servers: they sample what an engine in process samples, and survive faults.

The tests share two servers and go from mild faults to deadly ones, in the order in which they stand.
"""

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from tiny_llama import (
    CANARY,
    END,
    Stream,
    collect_all,
    largest_gap_to,
    make_model,
    make_prompts,
    make_tokenizer,
    save,
    token_logprobs,
)

from rl.types import Group, Prompt, SamplingParams, VersionSpan
from rollout.engine import EngineError
from rollout.vllm import broadcast, served
from rollout.vllm import fleet as fleet_module
from rollout.vllm import member as member_module
from rollout.vllm.broadcast import WeightBroadcast
from rollout.vllm.control import Control, PushRefused
from rollout.vllm.engine import VllmEngine
from rollout.vllm.fleet import Fleet
from rollout.vllm.lock import SAMPLED, make_token, read_token
from rollout.vllm.member import connect
from rollout.vllm.weight_files import WeightFiles
from rollout.weight_sync import WeightSyncError, publish
from tests.calling import call
from tests.vllm_engines import needs_vllm, start_vllm
from tests.vllm_servers import ServerProcess, free_port
from tests.waiting import wait_until

pytestmark = [needs_vllm, pytest.mark.timeout(900)]
LONG = SamplingParams(90)
SHORT = SamplingParams(24, stop_token_ids=(END,))


class Served:
    """Two servers, and what engines on them say."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.token_file = folder, folder / "token"
        make_token(self.token_file)
        self.token = read_token(self.token_file)
        self.model = save(make_model(0), folder / "model")
        self.processes = [self.start(), self.start()]
        self.said: list[str] = []
        self.open_engines: list[VllmEngine] = []

    def start(self, port: int = 0) -> ServerProcess:
        return ServerProcess(self.model, self.token_file, self.folder / "server.log", port=port)

    def engine(
        self,
        *numbers: int,
        timeout_s: float = 60.0,
        sends: bool = True,
        by_broadcast: bool = False,
        run: str = "",
    ) -> VllmEngine:
        fit = {"dtype": torch.float32, "max_model_len": 128, "timeout_s": timeout_s, "run": run}
        files: Any = partial(WeightFiles, self.folder / "weights")
        if by_broadcast:
            files = partial(WeightBroadcast, url=f"nccl://127.0.0.1:{free_port()}", timeout_s=timeout_s)
        fleet = Fleet(
            [self.processes[k].url for k in numbers],
            self.token,
            connect=lambda url: connect(url, self.token, **fit),
            files=files if sends else None,
            tolerance=0.0025,
            timeout_s=timeout_s,
            note=self.said.append,
            run=run,
        )
        self.open_engines.append(
            VllmEngine(
                fleet, make_tokenizer(), max_model_len=128, sample_while_training=True, timeout_s=timeout_s
            )
        )
        return self.open_engines[-1]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    found = Served(tmp_path_factory.mktemp("fleet"))
    try:
        for process in found.processes:
            process.wait()
        yield found
    finally:
        for engine in found.open_engines:
            engine.close()
        for process in found.processes:
            process.kill()


def states(engine: VllmEngine) -> list[str]:
    return [str(member.state) for member in engine._core.members]  # type: ignore[attr-defined]


def submit(
    engine: VllmEngine, prompts: list[Prompt], number: int = 4, sampling: SamplingParams = LONG
) -> None:
    engine.submit(call(prompts, num_completions=number, sampling=sampling, seeds=range(len(prompts))))


def read_counter(process: ServerProcess, token: str, name: str) -> float:
    text = httpx.get(f"{process.url}/metrics", headers={"Authorization": f"Bearer {token}"}).text
    return next(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name + "{"))


@pytest.mark.parametrize("numbers", [(0,), (0, 1)], ids=["one server", "two servers"])
def test_the_ids_are_those_of_the_engine_in_process(both: Served, numbers: tuple[int, ...]):
    prompts, model = make_prompts(5, 9, 33, 20, 7), make_model(3)
    asked = call(prompts, num_completions=4, sampling=SHORT, seeds=range(5))
    local = start_vllm(
        both.model, make_tokenizer(), dtype=torch.float32, max_model_len=128, kv_cache_gib=0.03
    )
    try:
        publish(local, Stream(model), version=1)
        expected = local.generate(asked)
    finally:
        local.close()
    engine = both.engine(*numbers)
    report = publish(engine, Stream(model), version=1)
    assert list(report.parts) == ["inspect", "send", "fingerprints", "canary"]
    groups = engine.generate(asked)
    assert [c.token_ids for g in groups for c in g.completions] == [
        c.token_ids for g in expected for c in g.completions
    ]
    pairs = [
        (a, b)
        for g, e in zip(groups, expected, strict=True)
        for c, d in zip(g.completions, e.completions, strict=True)
        for a, b in zip(c.behavior_logprobs, d.behavior_logprobs, strict=True)
    ]
    assert len(pairs) > 200 and max(abs(a - b) for a, b in pairs) < 1e-4
    assert all(c.version_spans == [VersionSpan(1, len(c.token_ids))] for g in groups for c in g.completions)
    engine.close()


def test_nothing_is_sampled_before_weights_are_proved(both: Served):
    engine = both.engine(0, timeout_s=3)
    with pytest.raises(EngineError, match="of 1 prompts was finished within timeout_s=3"):
        engine.generate(call(make_prompts(5), num_completions=1, sampling=SHORT, seeds=[0]))
    engine.close()


Cuts = list[tuple[served.Stream, list[int]]]


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch) -> Cuts:
    """Completions of servers that tell no versions, as those before 0.32, and the versions that they know."""
    found: Cuts = []
    take = served.Stream.take

    def noted(stream: served.Stream, message: dict[str, Any], version: int) -> None:
        for choice in message["choices"]:
            if spans := choice.pop("weight_versions", None):
                each = [(span["version"].partition(".")[0], span["end"] - span["start"]) for span in spans]
                found.append((stream, [int(known) for known, number in each for _ in range(number)]))
        take(stream, message, version)

    monkeypatch.setattr(served.Stream, "take", noted)
    return found


def hold_in_the_middle(engine: VllmEngine, asked: VllmEngine, number: int = 30) -> None:
    """Pauses servers when one has sampled a part of a completion that was `asked` for, and not its end."""

    def is_in_the_middle(member: member_module.Member) -> bool:
        said = member.control.sampled(member.server.label)
        return any(0 < said.get(stream.asked_as, 0) < 90 for stream in list(member.streams.values()))

    for turn in range(12):
        submit(asked, [replace(p, id=f"{p.id}/{turn}") for p in make_prompts(*range(5, 5 + number))])
        members = asked._core.members  # type: ignore[attr-defined]
        begun = lambda m: any(2 < len(s.token_ids) < 60 for s in list(m.streams.values()))  # noqa: E731
        wait_until(lambda: any(begun(member) for member in members), "one begins")  # noqa: B023
        engine.hold()
        if any(map(is_in_the_middle, members)):
            return
        engine.prompt_logprobs(CANARY)  # which lets them go on
    pytest.fail("no pause met a completion under way")


def check_cuts(engine: VllmEngine, cuts: Cuts) -> None:
    spans = [c.version_spans for g in collect_all(engine) for c in g.completions]
    kinds = {tuple(span.policy_version for span in s) for s in spans}
    assert (1, 2) in kinds and kinds <= {(1,), (1, 2), (2,)}
    assert all(sum(span.num_tokens for span in s) == 90 for s in spans)
    assert len(cuts) == len(spans)
    wrong = [(stream.versions, known) for stream, known in cuts if stream.versions != known]
    assert not wrong


def test_updates_go_in_under_running_completions(both: Served, cuts: Cuts):
    """The cuts that this side makes at a pause, for servers that tell of no versions, are the server's."""
    engine = both.engine(0, 1)
    publish(engine, Stream(make_model(4)), version=1)
    hold_in_the_middle(engine, engine)
    publish(engine, Stream(make_model(5)), version=2)
    check_cuts(engine, cuts)
    engine.close()


class Pair:
    """One of two processes of a run, here threads."""

    size = 2

    def __init__(self, rank: int, barrier: threading.Barrier, told: list[Any]) -> None:
        self.rank, self.barrier, self.told = rank, barrier, told

    def gather(self, mine: Any) -> list[Any]:
        self.told[self.rank] = mine
        self.barrier.wait(60)
        found = list(self.told)
        self.barrier.wait(60)
        return found


def test_a_process_that_does_not_send_cuts_tokens_where_the_weights_were_replaced(both: Served, cuts: Cuts):
    """It learns of new weights when servers have sampled with them for a while, in messages of 8 tokens."""
    sender, engine = both.engine(0, 1), both.engine(0, 1, sends=False)
    publish(sender, Stream(make_model(4)), version=1)
    engine.adopt(1)
    engine.prompt_logprobs(CANARY)
    hold_in_the_middle(sender, engine, 6)
    adopt = engine.adopt

    def late(version: int) -> None:
        """After two messages since the servers go on. What is asked for meanwhile has to wait."""
        streams = [s for m in engine._core.members for s in m.streams.values() if s.token_ids]  # type: ignore[attr-defined]
        before = [min(len(stream.token_ids) + 16, 90) for stream in streams]
        submit(engine, [replace(p, id=f"{p.id}/late") for p in make_prompts(5, 9)])
        wait_until(lambda: all(len(s.token_ids) >= n for s, n in zip(streams, before, strict=True)), "go on")
        adopt(version)

    engine.adopt = late  # type: ignore[method-assign]
    shared = threading.Barrier(2), [None, None]
    with ThreadPoolExecutor(1) as thread:
        team, model = Pair(0, *shared), make_model(5)
        sent = thread.submit(publish, sender, Stream(model), version=2, team=team)
        publish(engine, Stream(model), version=2, team=Pair(1, *shared), sends=False)
        sent.result(60)
    check_cuts(engine, cuts)
    engine.close()
    sender.close()


def test_a_process_that_is_held_asks_nothing_of_a_server_that_comes_back(both: Served, cuts: Cuts):
    """By then others have counted what it has sampled: what comes later is of their next version."""
    sender, engine = both.engine(0), both.engine(0, sends=False)
    publish(sender, Stream(make_model(4)), version=1)
    engine.adopt(1)
    engine.hold()
    fleet: Fleet = engine._core  # type: ignore[assignment]

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        fleet._lose(fleet.members[0], member_module.State.STALE, "it was away")
        fleet.members[0].lost_at = -member_module.RETRY_S
        submit(engine, make_prompts(5, 9))
        wait_until(lambda: states(engine) == ["up"], "it comes back")
        time.sleep(1.0)  # for requests that nobody should make
        yield from Stream(make_model(5))

    sender.update_weights(weights(), version=2)
    wait_until(
        lambda: not fleet.members[0].streams or any(s.reason for s in fleet.members[0].streams.values()),
        "it ends",
    )
    engine.adopt(2)
    engine.prompt_logprobs(CANARY)
    groups = collect_all(engine)
    assert {s.policy_version for g in groups for c in g.completions for s in c.version_spans} == {2}
    assert all(stream.versions == known == [2] * 90 for stream, known in cuts)
    engine.close()
    sender.close()


def test_what_a_server_has_sampled_is_dropped_where_its_counts_are_gone(
    both: Served, monkeypatch: pytest.MonkeyPatch
):
    silence(monkeypatch)
    sender, engine = both.engine(0), both.engine(0, sends=False)
    publish(sender, Stream(make_model(4)), version=1)
    engine.adopt(1)
    engine.prompt_logprobs(CANARY)
    hold_in_the_middle(sender, engine, 6)
    engine.hold()
    sender.update_weights(iter(Stream(make_model(5))), version=2)
    sender.hold()  # a second pause, whose counts take the place of those of the first
    url, label = both.processes[0].url, engine._core.members[0].server.label  # type: ignore[attr-defined]
    engine.adopt(2)
    said = f"how much {label} sampled: {SAMPLED}.{label} answered 409 .not counted"
    assert re.search(f"server {url} is stale with .*: {said}", both.said[-1])
    sender.prompt_logprobs(CANARY)  # which lets it go on
    wait_until(lambda: states(engine) == ["up"], "it has proved itself")
    engine.prompt_logprobs(CANARY)
    groups = collect_all(engine)
    assert {s.policy_version for g in groups for c in g.completions for s in c.version_spans} == {2}
    assert max(largest_gap_to({2: make_model(5)}, g) for g in groups) < 1e-4
    engine.close()
    sender.close()


def test_another_start_finds_no_prompt_in_the_cache(both: Served):
    hits = partial(read_counter, both.processes[0], both.token, "vllm:prefix_cache_hits_total")
    (prompt,) = make_prompts(70)
    found = []
    for _ in range(2):
        engine = both.engine(0)
        publish(engine, Stream(make_model(3)), version=1)
        before = hits()
        for seed in range(2):
            engine.generate(call([prompt], num_completions=1, sampling=SHORT, seeds=[seed]))
            found.append(hits() - before)
        engine.close()
    assert found == [0, 64, 0, 64]  # two whole blocks of 32 tokens, in the same start only


def test_a_completion_whose_end_came_is_dropped_with_its_tokens():
    stream = served.Stream("0", [5], LONG, None, with_logprobs=False)
    stream.begin("salt")
    stream.take({"choices": [{"token_ids": [7, 8], "logprobs": None, "finish_reason": "length"}]}, 1)
    stream.drop()
    assert (stream.answer().finish_reason, stream.answer().token_ids) == ("abort", [])  # to be sampled again


def test_tokens_that_come_after_a_pause_have_the_version_that_sampled_them():
    stream = served.Stream("0", [5], LONG, None, with_logprobs=False)
    message = lambda *ids: {"choices": [{"token_ids": list(ids), "logprobs": None}]}  # noqa: E731
    assert stream.begin("salt")["request_id"] == "salt.0.1"
    stream.take(message(7), 1)
    stream.mark(3, 1)
    stream.take(message(8, 9, 10), 2)
    stream.mark(6, 2)
    stream.take(message(11, 12, 13), 3)
    assert stream.versions == [1, 1, 1, 2, 2, 2, 3]
    with pytest.raises(EngineError, match="counts 6 tokens of a completion of which it has sent 7"):
        stream.mark(6, 3)
    assert stream.begin("salt")["request_id"] == "salt.0.2"  # elsewhere, where its tokens are the prompt's
    stream.mark(2, 3)
    stream.take(message(14, 15, 16), 4)
    assert stream.versions[7:] == [3, 3, 4]
    stream.begin("salt")
    stream.mark(None, 4)  # it has not begun there
    stream.mark(1, 4)
    stream.take(message(17, 18), 5)
    assert stream.versions[10:] == [4, 5]


def test_routes_are_read_as_vllm_writes_them_and_unknown_where_another_server_sampled():
    """Rows: the last prompt token's and each token's except for the last one's (1 layer, 2 experts)."""
    from vllm.utils.serial_utils import numpy2base64

    stream = served.Stream("0", [5, 6], LONG, None, with_logprobs=False, with_routes=True)
    assert stream.begin("salt")["sampling_params"]["routed_experts_prompt_start"] == 1
    stream.take({"choices": [{"token_ids": [7], "logprobs": None}]}, 1)
    assert (
        stream.begin("salt")["sampling_params"]["routed_experts_prompt_start"] == 2
    )  # elsewhere, from [5, 6, 7]
    rows = np.array([[[0, 1]], [[2, 3]], [[4, 5]]], dtype=np.uint8)
    said = {"token_ids": [8, 9, 10], "logprobs": None, "finish_reason": "stop"}
    stream.take({"choices": [said | {"routed_experts": numpy2base64(rows)}]}, 1)
    routes = stream.answer().routes
    assert routes.tolist() == [[[-1, -1]], [[2, 3]], [[4, 5]], [[-1, -1]]]
    stream.drop()
    assert stream.answer().routes is None


def silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets servers say nothing of what sampled a token, as those before 0.32."""
    take = served.Stream.take

    def silent(stream: served.Stream, message: dict[str, Any], version: int) -> None:
        for choice in message.get("choices", []):
            choice.pop("weight_versions", None)
        take(stream, message, version)

    monkeypatch.setattr(served.Stream, "take", silent)


@contextmanager
def others(both: Served, engine: VllmEngine, number: int) -> Iterator[Callable[[], None]]:
    """Gives a server other weights under the same version, as another run on the same servers does."""
    theirs = Control(both.processes[number].url, both.token)
    files = WeightFiles(both.folder / "of another run", engine.tensors)
    push = files.write(iter(Stream(make_model(9))), version=1)
    assert theirs.facts().has_spans

    def give() -> None:
        theirs.pause()
        theirs.load(push)
        theirs.resume()

    yield give
    theirs.close()


@pytest.mark.parametrize("says_versions", [True, False], ids=["with spans", "without"])
def test_tokens_of_weights_that_somebody_else_pushed_are_dropped(
    both: Served, monkeypatch: pytest.MonkeyPatch, says_versions: bool
):
    if not says_versions:
        silence(monkeypatch)
    engine, model = both.engine(0, 1), make_model(8)
    publish(engine, Stream(model), version=1)
    said = len(both.said)
    with others(both, engine, 1) as give:
        submit(engine, make_prompts(*[5, 9, 33, 20] * 5))  # more than two servers sample at a time
        wait_until(lambda: all(member.streams for member in engine._core.members), "both sample")  # type: ignore[attr-defined]
        give()
    groups = collect_all(engine)
    assert "that nobody has proved (1." in " ".join(both.said[said:])
    assert [len(c.token_ids) for g in groups for c in g.completions] == [90] * 80
    assert max(largest_gap_to({1: model}, g) for g in groups) < 1e-4
    engine.close()


@pytest.mark.parametrize("by_broadcast", [False, True], ids=["files", "broadcast"])
def test_tokens_of_others_weights_are_dropped_where_new_weights_come_before_the_streams_end(
    both: Served, monkeypatch: pytest.MonkeyPatch, by_broadcast: bool
):
    """A broadcast asks for no base, and servers before 0.32 never say what sampled a token."""
    silence(monkeypatch)
    monkeypatch.setattr(fleet_module, "LOOK_S", 600.0)  # nobody looks before the next publish
    engine, models = both.engine(0, by_broadcast=by_broadcast), {1: make_model(8), 2: make_model(5)}
    publish(engine, Stream(models[1]), version=1)
    said = len(both.said)
    with others(both, engine, 0) as give:
        submit(engine, make_prompts(*[5, 9, 33, 20] * 6))  # 96, and the server samples 32 together
        streams = list(engine._core.members[0].streams.values())  # type: ignore[attr-defined]
        wait_until(lambda: any(len(stream.token_ids) > 2 for stream in streams), "the server samples")
        give()
        before = [len(stream.token_ids) for stream in streams]
        wait_until(lambda: any(len(s.token_ids) > n for s, n in zip(streams, before, strict=True)), "goes on")
    publish(engine, Stream(models[2]), version=2)
    groups = collect_all(engine)
    assert "that nobody has proved (1." in " ".join(both.said[said:])
    assert [len(c.token_ids) for g in groups for c in g.completions] == [90] * 96
    assert max(largest_gap_to(models, g) for g in groups) < 1e-4
    engine.close()


def test_what_others_weights_cached_is_not_found_after_a_new_proof(both: Served):
    engine, model = both.engine(0), make_model(8)
    publish(engine, Stream(model), version=1)
    with others(both, engine, 0) as give:
        give()
    (group,) = engine.generate(call(make_prompts(70), num_completions=2, sampling=SHORT, seeds=[0]))
    assert {span.policy_version for c in group.completions for span in c.version_spans} == {1}
    assert largest_gap_to({1: model}, group) < 1e-4
    engine.close()


def test_a_canary_waits_for_no_completion(both: Served):
    """The server samples 32 at a time, and takes what is to be scored first."""
    engine, model = both.engine(0), make_model(8)
    fleet: Fleet = engine._core  # type: ignore[assignment]
    publish(engine, Stream(model), version=1)
    submit(engine, make_prompts(*[5, 9, 33, 20] * 15))
    found, expected = engine.prompt_logprobs(CANARY), token_logprobs(model, CANARY)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-4
    assert len(fleet.members[0].streams) > 32
    engine.close()


def test_a_process_that_joins_takes_over_what_another_one_has_proved(both: Served):
    """To ask a server what it holds changes nothing there, and others' weights are not taken for proved."""
    engine, model = both.engine(0), make_model(8)
    publish(engine, Stream(model), version=1)
    other = both.engine(0, sends=False, timeout_s=20)
    other.adopt(1)
    other.prompt_logprobs(CANARY)
    (group,) = other.generate(call(make_prompts(9), num_completions=2, sampling=SHORT, seeds=[0]))
    assert largest_gap_to({1: model}, group) < 1e-4
    with others(both, engine, 0) as give:
        give()
    other.timeout_s = 3.0
    with pytest.raises(EngineError, match="was finished within timeout_s=3"):
        other.generate(call(make_prompts(9), num_completions=2, sampling=SHORT, seeds=[0]))
    assert "nobody has proved (1." in both.said[-1]
    other.close()
    engine.close()


def test_a_server_that_hangs_at_the_start_is_left_out(both: Served, monkeypatch: pytest.MonkeyPatch):
    """Its health checks tell, not the time that another one may take."""
    monkeypatch.setattr(served, "POLL_TIMEOUT_S", 4.0)
    monkeypatch.setattr(member_module, "DEAD_S", 1.0)
    both.processes[1].signal(signal.SIGSTOP)
    try:
        engine, model = both.engine(1, 0), make_model(8)
        publish(engine, Stream(model), version=1)
        assert states(engine) == ["dead", "up"]
    finally:
        both.processes[1].signal(signal.SIGCONT)
    engine.close()


def test_a_stopped_server_is_left_and_comes_back_proved(both: Served, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(member_module, "DEAD_S", 2.0)
    monkeypatch.setattr(served, "POLL_TIMEOUT_S", 2.0)
    engine, model = both.engine(0, 1), make_model(6)
    publish(engine, Stream(model), version=1)
    submit(engine, make_prompts(5, 9, 33, 20), 40)  # in several waves
    streams = engine._core.members[1].streams  # type: ignore[attr-defined]
    wait_until(lambda: any(4 < len(s.token_ids) < 45 for s in list(streams.values())), "it samples")
    both.processes[1].signal(signal.SIGSTOP)
    try:
        groups = collect_all(engine)
        assert states(engine) == ["up", "dead"]
    finally:
        both.processes[1].signal(signal.SIGCONT)
    assert sorted(g.prompt.id for g in groups) == [f"tiny/{k}" for k in range(4)]
    assert [len(c.token_ids) for g in groups for c in g.completions] == [90] * 160
    assert max(largest_gap_to({1: model}, g) for g in groups) < 1e-4
    ask = partial(engine._core.answers, timeout_s=0.1, waiting_for="a server to come back")
    wait_until(lambda: ask() == [] and states(engine) == ["up", "up"], "it is back", 60)
    assert "is up and holds version 1" in both.said[-1]
    engine.close()


def test_a_run_keeps_its_server_from_others_until_it_asks_no_more(
    both: Served, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(served, "RENEW_S", 0.2)
    monkeypatch.setattr(served, "LEASE_S", 4.0)
    monkeypatch.setattr(member_module, "RETRY_S", 1.0)
    engine, control = both.engine(0, run="the run in /a"), Control(both.processes[0].url, both.token)
    publish(engine, Stream(make_model(4)), version=1)
    time.sleep(5)  # longer than a lease, which it renews meanwhile
    with pytest.raises(
        ValueError, match=r"serves the run in /a, which has it for [1-4] s more if it does not"
    ):
        both.engine(1, 0, run="the run in /b")
    other = Control(both.processes[1].url, both.token)
    other.lease("the run in /c")  # /b has given it back, since it did not start
    other.lease("the run in /c", 0.0)
    other.close()
    control.lease("the run in /a", 0.0)
    control.lease("the run in /b", 15.0)  # as if /a had been asleep for too long
    ask = partial(engine._core.answers, timeout_s=0.1, waiting_for="the news")
    wait_until(lambda: ask() == [] and states(engine) == ["stale"], "it is known to be another's", 14)
    assert "serves the run in /b now" in both.said[-1]
    wait_until(lambda: ask() == [] and states(engine) == ["up"], "/b has not asked again", 60)
    assert any("the run in /b, which has it for" in said for said in both.said)  # it was refused
    assert "is up and holds version 1" in both.said[-1]
    engine.close()
    control.lease("the run in /b", 0.0)  # /a has given it back
    control.close()


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three broadcasts or more for a version of the tiny model."""
    monkeypatch.setattr(broadcast, "BROADCAST_BYTES", 1 << 16)


def test_a_broadcast_reaches_every_server_at_once(both: Served, in_parts: None):
    """The first version comes from the kept copy, as the servers join; the later ones live."""
    engine, models = both.engine(0, 1, by_broadcast=True), {k: make_model(k) for k in (1, 2, 3)}
    sender: WeightBroadcast = engine._core.files  # type: ignore[attr-defined, assignment]
    links = []
    for version, model in models.items():
        report = publish(engine, Stream(model), version=version)
        assert "fingerprints" in report.parts and report.canary_mean_gap < 1e-5
        assert states(engine) == ["up", "up"] and len(sender._kept) >= 3
        links.append(list(sender._links.values()))
        submit(engine, make_prompts(5, 9, 33, 20))
        groups = collect_all(engine)
        assert {s.policy_version for g in groups for c in g.completions for s in c.version_spans} == {version}
        assert max(largest_gap_to(models, g) for g in groups) < 1e-4
    assert links[0] == links[2] and len(links[0]) == 2  # nobody had to join again
    engine.close()


def test_a_broadcast_that_is_not_what_was_planned_is_refused_by_name(both: Served, in_parts: None):
    engine, (name, *_) = both.engine(0, by_broadcast=True), dict(make_model(1).named_parameters())
    publish(engine, Stream(make_model(1)), version=1)
    sender: WeightBroadcast = engine._core.files  # type: ignore[attr-defined, assignment]
    member, held = engine._core.members[0], dict(sender._held)  # type: ignore[attr-defined]
    sender._held[name] = replace(held[name], shape=(7, 64))
    push = replace(sender.whole(), content="2.other")
    with pytest.raises(
        PushRefused, match=rf"get ready for 2\.other: {name} is \[\[7, 64\], 'float32'\], and in"
    ):
        sender.bring(member, push)
    assert member.control.holds() == sender.whole().content  # it goes on with what it held
    sender._held |= held
    (layout, _), *_ = sender._kept
    del sender._kept[0]
    sender.bring(member, push)
    lost = layout[0][0]
    with pytest.raises(PushRefused, match=rf"load version 1: of 2\.other it was not sent .*{lost}.*unknown"):
        member.control.load(push)
    assert member.control.holds() == ""
    publish(engine, Stream(make_model(2)), version=2)  # and heals
    assert states(engine) == ["up"]
    engine.close()


def test_bytes_that_change_on_their_way_are_named_by_their_fingerprints(
    both: Served, in_parts: None, monkeypatch: pytest.MonkeyPatch
):
    engine = both.engine(0, by_broadcast=True)
    sender: WeightBroadcast = engine._core.files  # type: ignore[attr-defined, assignment]
    keep = type(sender)._keep

    def damaged(self: WeightBroadcast, layout: Any, end: int) -> None:
        keep(self, layout, end)
        if layout[0][0] == "model.embed_tokens.weight":
            self._copies[0].view(torch.float32)[:64] *= 1.001

    monkeypatch.setattr(type(sender), "_keep", damaged)
    with pytest.raises(WeightSyncError, match=r"fingerprints of 2 of .*: lm_head.weight, model.embed_tokens"):
        publish(engine, Stream(make_model(1)), version=1)
    engine.close()


def test_a_server_that_stops_in_a_broadcast_holds_up_no_other(
    both: Served, in_parts: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(member_module, "DEAD_S", 2.0)
    monkeypatch.setattr(served, "POLL_TIMEOUT_S", 2.0)
    engine, models = both.engine(0, 1, by_broadcast=True), {k: make_model(k) for k in (1, 2, 3)}
    publish(engine, Stream(models[1]), version=1)
    stream = Stream(models[2])

    def stop(tensors: dict[str, Any]) -> dict[str, Any]:
        both.processes[1].signal(signal.SIGSTOP)
        return tensors

    stream.passes = {2: stop}
    began = time.monotonic()
    try:
        publish(engine, stream, version=2)
        assert states(engine) == ["up", "dead"] and time.monotonic() - began < 30
        submit(engine, make_prompts(5))
        assert max(largest_gap_to(models, g) for g in collect_all(engine)) < 1e-4
    finally:
        both.processes[1].signal(signal.SIGCONT)
    wait_until(lambda: states(engine) == ["up", "up"], "it is back although nobody asks", 60)
    assert "is up and holds version 2" in both.said[-1]  # from the kept copy
    publish(engine, Stream(models[3]), version=3)
    assert states(engine) == ["up", "up"]
    engine.close()


def test_a_server_that_was_started_again_gets_the_broadcast_version_once_more(both: Served, in_parts: None):
    """Its new process never joined a group and took nothing, though the old one had the whole version."""
    engine, model = both.engine(1, by_broadcast=True), make_model(2)
    publish(engine, Stream(model), version=1)
    publish(engine, Stream(model), version=2)  # live: the first came from the kept copy
    both.processes[1].kill()
    submit(engine, make_prompts(5))
    wait_until(lambda: not engine.collect(timeout_s=0.1) and states(engine) == ["dead"], "it is missed", 60)
    both.processes[1] = both.start(both.processes[1].port)
    both.processes[1].wait()
    wait_until(lambda: states(engine) == ["up"], "it is back although nobody asks", 40)
    assert max(largest_gap_to({2: model}, g) for g in collect_all(engine)) < 1e-4
    engine.close()


def kill_in(stream: Stream, process: ServerProcess) -> None:
    """Kills a server in the middle of the second pass over the weights, the one that is sent."""

    def change(tensors):
        (name, first), *rest = tensors.items()
        process.kill()
        return {name: first, **dict(rest)}

    stream.passes = {2: change}


def test_a_server_killed_in_a_publish_is_left_out_and_joins_with_old_weights(both: Served):
    engine, models = both.engine(0, 1), {k: make_model(k) for k in (1, 2, 3)}
    publish(engine, Stream(models[1]), version=1)
    stream = Stream(models[2])
    kill_in(stream, both.processes[1])
    publish(engine, stream, version=2)
    assert states(engine) == ["up", "dead"]
    both.processes[1] = both.start(both.processes[1].port)  # with the weights of `both.model`
    publish(engine, Stream(models[3]), version=3)
    both.processes[1].wait()
    submit(engine, make_prompts(5, 9, 33, 20))
    groups: list[Group] = []

    def joined() -> bool:
        """Servers are looked at while something is asked for."""
        if not engine.in_flight:
            submit(engine, make_prompts(5))
        groups.extend(engine.collect(timeout_s=0.1))
        return states(engine) == ["up", "up"]

    wait_until(joined, "it joins", 60)
    submit(engine, make_prompts(6, 10, 34, 21))
    assert min(len(m.streams) for m in engine._core.members) > 0  # type: ignore[attr-defined]
    for group in groups + collect_all(engine):
        assert {span.policy_version for c in group.completions for span in c.version_spans} == {3}
        assert largest_gap_to(models, group) < 1e-4
    engine.close()


@pytest.mark.parametrize("sends", [True, False], ids=["of the process that sends", "of another one"])
def test_what_a_server_sampled_is_sampled_again_if_it_dies_before_its_canary_is_compared(
    both: Served, sends: bool
):
    """Answers that have ended, too: some of its completions have 12 tokens, others 90."""
    sender, model = both.engine(0, 1), make_model(7)
    verdict = publish(sender, Stream(model), version=1, canary_waits=sends).verdict
    engine = sender if sends else both.engine(0, 1, sends=False)
    if not sends:
        engine.adopt(1)
    fleet: Fleet = engine._core  # type: ignore[assignment]
    for length in (12, 90):
        prompts = [replace(p, id=f"{p.id}/{length}") for p in make_prompts(*[5, 9, 33, 20, 12, 8] * 3)]
        submit(engine, prompts, sampling=SamplingParams(length))
    lost, groups = list(fleet.members[1].streams.values()), []

    def ended(number: int) -> bool:
        groups.extend(engine.collect(timeout_s=0.1))
        return sum(len(s.token_ids) == s.sampling.max_completion_length for s in lost) >= number

    wait_until(lambda: ended(8), "some have ended")  # a fast server may have ended all by now
    both.processes[1].kill()
    wait_until(lambda: ended(0) and states(engine) == ["up", "dead"], "it is missed")
    if verdict is None:
        engine.prompt_logprobs(CANARY)
    else:
        assert verdict().canary_mean_gap < 1e-5
    groups += collect_all(engine)
    assert [(stream.tries, stream.first) for stream in lost] == [(2, 0)] * len(lost)
    assert sorted(len(c.token_ids) for g in groups for c in g.completions) == [12] * 72 + [90] * 72
    assert max(largest_gap_to({1: model}, g) for g in groups) < 1e-4
    both.processes[1] = both.start(both.processes[1].port)
    both.processes[1].wait()
    engine.close()
    sender.close()


def make_sure(engine: VllmEngine, number: int, monkeypatch: pytest.MonkeyPatch) -> list[served.Stream]:
    """Pauses a server in the middle of completions, and lets it be asked what it holds, for the last time."""
    member = engine._core.members[number]  # type: ignore[attr-defined]
    streams = list(member.streams.values())
    for _ in range(20):
        wait_until(lambda: any(4 < len(s.token_ids) < 45 for s in streams), "it samples")
        member.hold()
        counts = member.control.sampled(member.server.label)
        begun = [n for stream in streams if stream.reason is None and (n := counts.get(stream.asked_as, 0))]
        if begun and max(begun) < 60:
            break
        member.control.resume()  # they were almost over when the pause came
    else:
        pytest.fail("no pause met completions in their middle")
    member.server._renewed = 0.0
    member.server._soon(member.server._renew()).result(30)
    monkeypatch.setattr(served, "RENEW_S", 1e9)
    assert all(stream.sure == len(stream.token_ids) for stream in member.server._streams.values())
    return streams


def test_a_server_that_comes_late_and_does_not_say_its_routes_is_refused_by_name(
    both: Served, monkeypatch: pytest.MonkeyPatch
):
    """`routes` is what a run sets that replays them, once all servers of its start have said they can."""
    monkeypatch.setattr(served, "POLL_TIMEOUT_S", 4.0)
    monkeypatch.setattr(member_module, "DEAD_S", 1.0)
    url = both.processes[1].url
    both.processes[1].signal(signal.SIGSTOP)
    try:
        engine = both.engine(0, 1, run="the run in /a")
    finally:
        both.processes[1].signal(signal.SIGCONT)
    engine._core.routes = True  # type: ignore[attr-defined]
    publish(engine, Stream(make_model(1)), version=1)
    words = f"server {url} lacks --enable-return-routed-experts, and this run replays routes: start it again"
    wait_until(lambda: any(words in said for said in both.said), "it is refused", 60)
    assert states(engine) == ["up", "stale"]  # it answers
    assert engine._core.members[1].link is None  # type: ignore[attr-defined]
    other = Control(url, both.token)
    other.lease("the run in /b")  # which may use what this run refuses
    other.lease("the run in /b", 0.0)
    other.close()
    engine.close()


def test_an_odd_answer_to_the_canary_is_a_fault_of_its_server(both: Served, monkeypatch: pytest.MonkeyPatch):
    """Another route of the real server says what nobody asked for, with 200."""
    engine, url = both.engine(0), both.processes[0].url
    monkeypatch.setattr(served, "GENERATE", "/resume")
    said = rf"no server computed the canary's log-probs: {url} is dead: server {url}: /resume answered what"
    with pytest.raises(WeightSyncError, match=rf"{said} cannot be read \(KeyError: 'prompt_logprobs'\)"):
        publish(engine, Stream(make_model(1)), version=1)
    monkeypatch.undo()
    wait_until(lambda: states(engine) != ["dead"], "it answers")
    publish(engine, Stream(make_model(2)), version=2)
    assert states(engine) == ["up"]
    engine.close()


def test_tokens_of_others_weights_do_not_outlive_the_server_that_sampled_them(
    both: Served, monkeypatch: pytest.MonkeyPatch
):
    """It dies when few streams have said what sampled their tokens, or none: those that are sure stay."""
    engine, model = both.engine(0, 1, run="the run in /a"), make_model(8)
    publish(engine, Stream(model), version=1)
    with others(both, engine, 1) as give:
        submit(engine, make_prompts(*[5, 9, 33, 20, 12, 8] * 3), 12)  # in three waves
        lost = make_sure(engine, 1, monkeypatch)
        member = engine._core.members[1]  # type: ignore[attr-defined]
        ours = member.control.sampled(member.server.label)
        sampled = [ours.get(stream.asked_as, 0) for stream in lost]
        take, goes_on = served.Stream.take, threading.Event()

        def stop(stream: served.Stream, message: dict[str, Any], version: int) -> None:
            """Stops the server when it goes on, before a stream ends and says what sampled its tokens."""
            take(stream, message, version)
            is_new = 0 < stream.sure < len(stream.token_ids) - 2 and stream.reason is None
            if stream in lost and is_new and not goes_on.is_set():
                both.processes[1].signal(signal.SIGSTOP)
                goes_on.set()

        monkeypatch.setattr(served.Stream, "take", stop)
        with ThreadPoolExecutor(1) as thread:
            giving = thread.submit(give)
            try:
                assert goes_on.wait(60), both.said[-4:]
            finally:
                both.processes[1].kill()
            giving.exception(60)  # the answer to its last call may be lost
    groups = collect_all(engine)
    again = [(stream.first, n) for stream, n in zip(lost, sampled, strict=True) if stream.tries == 2]
    assert any(first > 0 for first, _ in again) and all(first <= n for first, n in again)
    assert [len(c.token_ids) for g in groups for c in g.completions] == [90] * 216
    assert max(largest_gap_to({1: model}, g) for g in groups) < 1e-4
    both.processes[1] = both.start(both.processes[1].port)
    both.processes[1].wait()
    engine.close()


def test_others_weights_are_found_while_completions_go_on(both: Served, monkeypatch: pytest.MonkeyPatch):
    silence(monkeypatch)
    monkeypatch.setattr(served, "RENEW_S", 0.1)
    engine, model = both.engine(0, 1, run="the run in /a"), make_model(8)
    publish(engine, Stream(model), version=1)
    submit(engine, make_prompts(*[5, 9, 33, 20, 12, 8] * 3))
    fleet: Fleet = engine._core  # type: ignore[assignment]
    with others(both, engine, 1) as give:
        give()
    wait_until(lambda: fleet.members[1].server.version == -1, "it is known, although nobody asks for answers")
    assert "that nobody has proved (1." in fleet.members[1].server.doubt
    assert max(largest_gap_to({1: model}, g) for g in collect_all(engine)) < 1e-4
    engine.close()


def test_completions_of_a_killed_server_go_on_from_their_tokens(
    both: Served, monkeypatch: pytest.MonkeyPatch
):
    engine, model = both.engine(0, 1, run="the run in /a"), make_model(7)
    fleet: Fleet = engine._core  # type: ignore[assignment]
    publish(engine, Stream(model), version=4)
    submit(engine, make_prompts(*[5, 9, 33, 20, 12, 8] * 3), 12)  # in three waves, so that a pause meets one
    lost = make_sure(engine, 1, monkeypatch)
    both.processes[1].kill()
    groups = collect_all(engine)
    ask = partial(fleet.answers, timeout_s=0.1, waiting_for="the news")
    wait_until(lambda: ask() == [] and states(engine) == ["up", "dead"], "it is known to be dead")
    assert sorted(g.prompt.id for g in groups) == sorted(f"tiny/{k}" for k in range(18))
    gone_on = [stream for stream in lost if stream.tries == 2 and stream.first > 0]
    assert gone_on, ([(s.tries, s.first, s.sure) for s in lost], both.said[-4:])
    completions = [c for g in groups for c in g.completions]
    assert all(len(c.token_ids) == 90 and c.version_spans == [VersionSpan(4, 90)] for c in completions)
    assert max(largest_gap_to({4: model}, g) for g in groups) < 1e-4
    # Spent numbers are not drawn again: what follows the break is not what followed the prompt.
    assert all(s.token_ids[s.first : s.first + 4] != s.token_ids[:4] for s in gone_on)
    dying = Stream(make_model(5))
    dying.canary = lambda: both.processes[0].kill() or Stream(make_model(5)).canary()  # type: ignore[method-assign]
    with pytest.raises(WeightSyncError, match=r"no server computed the canary's log-probs: .* is dead"):
        publish(engine, dying, version=5)
    submit(engine, make_prompts(5))
    fleet.timeout_s, url = 5.0, both.processes[0].url
    with pytest.raises(EngineError, match=f"no server was up for timeout_s=5 .*{url} is dead"):
        for _ in range(10):
            engine.collect(timeout_s=2.0)
    engine.close()
