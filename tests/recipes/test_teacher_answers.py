"""What a teacher's server may answer: a real HTTP server gives answers of vLLM's form, whole and broken."""

from __future__ import annotations

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from recipes.tasks.scoring import ScoringServer
from rollout.engine import EngineError
from tests.conftest import make_tiny_tokenizer
from tests.vllm_servers import free_port

SHIFT = math.log(sum(math.exp(-i / 10) for i in range(100)))


def logprob(token: int) -> float:
    """Softmax of logits -id / 10 over 100 ids, whatever came before."""
    return -token / 10 - SHIFT


def scored(row: list[int], k: int) -> list[dict[str, dict] | None]:
    """As vLLM has it: the k likeliest ids by rank, and the token itself."""
    found: list[dict[str, dict] | None] = [None]
    for token in row[1:]:
        ids = [*range(k), *([token] if token >= k else [])]
        found.append({str(i): {"logprob": logprob(i), "rank": i + 1, "decoded_token": "x"} for i in ids})
    return found


@pytest.fixture
def serve():
    """A server whose answers to /v1/completions `change` may break; `serve(change)` -> ScoringServer."""
    running = []
    card = {"id": "m", "root": "m", "max_model_len": 64}

    def start(change=lambda answer: answer, tokenizer=None, *, port=0, models=(card,)):
        class Answers(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                self._send({"data": models})

            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/detokenize":
                    return self._send({"prompt": tokenizer.decode(asked["tokens"])})
                rows = asked["prompt"]
                choices = [
                    {"index": i, "prompt_logprobs": scored(row, asked["prompt_logprobs"])}
                    for i, row in enumerate(rows)
                ]
                return self._send(change({"model": "m", "choices": choices}))

            def _send(self, answer):
                body = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        server = ThreadingHTTPServer(("127.0.0.1", port), Answers)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return ScoringServer(f"http://127.0.0.1:{server.server_port}", "", timeout_s=20)

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def each(answer, change):
    """Changes what is said of every token after a row's first."""
    for choice in answer["choices"]:
        for at in choice["prompt_logprobs"][1:]:
            for said in at.values():
                said["logprob"] = change(said["logprob"])
    return answer


def test_a_teacher_that_starts_late_is_waited_for(serve):
    port, said = free_port(), []
    url = f"http://127.0.0.1:{port}"
    at = ScoringServer(url, "", timeout_s=30)
    at.wait(lambda text: said.append(text) or serve(port=port))
    assert at.model() == ("m", 64)
    assert said == [
        f"the teacher does not answer yet (server {url}: its model: ConnectError [Errno 111] Connection "
        "refused); waiting for it for teacher.timeout_s=30 at most"
    ]


def test_a_teacher_that_never_starts_or_answers_wrongly_is_refused(serve):
    said = []
    with pytest.raises(EngineError, match="its model: ConnectError"):
        ScoringServer(f"http://127.0.0.1:{free_port()}", "", timeout_s=1).wait(said.append)
    assert len(said) == 1
    with pytest.raises(EngineError, match="/v1/models answered what cannot be read"):
        serve(models=()).wait(said.append)
    assert len(said) == 1  # it was refused at once


def test_answers_in_any_order_are_those_of_their_rows(serve):
    at = serve(lambda answer: answer | {"choices": answer["choices"][::-1]})
    first, second = at.score([[9, 1, 50], [9, 7]], 2)
    assert first.logprobs == pytest.approx([logprob(1), logprob(50)])
    assert second.logprobs == pytest.approx([logprob(7)])
    assert first.top_ids == [[0, 1], [0, 1]] and second.top_ids == [[0, 1]]
    assert first.top_logprobs[1] == pytest.approx([logprob(0), logprob(1)])
    assert at.score([[9, 4]], 0)[0].top_ids == [[]]


def without_last(answer):
    answer["choices"][0]["prompt_logprobs"].pop()
    return answer


def with_first(answer):
    """As of a server that puts a token of its own before each row."""
    answer["choices"][0]["prompt_logprobs"].insert(0, None)
    return answer


def without_likeliest(answer):
    answer["choices"][0]["prompt_logprobs"][1].pop("0")
    return answer


def with_nan(answer):
    answer["choices"][0]["prompt_logprobs"][1]["0"]["logprob"] = math.nan
    return answer


def with_null(answer):
    answer["choices"][0]["prompt_logprobs"][1]["0"]["logprob"] = None
    return answer


@pytest.mark.parametrize(
    "change",
    [
        without_last,
        with_first,
        without_likeliest,
        with_nan,
        with_null,
        lambda answer: answer | {"choices": answer["choices"][:1]},
        lambda answer: answer | {"choices": answer["choices"] * 2},
        lambda answer: each(answer, lambda x: -9999.0),
        lambda answer: answer | {"choices": None},
    ],
)
def test_an_answer_that_lacks_something_is_refused(serve, change):
    with pytest.raises(EngineError, match="log-probs of 2 rows: its answer lacks a log-prob"):
        serve(change).score([[9, 1, 50], [9, 7]], 2)


def test_another_model_behind_the_same_address_ends_the_run(serve):
    models = iter(["m", "m", "another"])
    at = serve(lambda answer: answer | {"model": next(models)})
    at.score([[9, 1]], 0)
    at.score([[9, 1]], 0)
    with pytest.raises(EngineError, match=r"now serves another in place of m; .* and resume"):
        at.score([[9, 1]], 0)


@pytest.mark.parametrize("change", [lambda x: x + SHIFT, lambda x: x + SHIFT - 90])
def test_logits_are_refused_whatever_their_level(serve, tmp_path, change):
    """GPT-2's are near -90: log-probs of 0 mass, while a likeliest id of V has at least -log V nats."""
    tokenizer = make_tiny_tokenizer(tmp_path / "tokenizer")
    serve(tokenizer=tokenizer).check(tokenizer, 63, 5)
    with pytest.raises(ValueError, match=r"these are not log-probs; serve it with --logprobs-mode"):
        serve(lambda answer: each(answer, change), tokenizer).check(tokenizer, 63, 5)


def test_other_weights_are_found_by_the_canary_of_any_request(serve, tmp_path):
    """Every log-prob moves by as much, so that this is the mean gap; 0.15 is allowed."""
    tokenizer, moved = make_tiny_tokenizer(tmp_path / "tokenizer"), [0.0]
    at = serve(lambda answer: each(answer, lambda x: x + moved[0]), tokenizer)
    at._record = tmp_path / "teacher.json"
    at.check(tokenizer, 63, 5)
    ids = json.loads(at._record.read_text())["ids"]
    assert len(ids) == 63 and len(at.score([[9, 1, 50]], 2)) == 1
    moved[0] = -0.14
    at.score([[9, 1, 50]], 2)
    moved[0] = -0.16
    with pytest.raises(
        EngineError, match=r"m has other weights than .* are 0\.16 nats from those in .*teacher"
    ):
        at.score([[9, 1, 50]], 2)
