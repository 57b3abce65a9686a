"""A real vLLM server under `cohort serve`: locked, given weights, and proved to hold them or caught by name.

One server serves all tests; the last ones kill and end it.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import psutil
import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from tiny_llama import CANARY, changed, largest_gap, make_model, make_tokenizer, save, token_logprobs

from rollout.fingerprint import compared_part, fingerprints, mismatches
from rollout.vllm.control import Control, PushRefused, ServerDead
from rollout.vllm.file_server import INDEX
from rollout.vllm.lock import SAMPLED, read_token
from rollout.vllm.weight_files import WeightFiles
from tests.vllm_engines import needs_vllm
from tests.vllm_servers import end_with_us, free_port

pytestmark = needs_vllm
Q0, Q1 = (f"model.layers.{k}.self_attn.q_proj.weight" for k in (0, 1))
DOWN, EMBED, HEAD = "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight", "lm_head.weight"

START_S = 280.0
SMALL = ("--dtype", "float32", "--max-model-len", "128", "--kv-cache-memory-bytes", str(2**25))


@dataclass
class Running:
    """What `cohort serve` said and wrote."""

    url: str
    process: subprocess.Popen[bytes]
    token_file: Path
    log: Path
    said: str


@contextmanager
def serving(model: Path, folder: Path, *options: str) -> Iterator[Running]:
    """A server of `model` on a free port, which is up; it writes into `folder`."""
    port, log = free_port(), folder / "server.log"
    # An engine inside this process has told vLLM to be silent, and to keep to one process.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")} | {
        "OMP_NUM_THREADS": "1"
    }
    words = [str(model), "--port", str(port), "--token-file", str(folder / "token"), *SMALL, *options]
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "recipes.cli", "serve", *words],
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            cwd=Path(__file__).parents[2],
            start_new_session=True,
        )
    end = end_with_us(process.pid)  # and the servers then end with `cohort serve`
    try:
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        said, deadline = b"", time.monotonic() + START_S
        while not said.endswith(b"\n"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            said += process.stdout.read() or b""
            time.sleep(0.1)
        yield Running(f"http://127.0.0.1:{port}", process, folder / "token", log, said.decode())
    finally:
        end.kill()
        end.wait(30)
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        process.wait(60)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    model = save(make_model(0), folder / "model")
    make_tokenizer().save_pretrained(model)
    with serving(model, folder) as server:
        yield server


@pytest.fixture(scope="module")
def control(running):
    control = Control(running.url, read_token(running.token_file), timeout_s=60.0)
    yield control
    control.close()


@pytest.fixture
def files(control, tmp_path):
    """A writer of its own; the server holds what the test before left, and gets whole weights first."""
    return WeightFiles(tmp_path / "weights", control.describe())


def load(control, push):
    control.pause()
    try:
        control.load(push)
    finally:
        control.resume()


def wrong(control, model, version):
    """Names of the tensors that the server computes with and that are not the model's."""
    held, own = control.describe(), dict(model.named_parameters())
    parts = ((name, compared_part(own[one.source], one, version)) for name, one in held.items())
    return mismatches(fingerprints(parts), control.fingerprints(version))


def version(control):
    holds = control.holds()
    return int(holds.partition(".")[0]) if holds else None


def generate(control, **sampling):
    body = {"token_ids": CANARY, "sampling_params": {"max_tokens": 1, "temperature": 1.0} | sampling}
    answer = control._client.post("/inference/v1/generate", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def canary(control):
    given = generate(control, prompt_logprobs=0)["prompt_logprobs"]
    return [at[str(token)]["logprob"] for at, token in zip(given[1:], CANARY[1:], strict=True)]


def rewritten(push, change):
    """A push of other tensors than the writer was given, with the right checksums all the same."""
    folder = Path(push.where).with_name("rewritten")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(push.where, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = change(load_file(file))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(tensors, file.name)
    index["metadata"]["files"] = {file.name: xxhash.xxh3_128_hexdigest(file.read_bytes())}
    (folder / INDEX).write_text(text := json.dumps(index))
    return replace(push, where=str(folder), checksum=xxhash.xxh3_128_hexdigest(text.encode()))


def test_the_line_for_the_trainer_and_the_facts(running, control):
    keys = f"'engine.urls=[{running.url}]' engine.token_file={running.token_file} engine.dtype=float32"
    assert running.said == f"engine.name=server {keys}\n"
    facts = control.facts()
    assert (facts.dtype, facts.max_model_len, facts.vocab_size) == ("float32", 128, 300)
    assert facts.has_generate and facts.has_receiver
    assert facts.has_spans == (facts.vllm >= "0.32")
    assert version(control) is None  # nobody pushed weights yet


def test_every_route_asks_for_the_token(running):
    """The routes of the app itself, as vLLM lists them at its start; 200 requests in all."""
    routes = re.findall(r"Route: (\S+), Methods: (.+)", running.log.read_text())
    asked = [(path, method) for path, methods in routes for method in methods.strip().split(", ")]
    assert {"/pause", "/update_weights", "/collective_rpc", "/inference/v1/generate"} <= {p for p, _ in asked}
    assert ("/docs", "GET") in asked and ("/openapi.json", "GET") in asked
    asked += [(SAMPLED, "GET"), ("/metrics", "GET"), ("/no/such/route", "POST")]
    token = read_token(running.token_file)
    bad = [{}, {"Authorization": "Bearer no"}, {"X-API-Key": token}, {"Authorization": token}]
    sent = 0
    with httpx.Client(base_url=running.url, trust_env=False) as client:
        while sent < 200:
            for path, method in asked:
                answer = client.request(method, path, headers=bad[sent % len(bad)])
                assert answer.status_code == (200 if path == "/health" and method == "GET" else 401), path
                sent += 1
        assert client.get("/health").status_code == 200
        assert client.get("/metrics", headers={"Authorization": f"Bearer {token}"}).status_code == 200
    with pytest.raises(ValueError, match="rejects this token") as caught:
        Control(running.url, "0123456789abcdef").facts()
    assert "0123456789abcdef" not in str(caught.value)


@pytest.mark.parametrize("by_http", [False, True], ids=["folder", "http"])
def test_whole_weights_and_deltas_arrive(running, control, tmp_path, by_http):
    url, token = f"http://127.0.0.1:{free_port()}" if by_http else "", read_token(running.token_file)
    files = WeightFiles(tmp_path / "weights", control.describe(), url=url, token=token)
    with closing(files):
        assert wrong(control, make_model(1), 1) != []
        load(control, files.write(make_model(1).named_parameters(), version=1))
        files.commit()
        assert (version(control), wrong(control, make_model(1), 1)) == (1, [])
        assert largest_gap(canary(control), token_logprobs(make_model(1), CANARY)) < 2e-5

        policy = changed(make_model(1))
        push = files.write(policy.named_parameters(), version=2)
        assert push.base and 0.01 < push.changed < 0.02
        for _ in range(2):  # a delta that comes twice, such as after an answer that was lost
            load(control, push)
            assert (version(control), wrong(control, policy, 2)) == (2, [])
        assert largest_gap(canary(control), token_logprobs(policy, CANARY)) < 2e-5


def test_the_head_of_a_tied_model_goes_along(control, files):
    """vLLM's own reload on a CPU leaves the packed copy of a tied head as it was, and answers 200."""
    policy = make_model(1)
    load(control, files.write(policy.named_parameters(), version=1))
    files.commit()
    with torch.no_grad():
        policy.get_parameter(EMBED)[7] *= 2
    load(control, files.write(policy.named_parameters(), version=2))
    assert wrong(control, policy, 2) == []
    assert wrong(control, make_model(1), 2) == [HEAD, EMBED]


FAULTS = {
    "swapped": (lambda t: t | {Q0: t[Q1], Q1: t[Q0]}, [Q0, Q1]),
    "old": (lambda t: t | {Q0: dict(make_model(0).named_parameters())[Q0].detach()}, [Q0]),
    "scaled": (lambda t: t | {DOWN: t[DOWN] * 1.001}, [DOWN]),
    "two rows exchanged": (lambda t: t | {Q0: t[Q0][[1, 0, *range(2, 64)]]}, [Q0]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_other_weights_in_the_files_are_named_by_their_fingerprints(control, files, fault):
    change, names = FAULTS[fault]
    policy = make_model(1)
    load(control, rewritten(files.write(policy.named_parameters(), version=1), change))
    assert wrong(control, policy, 1) == names
    load(control, files.whole())  # and heals
    assert wrong(control, policy, 1) == []


def test_a_base_that_is_not_what_it_says_is_named_by_the_fingerprints_after_the_delta(control, files):
    policy = make_model(1)
    push = files.write(policy.named_parameters(), version=1)
    load(control, rewritten(push, lambda t: t | {DOWN: t[DOWN] * 1.001}))
    files.commit()
    with torch.no_grad():
        policy.get_parameter(Q0)[3] += 1
    load(control, files.write(policy.named_parameters(), version=2))
    assert wrong(control, policy, 2) == [DOWN]


def without_q0(tensors):
    return {name: tensor for name, tensor in tensors.items() if name != Q0}


REFUSED = {
    "dropped": (lambda push: rewritten(push, without_q0), rf"the files lack {re.escape(Q0)}"),
    "another shape": (
        lambda push: rewritten(push, lambda t: t | {Q0: t[Q0][:63]}),
        rf"{re.escape(Q0)} is \(63, 64\) in the files and \(64, 64\) in the model",
    ),
    "another dtype": (
        lambda push: rewritten(push, lambda t: t | {Q0: t[Q0].bfloat16()}),
        rf"{re.escape(Q0)} is torch\.bfloat16 in the files and torch\.float32 in the model",
    ),
    "a stranger": (
        lambda push: rewritten(push, lambda t: t | {"model.norm.bias": t["model.norm.weight"].clone()}),
        r"the model has no weight model\.norm\.bias",
    ),
    "a folder that is not there": (
        lambda push: replace(push, where="/no/such/folder"),
        r"/no/such/folder/model\.safetensors\.index\.json cannot be read: No such file",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_files_that_do_not_fit_are_refused_and_the_server_goes_on_as_it_was(control, files, fault):
    change, sentence = REFUSED[fault]
    load(control, files.write(make_model(1).named_parameters(), version=1))
    files.commit()
    push = change(files.whole())
    with pytest.raises(PushRefused, match=f"did not load version 1: {sentence}.*; it goes on with 1"):
        load(control, push)
    assert (version(control), wrong(control, make_model(1), 1)) == (1, [])


def test_a_delta_cut_short_or_over_another_base_is_refused_and_the_server_goes_on(control, files):
    load(control, files.write(make_model(1).named_parameters(), version=1))
    files.commit()
    policy = make_model(1)
    with torch.no_grad():
        policy.get_parameter(Q0)[3] += 1
    push = files.write(policy.named_parameters(), version=2)
    (file,) = Path(push.where).glob("*.safetensors")
    kept = file.read_bytes()
    file.write_bytes(kept[:-8])
    with pytest.raises(PushRefused, match=rf"damaged or cut short .*; it holds {re.escape(Q0)}"):
        load(control, push)
    file.write_bytes(kept)
    files.commit()  # which is wrong: this server has not got version 2
    with torch.no_grad():
        policy.get_parameter(Q1)[3] += 1
    later = files.write(policy.named_parameters(), version=3)
    with pytest.raises(PushRefused, match=r"the delta to 3\..* is laid over 2\..* server holds 1\."):
        load(control, later)
    assert (version(control), wrong(control, make_model(1), 1)) == (1, [])
    load(control, files.whole())
    assert (version(control), wrong(control, policy, 3)) == (3, [])


def test_a_completion_under_way_says_which_weights_sampled_which_tokens(control, files):
    if not control.facts().has_spans:
        pytest.skip("this vLLM answers without spans: the client cuts them")
    load(control, files.write(make_model(1).named_parameters(), version=1))
    files.commit()
    answered, done = [], threading.Event()

    def ask_on(length: int) -> None:
        while not done.is_set():
            answer = generate(control, max_tokens=length, temperature=0.0, ignore_eos=True)
            answered.append((length, answer["choices"][0]["weight_versions"]))

    def cut() -> list:
        return [(length, spans) for length, spans in answered if len(spans) > 1]

    with ThreadPoolExecutor(32) as pool:
        asking = [pool.submit(ask_on, length) for length in range(38, 102, 2)]
        try:
            for version in range(2, 40):  # until a pause meets one that has begun
                control.pause()
                control.load(files.write(changed(make_model(1)).named_parameters(), version=version))
                files.commit()
                control.resume()
                before, deadline = len(answered), time.monotonic() + 60
                while len(answered) < before + 64 and time.monotonic() < deadline:
                    time.sleep(0.01)
                if cut():
                    break
        finally:
            done.set()
        for each in asking:
            each.result(60)
    for length, spans in cut():
        versions = [int(span["version"].partition(".")[0]) for span in spans]
        assert versions == list(range(versions[0], versions[0] + len(spans))) and versions[-1] <= version
        assert [0, *(span["end"] for span in spans)] == [*(span["start"] for span in spans), length]
    assert cut()


def test_neither_log_nor_command_line_nor_environment_holds_the_token(running):
    token = read_token(running.token_file)
    assert token not in running.log.read_text() and len(running.log.read_text()) > 1000
    server = psutil.Process(running.process.pid)
    for process in (server, *server.children(recursive=True)):
        folder = Path(f"/proc/{process.pid}")
        assert token.encode() not in (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()


def test_a_killed_server_starts_again_without_the_pushed_weights(running, control, files):
    load(control, files.write(make_model(1).named_parameters(), version=1))
    files.commit()
    (api,) = psutil.Process(running.process.pid).children()
    engines = api.children(recursive=True)
    os.kill(api.pid, signal.SIGKILL)
    with pytest.raises(ServerDead, match=r"the pause: Connect|the pause: Read|the pause: Remote"):
        control.pause()
    psutil.wait_procs(engines, timeout=60)
    assert not any(process.is_running() and process.status() != "zombie" for process in engines)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        try:
            control.pause()
            break
        except ServerDead:
            time.sleep(1)
    control.resume()
    assert f"server {running.url} ended with exit code -9; starting it again" in running.log.read_text()
    assert version(control) is None
    policy = changed(make_model(1))
    with pytest.raises(PushRefused, match="the server holds weights that nobody pushed"):
        load(control, files.write(policy.named_parameters(), version=2))
    load(control, files.whole())
    assert (version(control), wrong(control, policy, 2)) == (2, [])


def test_a_signal_ends_the_server_and_its_processes(running):
    server = psutil.Process(running.process.pid)
    family = server.children(recursive=True)
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(100) == 0
    gone, alive = psutil.wait_procs(family, timeout=60)
    assert len(gone) >= 3 and not alive  # API server, engine, worker
