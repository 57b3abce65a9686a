"""The health checks of a server go on whatever it answers, and find that it has died. A real HTTP server."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import SimpleQueue
from types import SimpleNamespace

import httpx
import psutil
import pytest
from httpcore._async.connection import AsyncHTTPConnection

from rl.types import SamplingParams
from rollout.engine import EngineError
from rollout.vllm import member as member_module
from rollout.vllm import served
from rollout.vllm.control import NEEDED, Control, ServerDead
from rollout.vllm.core import Stream
from rollout.vllm.member import Member, meet
from rollout.vllm.served import Server
from tests.waiting import wait_until

Say = Callable[[dict[str, str]], ThreadingHTTPServer]


@pytest.fixture
def say() -> Iterator[Say]:
    """A server that answers paths with these texts."""
    running = []

    def start(texts: dict[str, str]) -> ThreadingHTTPServer:
        class Answers(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                body = texts.get(self.path, "").encode()
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

        running.append(ThreadingHTTPServer(("127.0.0.1", 0), Answers))
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return running[-1]

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def test_metrics_that_cannot_be_read_do_not_end_the_health_checks(say: Say, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(served, "POLL_S", 0.05)
    texts = {"/metrics": 'vllm:num_requests_running{engine="0"} many\n'}
    http = say(texts)
    server = Server(f"http://127.0.0.1:{http.server_port}", None, salt="s", sink=SimpleQueue())
    wait_until(lambda: server.failing_since is not None, "it fails")
    assert server.fault == "its health check: ValueError could not convert string to float: 'many'"
    texts["/metrics"] = 'vllm:num_requests_running{engine="0"} 3\n'
    wait_until(lambda: server.gauges == {"running": 3.0} and server.fault is None, "it is well again")
    http.shutdown()
    http.server_close()
    wait_until(lambda: server.is_gone, "it is known to be gone")
    server.close()


def test_no_variable_chooses_whom_streams_trust(say: Say, monkeypatch: pytest.MonkeyPatch):
    """Calls of `control` do not read it either; a file that is not there ended the run."""
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere.pem")
    url = f"http://127.0.0.1:{say({}).server_port}"
    Server(url, None, salt="s", sink=SimpleQueue()).close()


def test_a_port_that_says_nothing_is_called_once_until_it_answers(monkeypatch: pytest.MonkeyPatch):
    """Each call would keep a thread and a connection for as long as an answer may take."""
    monkeypatch.setattr(served, "POLL_TIMEOUT_S", 0.2)
    monkeypatch.setattr(member_module, "DEAD_S", 0.5)
    monkeypatch.setattr(member_module, "POLL_S", 0.05)

    class Answers(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def reach(url: str) -> Control:
        calls.append(url)
        httpx.get(f"{url}/version", timeout=60, trust_env=False)
        return Control(url, "t")

    http = ThreadingHTTPServer(("127.0.0.1", 0), Answers)  # its port accepts from now on
    url = f"http://127.0.0.1:{http.server_port}"
    server, calls, met, said = Server(url, None, salt="s", sink=SimpleQueue()), [], [], []

    def note(text: str) -> None:
        """The port answers a second later, and from then on as late as it may."""
        said.append(text)
        monkeypatch.setattr(served, "POLL_TIMEOUT_S", 20.0)
        threading.Timer(1.0, http.serve_forever).start()

    own = {"lose": lambda *lost: said.append(lost), "timeout_s": 60.0, "note": note}
    meet([Member(server)], reach, lambda member, control: met.append(member.server.url), **own)
    assert met == [url] and len(calls) == 2
    assert said == [
        f"nobody answers yet at {url} (its first answer: its health check: ReadTimeout); waiting for a "
        "server for timeout_s=60 at most"
    ]
    server.close()
    http.shutdown()
    http.server_close()


def test_many_streams_cost_no_more_than_few(say: Say, monkeypatch: pytest.MonkeyPatch):
    """httpx's pool looks at each connection for each other one: 400 in one pool took 400 looks a stream."""
    looks, is_idle = [], AsyncHTTPConnection.is_idle
    monkeypatch.setattr(AsyncHTTPConnection, "is_idle", lambda self: looks.append(1) or is_idle(self))
    monkeypatch.setattr(ThreadingHTTPServer, "request_queue_size", 400)
    line = 'data: {"choices": [{"token_ids": [7], "logprobs": null, "finish_reason": "length"}]}\n\n'
    http = say({served.GENERATE: line})
    sink: SimpleQueue[tuple[Server, Stream]] = SimpleQueue()
    server = Server(f"http://127.0.0.1:{http.server_port}", None, salt="s", sink=sink)
    server.holds(1, "1.a")
    server.start([Stream(str(n), [5], SamplingParams(1), None, with_logprobs=False) for n in range(400)])
    ended = [sink.get(timeout=60)[1] for _ in range(400)]
    assert [stream.token_ids for stream in ended] == [[7]] * 400
    assert len(looks) < 20 * 400
    server.close()


def test_a_call_is_waited_for_as_long_as_completions_go_on(say: Say, monkeypatch: pytest.MonkeyPatch):
    """A token each 0.6 s by a clock that waits until the caller has seen the token before."""
    http, answer = say({"/metrics": ""}), Future()
    server = Server(f"http://127.0.0.1:{http.server_port}", None, salt="s", sink=SimpleQueue())
    stream, member = Stream("0", [5], SamplingParams(99), None, with_logprobs=False), Member(server)
    member.streams["0"] = stream
    now, looks, wait = [0.0], [], member_module.wait_for

    def go_on() -> None:
        for token in range(20):
            now[0] += 0.6
            stream.token_ids.append(token)
            before = len(looks)
            wait_until(lambda: len(looks) >= before + 2, "the caller has seen it")  # noqa: B023
        answer.set_result("done")

    with monkeypatch.context() as patch:
        patch.setattr(member_module, "TICK_S", 0.01)
        patch.setattr(member_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
        patch.setattr(member_module, "wait_for", lambda *given: looks.append(1) or wait(*given))
        threading.Thread(target=go_on).start()
        assert member.wait(answer, "a load", timeout_s=1.0) == "done" and len(stream.token_ids) == 20
    with pytest.raises(ServerDead, match=r"^a load: no answer within timeout_s=0\.3"):
        member.wait(Future(), "a load", timeout_s=0.3)
    server.close()


def test_a_stream_whose_answer_cannot_be_read_ends_as_broken_off(say: Say):
    """Routes of no bytes are an EOFError of numpy."""
    line = 'data: {"choices": [{"token_ids": [7], "logprobs": null, "routed_experts": ""}]}\n\n'
    http = say({served.GENERATE: line})
    sink: SimpleQueue[tuple[Server, Stream]] = SimpleQueue()
    server = Server(f"http://127.0.0.1:{http.server_port}", None, salt="s", sink=sink)
    server.start([Stream("0", [5], SamplingParams(9), None, with_logprobs=False)])
    _, stream = sink.get(timeout=60)
    assert stream.reason is None and stream.answer().finish_reason == "abort"
    server.close()


def test_a_stream_that_breaks_off_keeps_what_is_sure_of_this_server_alone(say: Say):
    """The break is often known before the server's end is."""
    line = 'data: {"choices": [{"token_ids": [7, 8, 9], "logprobs": null}]}\n\ndata: {"error": "gone"}\n\n'
    http, sink = say({served.GENERATE: line}), SimpleQueue()
    server = Server(f"http://127.0.0.1:{http.server_port}", None, salt="s", sink=sink)
    server.holds(1, "1.a")
    stream = Stream("0", [5], SamplingParams(9), None, with_logprobs=False, token_ids=[6], versions=[1])
    stream.sure = 3  # of another server, whose tokens were dropped
    server.start([stream])
    sink.get(timeout=60)
    assert (stream.token_ids, stream.versions) == ([6], [1])
    server.close()


def test_a_stream_that_ends_without_a_reason_is_one_that_breaks_off(say: Say):
    """A proxy may end the answer of a killed server properly. Nobody has asked what sampled its tokens."""
    line = 'data: {"choices": [{"token_ids": [7, 8, 9], "logprobs": null}]}\n\n'
    http, sink = say({served.GENERATE: line}), SimpleQueue()
    server = Server(f"http://127.0.0.1:{http.server_port}", None, salt="s", sink=sink)
    server.holds(1, "1.a")
    stream = Stream("0", [5], SamplingParams(9), None, with_logprobs=False)
    server.start([stream])
    sink.get(timeout=60)
    assert (stream.token_ids, stream.versions, stream.answer().finish_reason) == ([], [], "abort")
    assert server.fault == "RuntimeError: it ended a completion without a reason"
    server.close()


def test_a_running_stream_that_was_dropped_takes_nothing_more(say: Say):
    """What comes after would stand where the lost tokens were, as tokens of proved weights."""
    http, sink, goes_on = say({}), SimpleQueue(), threading.Event()
    message = {"choices": [{"token_ids": [1, 2, 3], "logprobs": None}]}
    spans = [{"version": "1.a", "end": 3, "start": 0}, {"version": "1.b", "end": 6, "start": 3}]
    last = {"token_ids": [4, 5, 6], "logprobs": None, "weight_versions": spans, "finish_reason": "length"}

    def say_in_parts(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(f"data: {json.dumps(message)}\n\n".encode())
        goes_on.wait(60)
        handler.wfile.write(f"data: {json.dumps({'choices': [last]})}\n\n".encode())

    http.RequestHandlerClass.do_POST = say_in_parts  # type: ignore[attr-defined]
    server = Server(f"http://127.0.0.1:{http.server_port}", None, salt="s", sink=sink)
    server.holds(1, "1.a")
    stream = Stream("0", [5], SamplingParams(6), None, with_logprobs=False)
    server.start([stream])
    wait_until(lambda: len(stream.token_ids) == 3, "it begins")
    server.settle("1.b", {stream: 3})  # as the health checks do
    goes_on.set()
    sink.get(timeout=60)
    assert (stream.token_ids, stream.versions, stream.answer().finish_reason) == ([], [], "abort")
    server.close()


def test_a_completion_that_was_handed_out_is_not_dropped_by_a_late_answer(
    say: Say, monkeypatch: pytest.MonkeyPatch
):
    """The lease is answered when somebody else's load is over. What ended before has labels that prove it."""
    monkeypatch.setattr(served, "POLL_S", 0.05)
    spans = [{"version": "1.a", "start": 0, "end": 3}]
    last = {"token_ids": [1, 2, 3], "logprobs": None, "weight_versions": spans, "finish_reason": "length"}
    http, sink = say({}), SimpleQueue()
    begun, asked, ends, is_loaded = (threading.Event() for _ in range(4))

    def say_late(handler: BaseHTTPRequestHandler) -> None:
        is_lease = handler.path == "/collective_rpc"
        (asked if is_lease else begun).set()
        (is_loaded if is_lease else ends).wait(60)
        told = {"results": [{"holder": "a run", "holds": "1.b"}]}
        body = json.dumps(told) if is_lease else f"data: {json.dumps({'choices': [last]})}\n\n"
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(body.encode())

    http.RequestHandlerClass.do_POST = say_late  # type: ignore[attr-defined]
    url = f"http://127.0.0.1:{http.server_port}"
    server = Server(url, None, salt="s", sink=sink, run="a run")
    server.start([Stream("0", [5], SamplingParams(3), None, with_logprobs=False)])
    assert begun.wait(60)
    server.holds(1, "1.a")
    assert asked.wait(60)
    ends.set()
    _, stream = sink.get(timeout=60)
    answer = stream.answer()
    is_loaded.set()
    wait_until(lambda: server.doubt, "it is known that others' weights are there")
    assert (answer.token_ids, answer.finish_reason) == ([1, 2, 3], "length")
    server.close()


def test_an_answer_that_is_not_json_names_the_server_and_what_was_asked(say: Say):
    url = f"http://127.0.0.1:{say({'/openapi.json': '<html>a proxy</html>'}).server_port}"
    control = Control(url, "t" * 16, timeout_s=20)
    with pytest.raises(
        ServerDead,
        match=f"server {url}: the list of routes: /openapi.json answered what .*JSONDecode.*: <html",
    ):
        control.facts()
    control.close()


CONFIG = '{"vllm_config": {"model_config": {"dtype": "torch.float32"}, "parallel_config": {}}}'


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (
            {"/openapi.json": '{"error": "busy"}'},
            r"the list of routes: /openapi.json .* \(KeyError: 'paths'\)",
        ),
        ({"/server_info?config_format=json": "[]"}, r"its config: /server_info.* \(TypeError: .*: \[\]"),
        ({"/server_info?config_format=json": CONFIG}, r"its config: .* \(KeyError: 'max_model_len'\)"),
    ],
)
def test_an_answer_that_lacks_what_was_asked_for_names_the_server_and_the_route(
    say: Say, texts: dict[str, str], said: str
):
    needed = dict.fromkeys(NEEDED)
    url = f"http://127.0.0.1:{say({'/openapi.json': json.dumps({'paths': needed})} | texts).server_port}"
    control = Control(url, "t" * 16, timeout_s=20)
    with pytest.raises(ServerDead, match=f"server {url}: {said}"):
        control.facts()
    control.close()


@pytest.mark.parametrize(
    ("text", "odd"),
    [
        ("{}", "KeyError: 'prompt_logprobs'"),
        ("[]", "TypeError: list indices must be integers or slices, not str"),
        ('{"prompt_logprobs": null}', "TypeError: 'NoneType' object is not subscriptable"),
        ('{"prompt_logprobs": [null]}', r"ValueError: zip\(\) argument 2 is longer than argument 1"),
        ('{"prompt_logprobs": [null, null]}', "TypeError: 'NoneType' object is not subscriptable"),
        ('{"prompt_logprobs": [null, {"8": {"logprob": -1}}]}', "KeyError: '7'"),
        ('{"prompt_logprobs": [null, {"7": {"logprob": null}}]}', "TypeError: float.* 'NoneType'"),
        (
            '{"prompt_logprobs": [null, {"7": {"logprob": -9999.0}}]}',
            "ValueError: a log-prob that is not finite",
        ),
        ('{"prompt_logprobs": [null, {"7": {"logprob": NaN}}]}', "ValueError: a log-prob that is not finite"),
        ("<html>", "JSONDecodeError: Expecting value"),
    ],
)
def test_odd_log_probs_of_a_canary_name_the_server_and_the_route(say: Say, text: str, odd: str):
    url = f"http://127.0.0.1:{say({served.GENERATE: text}).server_port}"
    server = Server(url, None, salt="s", sink=SimpleQueue())
    with pytest.raises(
        EngineError, match=f"server {url}: {served.GENERATE} answered what .* \\({odd}.*\\): "
    ):
        server.score([5, 7]).result(20)
    server.close()


def test_a_thread_of_streams_that_is_stuck_is_named_with_its_server(
    say: Say, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(served, "LOOP_S", 0.1)
    url, free = f"http://127.0.0.1:{say({}).server_port}", threading.Event()
    server = Server(url, None, salt="s", sink=SimpleQueue())
    assert server.asked.wait(60)
    server._loop.call_soon_threadsafe(free.wait, 20)
    said = f"server {url}: the thread of its streams did not take version 1 within 0.1 s"
    with pytest.raises(EngineError, match=said):
        server.holds(1, "1.a")
    free.set()
    server.close()


def test_a_stopped_server_of_killed_tests_ends_with_them():
    code = """
import os, signal, subprocess, time
from tests.vllm_servers import end_with_us
server = subprocess.Popen(["sleep", "1000"], start_new_session=True, stdout=subprocess.DEVNULL)
end_with_us(server.pid)
server.send_signal(signal.SIGSTOP)
print(server.pid, flush=True)
time.sleep(1000)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as tests:
        assert tests.stdout is not None
        server = psutil.Process(int(tests.stdout.readline()))
        assert server.is_running()
        tests.kill()
    wait_until(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE, "it ends")
