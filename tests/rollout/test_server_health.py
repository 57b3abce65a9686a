"""The health checks of a server go on whatever it answers, and find that it has died. A real HTTP server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import SimpleQueue

import pytest

from rl.types import SamplingParams
from rollout.vllm import served
from rollout.vllm.control import Control, ServerDead
from rollout.vllm.core import Stream
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


def test_a_stream_whose_answer_cannot_be_read_ends_as_broken_off(say: Say):
    """Routes of no bytes are an EOFError of numpy."""
    line = 'data: {"choices": [{"token_ids": [7], "logprobs": null, "routed_experts": ""}]}\n\n'
    http = say({served.GENERATE: line})
    sink: SimpleQueue[tuple[Server, Stream]] = SimpleQueue()
    server = Server(f"http://127.0.0.1:{http.server_port}", None, salt="s", sink=sink)
    server.start([Stream("0", [5], SamplingParams(9), None, with_logprobs=False)])
    _, stream = sink.get(timeout=20)
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
    sink.get(timeout=20)
    assert (stream.token_ids, stream.versions) == ([6], [1])
    server.close()


def test_an_answer_that_is_not_json_names_the_server_and_what_was_asked(say: Say):
    url = f"http://127.0.0.1:{say({'/openapi.json': '<html>a proxy</html>'}).server_port}"
    control = Control(url, "t" * 16, timeout_s=20)
    with pytest.raises(
        ServerDead, match=f"server {url}: the list of routes: /openapi.json answered no JSON: <"
    ):
        control.facts()
    control.close()
