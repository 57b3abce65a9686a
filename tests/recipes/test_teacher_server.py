"""A teacher behind a real vLLM server: log-probs, checks at the start, faults, and a run that learns."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import httpx
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from recipes.grpo import main
from recipes.models import teacher_model, teacher_server
from recipes.tasks.scoring import ScoringServer
from rl.batch import pack
from rl.causal import CausalPolicy
from rl.config.read import load_config
from rl.teacher import DIVERGENCES, Teacher
from rl.update import pack_rules, update_policy
from rollout.engine import EngineError
from rollout.vllm.lock import make_token, read_token
from tests.conftest import SPECIAL, WORDS, word_tokenizer
from tests.rl.taught import ALONE, shown
from tests.scoring import alone
from tests.vllm_servers import ServerProcess, free_port
from tests.waiting import wait_until

pytestmark = [pytest.mark.rotation, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def teacher_dir(tiny_model_dir, tmp_path_factory):
    """Heads of 32, for which vLLM's CPU attention has a kernel; generation settings that none may follow. The
    folder `student` beside it holds a model of the same form with other weights.
    """
    folder = tmp_path_factory.mktemp("teacher")
    config = LlamaConfig.from_pretrained(tiny_model_dir, hidden_size=64, num_attention_heads=2)
    config.num_key_value_heads, config.head_dim = 1, 32
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        model.save_pretrained(folder / "student")
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "model")
    own = {"do_sample": True, "temperature": 0.2, "top_k": 3, "repetition_penalty": 2.0}
    (folder / "model" / "generation_config.json").write_text(json.dumps(own))
    for name in ("model", "student"):
        AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder / name)
    return folder / "model"


@pytest.fixture(scope="module")
def served(teacher_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    make_token(folder / "token")
    server = ServerProcess(
        teacher_dir, folder / "token", folder / "server.log", reads_text=True, **{"max-logprobs": 105}
    )
    try:
        yield server.wait(), folder / "token"
    finally:
        server.kill()


@pytest.fixture
def make(served, tiny_model_dir, teacher_dir):
    """(policy, its teacher, config): the same teacher, served or of this process."""
    server, token = served

    def make(kind, *overrides, is_served=True, top_k=5):
        where = {"url": server.url, "token_file": str(token)}
        where = where if is_served else {"name": str(teacher_dir), "dtype": "fp32"}
        section = {"divergence": kind, "top_k": top_k, **where}
        settings = [f"model.name={tiny_model_dir}", "model.dtype=fp32", f"teacher={json.dumps(section)}"]
        config = load_config(None, [*settings, *ALONE, *overrides])
        policy = CausalPolicy(config.model, Accelerator(cpu=True), temperature=1.0)
        assert policy.settle_attention() is None
        at = teacher_server(config.teacher)
        model = at.score if at else teacher_model(config.teacher)
        return policy, Teacher(config.teacher, model, policy, longest=64, note=print), config

    return make


@pytest.mark.parametrize("demonstrations", [False, True])
def test_log_probs_are_those_of_the_same_model_here(make, ragged_groups, demonstrations):
    """Within 1e-4 nats in fp32, in ragged micro-batches; of a few top ids the rest is exact to 1e-4, too."""
    groups, advantages = ragged_groups()
    groups = shown(groups) if demonstrations else groups
    for kind in ("sampled", "reverse"):
        (policy, theirs, config), (_, ours, _) = (
            make(kind, "train.token_budget=60", is_served=is_served) for is_served in (True, False)
        )
        (batch,) = pack(groups, advantages, pack_rules(config))
        assert len(batch.micro_batches) > 3
        for drawn in policy.prepare(batch, draw=0):
            found, expected = theirs.score(drawn), ours.score(drawn)
            torch.testing.assert_close(found.logprobs_L, expected.logprobs_L, rtol=0, atol=1e-4)
            if kind != "sampled":
                assert (found.ids_LK == expected.ids_LK).float().mean() > 0.99
                torch.testing.assert_close(found.logprobs_LK, expected.logprobs_LK, rtol=0, atol=1e-4)
                torch.testing.assert_close(found.rest_L, expected.rest_L, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["sampled", *DIVERGENCES])
def test_an_update_goes_where_that_of_a_local_teacher_goes(make, ragged_groups, gradients, kind):
    groups, advantages = ragged_groups()
    found = []
    for is_served in (True, False):
        policy, teacher, config = make(kind, is_served=is_served)
        found.append(gradients(policy, config, groups, advantages, teacher=teacher))
    size, gap = (
        sum(x.double().square().sum() for x in xs) ** 0.5
        for xs in (found[1].values(), (found[0][n] - found[1][n] for n in found[1]))
    )
    assert size > 1e-3 and gap / size < 1e-3


@pytest.mark.parametrize("kind", ["sampled", "reverse"])
def test_a_run_learns_as_from_a_local_teacher(served, teacher_dir, tmp_path, kind):
    server, token = served
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"What is w{i} ?"}) + "\n" for i in range(10)))
    rows = {}
    for name, where in (
        ("served", {"url": server.url, "token_file": str(token)}),
        ("local", {"name": str(teacher_dir), "dtype": "fp32"}),
    ):
        (tmp_path / "config.yaml").write_text("{}")
        words = [f"model.name={teacher_dir.with_name('student')}", "model.dtype=fp32", f"data.source={data}"]
        words += ["data.max_prompt_length=32", "sampling.max_completion_length=10", "train.steps=12"]
        words += ["train.prompts_per_step=4", "train.group_size=4", "engine.name=transformers", *ALONE]
        words += ["optimizer.lr=3e-3", f"teacher={json.dumps({'divergence': kind, 'top_k': 8, **where})}"]
        assert main([str(tmp_path / "config.yaml"), f"run_dir={tmp_path / name}", *words]) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows[name] = [json.loads(line)["teacher/kl"] for line in lines]
    ends = {name: sum(kls[-3:]) / 3 for name, kls in rows.items()}
    assert len(rows["served"]) == 12 and ends["served"] < 0.8 * rows["served"][0]
    assert rows["served"][:3] == pytest.approx(rows["local"][:3], abs=1e-3)
    assert ends["served"] == pytest.approx(ends["local"], abs=0.1)
    inputs = json.loads((tmp_path / "served" / "inputs.json").read_text())
    assert inputs["teacher"] == {"model": str(teacher_dir)}


def test_the_start_compares_tokenizers_lengths_and_log_probs(served, tiny_model_dir, tmp_path):
    server, token = served
    at = ScoringServer(server.url, read_token(token), timeout_s=60)
    ours = AutoTokenizer.from_pretrained(tiny_model_dir)
    at.check(ours, 127, 20)
    with pytest.raises(
        ValueError, match=r"takes 127 tokens .* may have 128; serve it with --max-model-len 129"
    ):
        at.check(ours, 128, 0)
    words = [*SPECIAL, *WORDS]
    words[20], words[21] = words[21], words[20]
    with pytest.raises(
        ValueError, match=r"another tokenizer: ids stand for 'w14w16w15.*' here and 'w14w15w16.*' there"
    ):
        at.check(word_tokenizer(tmp_path, words), 64, 0)
    with pytest.raises(ValueError, match=r"log-probs of 1 rows: /v1/completions answered 400 .*120"):
        at.check(ours, 64, 120)
    with pytest.raises(ValueError, match=r"rejects this token; .*teacher: teacher\.token_file"):
        ScoringServer(server.url, "another token than its own", timeout_s=60).check(ours, 64, 0)
    with pytest.raises(ValueError, match=r"/v1/completions answered 400"):  # an id that it does not have
        at.score([[5, 2000]], 0)


def test_a_server_that_is_gone_or_silent_ends_the_run_by_name(served, tiny_model_dir, ragged_groups, make):
    gone = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(EngineError, match=rf"server {gone}: log-probs of 1 rows: ConnectError"):
        ScoringServer(gone, "", timeout_s=5).score([[5, 6]], 0)
    server, token = served
    groups, advantages = ragged_groups()
    policy, teacher, config = make("sampled")
    teacher.ask = ScoringServer(server.url, read_token(token), timeout_s=2).score
    (batch,) = pack(groups, advantages, pack_rules(config))
    optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.5)
    before = [p.detach().clone() for _, p in policy.trainable()]
    server.signal(signal.SIGSTOP)
    try:
        with pytest.raises(EngineError, match=r"log-probs of 24 rows: no answer within timeout_s=2"):
            update_policy(policy, optimizer, [batch], config.loss, world=alone(), teacher=teacher)
    finally:
        server.signal(signal.SIGCONT)
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, policy.trainable(), strict=True))


def test_weights_that_change_in_place_end_the_run_and_its_continuation_by_name(
    served, teacher_dir, tmp_path, capsys
):
    """The server keeps its address and its model's name. It is of no more use for other tests."""
    server, token = served
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"What is w{i} ?"}) + "\n" for i in range(10)))
    (tmp_path / "config.yaml").write_text("{}")
    words = [str(tmp_path / "config.yaml"), f"run_dir={tmp_path / 'run'}", "engine.name=transformers", *ALONE]
    words += [f"model.name={teacher_dir.with_name('student')}", "model.dtype=fp32", f"data.source={data}"]
    words += ["data.max_prompt_length=32", "sampling.max_completion_length=10", "train.prompts_per_step=4"]
    words += ["train.group_size=4", f"teacher={json.dumps({'url': server.url, 'token_file': str(token)})}"]
    assert main([*words, "train.steps=2"]) == 0
    record = tmp_path / "run" / "teacher.json"
    before = json.loads(record.read_text())
    at = ScoringServer(server.url, read_token(token), timeout_s=60, record=record)
    assert len(at.score([[5, 6, 7]], 0)) == 1 and len(before["logprobs"]) == len(before["ids"]) - 1 > 20
    asked = {"method": "reload_weights", "kwargs": {"weights_path": str(teacher_dir.with_name("student"))}}
    headers = {"Authorization": f"Bearer {read_token(token)}"}
    httpx.post(f"{server.url}/collective_rpc", json=asked, headers=headers, timeout=60).raise_for_status()
    words_of_fault = "has other weights than when the run began: the canary's log-probs are"
    with pytest.raises(EngineError, match=words_of_fault):
        at.score([[5, 6, 7]], 0)
    capsys.readouterr()
    assert main([*words, "train.steps=3"]) == 1
    assert words_of_fault in " ".join(capsys.readouterr().err.split())
    assert json.loads(record.read_text()) == before
    assert not list((tmp_path / "run" / "checkpoints").glob("*3"))


def test_logits_are_not_taken_for_log_probs(teacher_dir, tmp_path):
    """A server with --logprobs-mode raw_logits: a probe's likeliest id would have a probability above 1."""
    make_token(token := tmp_path / "token")
    options = {"logprobs-mode": "raw_logits"}
    server = ServerProcess(teacher_dir, token, tmp_path / "server.log", reads_text=True, **options)
    try:
        at = ScoringServer(server.wait().url, read_token(token), timeout_s=60)
        with pytest.raises(ValueError, match=r"have the mass .*serve it with --logprobs-mode raw_logprobs"):
            at.check(AutoTokenizer.from_pretrained(teacher_dir), 64, 5)
    finally:
        server.kill()


def test_a_run_that_waits_for_its_teacher_ends_at_the_first_signal(tiny_model_dir, tmp_path):
    data, log = tmp_path / "data.jsonl", tmp_path / "log"
    data.write_text("".join(json.dumps({"prompt": f"What is w{i} ?"}) + "\n" for i in range(10)))
    (tmp_path / "config.yaml").write_text("{}")
    words = [f"run_dir={tmp_path / 'run'}", f"model.name={tiny_model_dir}", f"data.source={data}", *ALONE]
    words += ["engine.name=transformers", "train.prompts_per_step=4", "train.group_size=4"]
    words += ["data.max_prompt_length=32", "sampling.max_completion_length=10"]
    words += [f"teacher={json.dumps({'url': f'http://127.0.0.1:{free_port()}'})}"]
    with log.open("wb") as out:
        command = [sys.executable, "-m", "recipes.grpo", str(tmp_path / "config.yaml"), *words]
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        wait_until(lambda: "the teacher does not answer yet" in log.read_text(), "it waits", 100)
        process.send_signal(signal.SIGINT)
        assert process.wait(100) == 130
    finally:
        process.kill()
        process.wait(30)
    assert "stopping after this step" not in log.read_text() and "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher={url: 'http://x:1', name: y}"], "teacher needs one of teacher.name and teacher.url"),
        (["teacher={name: y, token_file: z}"], "teacher.token_file does nothing without teacher.url"),
        (["teacher={url: 'http://x:1', dtype: fp32}"], "teacher.dtype does nothing without teacher.name"),
        (
            ["teacher={url: 'http://x:1'}", "sampling.temperature=0.7"],
            "the log-probs of teacher.url are of temperature 1",
        ),
        (
            ["teacher={url: 'http://x:1/'}", "engine={name: server, urls: ['http://x:1'], token_file: t}"],
            "is one of engine.urls, which are given the policy's weights",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, overrides)
