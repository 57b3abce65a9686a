"""vLLM with its engine core in a process of its own: the same samples, the same proofs, and no process left.

One engine serves all tests but the last, which kills one.
"""

import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import torch
import transformers
from sync_faults import FAULTS, Q0
from tiny_llama import (
    CANARY,
    END,
    Stream,
    collect_all,
    largest_gap,
    make_model,
    make_prompts,
    make_tokenizer,
    save,
    token_logprobs,
)

from rl.types import SamplingParams
from rollout.engine import EngineError
from rollout.vllm import bucket as vllm_bucket
from rollout.vllm import start as vllm_start
from rollout.vllm.start import CORE_LOG_LEVEL
from rollout.weight_sync import WeightSyncError, publish
from tests.calling import call
from tests.rl.families import save_tiny, tiny_config
from tests.vllm_engines import needs_vllm, start_vllm

pytestmark = needs_vllm
HEADS_OF_32 = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 512}
LAUNCHER = {"WORLD_SIZE": "1", "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
TINY = {"dtype": torch.float32, "max_model_len": 128, "max_num_seqs": 32, "kv_cache_gib": 0.03}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(make_model(0), tmp_path_factory.mktemp("model"))


def surroundings():
    """What a training process relies on; vLLM reads its own variables later."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "PYTEST_"))}
    return torch.get_rng_state().tolist(), torch.get_num_threads(), random.getstate(), environment


@pytest.fixture(scope="module", params=[False, True], ids=["one_process", "worker_apart"])
def started(folder, request):
    """(engine, surroundings before its start, after it, environment of its core), under `accelerate launch`.

    Its bucket has the size of the largest tensor: the weights come in several fillings, which cut layers in
    two.
    """
    given = []

    def start(core):
        given.append(dict(os.environ))  # /proc does not show it: vLLM writes its title over it
        begin(core)

    begin = vllm_start.EarlyCore.start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_bucket, "BUCKET_BYTES", 1)
        for name, value in LAUNCHER.items():
            patch.setenv(name, value)
        patch.setenv(CORE_LOG_LEVEL, "INFO")
        patch.setattr(vllm_start.EarlyCore, "start", start)
        before = surroundings()
        engine = start_vllm(folder, make_tokenizer(), process="own", apart=request.param, **TINY)
        after = surroundings()
    yield engine, before, after, given[-1]
    engine.close()


@pytest.fixture
def engine(started):
    """The engine with the weights it was started from."""
    own = started[0]
    assert own.in_flight == 0
    if own.version != 0:
        own.update_weights(Stream(make_model(0)), version=0)
    return own


def test_the_core_is_a_process_of_its_own_and_its_start_changes_nothing_here(started):
    engine, before, after, _ = started
    assert psutil.Process(engine._core.pid).ppid() == os.getpid()
    assert before == after


def test_the_core_says_more_than_this_process(started):
    """What the core says has a file; here it would be in the middle of the display."""
    assert started[3]["VLLM_LOGGING_LEVEL"] == "INFO" and os.environ["VLLM_LOGGING_LEVEL"] == "ERROR"
    assert logging.getLogger("vllm").level == logging.ERROR


def test_the_core_is_no_rank_of_the_launcher(started):
    """With torch's word that the launcher opens the store, the core would wait for one at its own port."""
    assert started[3].keys() & LAUNCHER.keys() == set()


def test_the_sockets_of_trainer_and_core_leave_no_file(started):
    """They had a folder of their own, which went when both had met: nothing is left for a kill to leave."""
    engine, _, _, environment = started
    sockets = Path(environment["VLLM_RPC_BASE_PATH"])
    assert sockets.name.startswith("cohort-") and not sockets.exists()
    assert psutil.pid_exists(engine._core.pid) and "VLLM_RPC_BASE_PATH" not in os.environ


def test_samples_are_those_of_an_engine_inside_this_process(engine, folder):
    inside = start_vllm(folder, make_tokenizer(), process="inside", **TINY)
    try:
        options = {
            "num_completions": 4,
            "sampling": SamplingParams(24, temperature=0.8, top_k=50, stop_token_ids=(END,)),
            "seeds": [1, 2, 3],
        }
        expected = inside.generate(call(make_prompts(4, 40, 17), **options))
        found = engine.generate(call(make_prompts(4, 40, 17), **options))
        for a, b in zip(expected, found, strict=True):
            for x, y in zip(a.completions, b.completions, strict=True):
                assert (x.token_ids, x.text, x.finish_reason) == (y.token_ids, y.text, y.finish_reason)
                assert x.version_spans == y.version_spans
                assert largest_gap(x.behavior_logprobs, y.behavior_logprobs) < 1e-5
        assert inside.tensors == engine.tensors
        assert inside.fingerprints() == engine.fingerprints()
    finally:
        inside.close()


def test_after_a_sync_the_engine_computes_as_the_policy_does(engine):
    policy = make_model(1)
    assert largest_gap(engine.prompt_logprobs(CANARY), token_logprobs(policy, CANARY)) > 0.1
    publish(engine, Stream(policy), version=7, tolerance=1e-4)
    assert (engine.version, len(engine.tensors)) == (7, 2 * 9 + 2 + 1)
    assert largest_gap(engine.prompt_logprobs(CANARY), token_logprobs(policy, CANARY)) < 2e-5


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_fault_on_the_way_is_caught_by_name(engine, fault):
    with pytest.raises(WeightSyncError, match="does not hold version 1") as caught:
        publish(engine, Stream(make_model(1), {2: fault}), version=1, tolerance=1e9)
    named = str(caught.value).rpartition(": ")[2].split(", ")
    # vLLM stacks q, k and v and leaves memory that was never written where one of the three is dropped.
    assert set(FAULTS[fault]) <= set(named) <= {*FAULTS[fault], *(Q0.replace("q_", k) for k in ("k_", "v_"))}


def test_weights_of_another_model_are_refused_and_the_next_update_heals(engine):
    with pytest.raises(ValueError, match=r"vLLM's model has no weight model\.norm\.bias"):
        engine.update_weights([("model.norm.bias", torch.zeros(64))], version=1)
    with pytest.raises(EngineError, match="weights of engine vllm are unknown"):
        engine.generate(call(make_prompts(4), num_completions=1, sampling=SamplingParams(2), seeds=[1]))
    publish(engine, Stream(make_model(1)), version=2, tolerance=1e-4)


@pytest.mark.parametrize("recompute_kv", [False, True])
def test_an_update_under_running_completions_switches_where_the_spans_say(engine, monkeypatch, recompute_kv):
    """When the short completions are there, the long ones have 4 tokens or more, and up to 100 to go."""
    monkeypatch.setattr(engine._core, "recompute_kv", recompute_kv)
    long, short = make_prompts(20, 6)
    for version in range(1, 9):  # until the long ones are under way still when the update comes
        old, new = make_model(version - 1), make_model(version)
        engine.submit(call([long], num_completions=8, sampling=SamplingParams(104), seeds=[1]))
        engine.submit(call([short], num_completions=2, sampling=SamplingParams(4), seeds=[2]))
        found = engine.collect(timeout_s=60.0)
        publish(engine, Stream(new), version=version, tolerance=1e-4)
        found += collect_all(engine)
        completions = next(g.completions for g in found if g.prompt.id == long.id)
        if all(len(c.version_spans) == 2 for c in completions):
            break
    assert [g.prompt.id for g in found] == [short.id, long.id]
    for c in completions:
        first, second = c.version_spans
        assert (first.policy_version, second.policy_version) == (version - 1, version)
        assert first.num_tokens + second.num_tokens == len(c.token_ids) == 104 and first.num_tokens >= 4
        ids, k = [*long.token_ids, *c.token_ids], first.num_tokens
        before, after = token_logprobs(old, ids)[19 : 19 + k], token_logprobs(new, ids)[19 + k :]
        assert largest_gap(c.behavior_logprobs[:k], before) < 2e-5
        assert (largest_gap(c.behavior_logprobs[k:], after) < 2e-5) == recompute_kv


def test_a_sync_goes_before_the_completions_that_are_queued(engine):
    """Five groups of 32 completions on 32 seats: the canary gets a seat when the first one is free."""
    prompts = make_prompts(5, 5, 5, 5, 5)
    engine.submit(call(prompts, num_completions=32, sampling=SamplingParams(100), seeds=list(range(5))))
    publish(engine, Stream(make_model(1)), version=1, tolerance=1e-4)
    assert len(engine.collect(timeout_s=0.0)) <= 1
    assert len(collect_all(engine)) >= 4


def test_a_call_that_runs_out_of_time_says_so_and_leaves_nothing_behind(engine, monkeypatch):
    options = {"num_completions": 2, "sampling": SamplingParams(8), "seeds": [1, 2]}
    expected = engine.generate(call(make_prompts(4, 5), **options))
    monkeypatch.setattr(engine, "timeout_s", 0.0)
    with pytest.raises(EngineError, match=r"no completion of 2 prompts was finished within timeout_s=0;"):
        engine.generate(call(make_prompts(4, 5), **options))
    monkeypatch.undo()
    again = engine.generate(call(make_prompts(4, 5), **options))
    assert [c.token_ids for g in again for c in g.completions] == [
        c.token_ids for g in expected for c in g.completions
    ]


def test_a_core_that_does_not_answer_in_time_is_named(engine, monkeypatch):
    process = psutil.Process(engine._core.pid)
    monkeypatch.setattr(engine._core, "timeout_s", 0.2)
    process.suspend()
    try:
        with pytest.raises(EngineError, match=r"cohort_fingerprints.*no answer within timeout_s=0\.2"):
            engine.fingerprints()
        engine.submit(call(make_prompts(4), num_completions=2, sampling=SamplingParams(4), seeds=[1]))
        began = time.monotonic()
        assert engine.collect(timeout_s=0.3) == [] and time.monotonic() - began < 20
    finally:
        process.resume()
    monkeypatch.undo()
    assert len(collect_all(engine)) == 1


WATCHED = """
    import multiprocessing, os, sys, time
    from rollout.vllm.start import end_with

    def child(parent):
        end_with(parent)
        time.sleep(60)

    if __name__ == "__main__":
        process = multiprocessing.get_context("fork").Process(target=child, args=(os.getpid(),))
        process.start()
        print(process.pid, flush=True)
        time.sleep(60)
"""


def test_a_core_ends_when_its_trainer_is_killed():
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    trainer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WATCHED)], env=environment, stdout=subprocess.PIPE, text=True
    )
    core = psutil.Process(int(trainer.stdout.readline()))
    trainer.kill()
    trainer.wait()
    core.wait(timeout=60)


@pytest.mark.parametrize("timeout_s", [0.0, 0.5])
def test_a_core_that_does_not_start_in_time_is_named_and_killed(folder, started, timeout_s):
    before = multiprocessing.active_children()  # `started`, which has done vLLM's imports
    with pytest.raises(
        EngineError, match=rf"engine core did not start within timeout_s={timeout_s:g}; raise engine\.t"
    ) as caught:
        start_vllm(folder, make_tokenizer(), process="own", timeout_s=timeout_s, **TINY)
    cause = caught.value.__cause__  # before it was given its work, or after
    assert isinstance(cause, BrokenPipeError) or "initialization failed" in str(cause)
    assert set(multiprocessing.active_children()) == set(before)


def test_a_core_that_starts_after_all_is_stopped_and_named(folder, started, monkeypatch):
    """The time is over when it has just started, and the killer finds nothing to kill."""
    before = multiprocessing.active_children()
    monkeypatch.setattr(multiprocessing, "active_children", list)
    with pytest.raises(EngineError, match=r"engine core did not start within timeout_s=0; raise") as caught:
        start_vllm(folder, make_tokenizer(), process="own", timeout_s=0.0, **TINY)
    monkeypatch.undo()
    assert caught.value.__cause__ is None
    assert set(multiprocessing.active_children()) == set(before)


def test_closing_ends_the_process_in_the_middle_of_its_work(engine):
    process = psutil.Process(engine._core.pid)
    engine.submit(call(make_prompts(4), num_completions=8, sampling=SamplingParams(100), seeds=[1]))
    began = time.monotonic()
    engine.close()
    engine.close()
    assert time.monotonic() - began < 20
    assert not psutil.pid_exists(process.pid) and engine.in_flight == 0
    with pytest.raises(EngineError, match="the engine is closed"):
        engine.submit(call(make_prompts(4), num_completions=1, sampling=SamplingParams(1), seeds=[1]))


@pytest.mark.parametrize("killed", ["core", "core_of_worker", "worker"])
def test_a_core_that_dies_is_an_error_within_seconds_and_leaves_no_process(folder, killed):
    engine = start_vllm(folder, make_tokenizer(), process="own", apart=killed != "core", **TINY)
    pid = engine._core.pid
    workers = [process.pid for process in psutil.Process(pid).children()]
    assert len(workers) == (killed != "core")
    engine.submit(call(make_prompts(4), num_completions=2, sampling=SamplingParams(100), seeds=[1]))
    os.kill(workers[0] if killed == "worker" else pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"failed while sampling 2 submitted completions: .*"):
        while True:
            engine.collect(timeout_s=60.0)
    with pytest.raises(WeightSyncError, match="engine core failed"):
        publish(engine, Stream(make_model(1)), version=1, tolerance=1e-4)
    with pytest.raises(EngineError, match=r"engine core failed|weights of engine vllm are unknown"):
        engine.submit(call(make_prompts(4), num_completions=2, sampling=SamplingParams(4), seeds=[1]))
    engine.close()
    assert time.monotonic() - began < 40
    left = [psutil.Process(each) for each in (pid, *workers) if psutil.pid_exists(each)]
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in left)  # of its core, which is gone
    assert not psutil.pid_exists(pid) and not multiprocessing.active_children()


@pytest.mark.slow
def test_a_class_that_vllm_would_change_is_left_to_a_process_of_its_own(tmp_path):
    """vLLM computes OLMo with transformers' class, and makes every other instance of it fail."""
    folder = save_tiny("olmo2", tmp_path, tiny_config("olmo2", **HEADS_OF_32))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with pytest.raises(
        ValueError, match=r"engine\.process=inside: vLLM computes .* with transformers' own class"
    ):
        start_vllm(folder, make_tokenizer(), **TINY, process="inside")
    engine = start_vllm(folder, make_tokenizer(), **TINY)
    try:
        assert engine.runs_alone
        logits = model(input_ids=torch.tensor([CANARY])).logits[0, :-1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(CANARY)[1:, None])[:, 0].tolist()
        assert engine.prompt_logprobs(CANARY) == pytest.approx(expected, abs=1e-3)
    finally:
        engine.close()


def test_a_core_runs_in_the_process_that_had_imported_vllm(folder, monkeypatch):
    """The engine proves its weights as any other, and a second one gets a process of its own again."""
    before = surroundings()
    vllm_start.begin_early()
    (early,) = vllm_start._early
    assert surroundings() == before
    engine = start_vllm(folder, make_tokenizer(), process="own", **TINY)
    try:
        assert engine._core.pid == early.pid and not vllm_start._early
        report = publish(engine, Stream(make_model(1)), version=1, tolerance=1e-4)
        assert report.canary_max_gap < 1e-4
    finally:
        engine.close()
    assert not psutil.pid_exists(early.pid)
    vllm_start.end_early()


def test_an_early_process_works_in_the_environment_of_the_hand_over(tmp_path, monkeypatch):
    monkeypatch.setenv("SAID_BEFORE", "yes")
    vllm_start.begin_early()
    early = vllm_start._early.pop()
    monkeypatch.setenv("SAID_LATER", "yes")
    monkeypatch.delenv("SAID_BEFORE")
    told = {"args": ["sh", "-c", f"env > {tmp_path}/told"], "check": True}
    early.Process(target=subprocess.run, name="EngineCore", kwargs=told).start()
    early.join(120)
    told = (tmp_path / "told").read_text().splitlines()
    assert early.exitcode == 0 and "SAID_LATER=yes" in told and "SAID_BEFORE=yes" not in told


def test_an_early_process_that_nobody_takes_is_ended(folder):
    vllm_start.begin_early()
    (early,) = vllm_start._early
    vllm_start.end_early()
    assert not psutil.pid_exists(early.pid) and not vllm_start._early
    too_late = (EngineError, r"engine core did not start within timeout_s=0; raise", {"timeout_s": 0.0})
    refused = (ValueError, "vLLM did not start with", {"max_model_len": 10**7})
    for kind, words, changes in (too_late, refused):
        vllm_start.begin_early()
        (early,) = vllm_start._early
        with pytest.raises(kind, match=words):
            start_vllm(folder, make_tokenizer(), process="own", **TINY | changes)
        assert not psutil.pid_exists(early.pid) and not vllm_start._early
