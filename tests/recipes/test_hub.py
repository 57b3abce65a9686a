"""A name on a hub that does not answer, or does not have it: said in seconds, with cause and remedy."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

ROOT = Path(__file__).parents[2]
PLAN = [
    sys.executable,
    "-m",
    "recipes.cli",
    "plan",
    "recipes/configs/quickstart.yaml",
    "--gpu-gib",
    "24",
    "model.name=some/model",
]


def ran(command, endpoint, cache, **more):
    """(seconds, exit code, what it said) of a command whose hub is at `endpoint`."""
    kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env=kept | own | more, capture_output=True, text=True, timeout=120
    )
    return time.monotonic() - began, done.returncode, done.stdout + done.stderr


@pytest.fixture
def closed_port():
    """The address of a port that refuses connections."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    return f"http://127.0.0.1:{port}"


def test_a_model_without_a_network_is_refused_in_seconds_with_cause_and_remedy(closed_port, tmp_path):
    seconds, code, said = ran(PLAN, closed_port, tmp_path)
    assert code == 1 and seconds < 60, said  # 3 of them here, the others are imports; unbound it takes 130
    assert "model 'some/model': there is no such folder, nor such a model in the hub's cache" in said
    assert f"{closed_port} does not answer ([Errno 111] Connection refused); check the spelling" in said
    assert "hf download some/model" in said


@contextmanager
def hub_without_models():
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200 if self.path == "/" else 404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_name_that_a_hub_does_not_have_is_said_with_a_remedy(tmp_path):
    with hub_without_models() as address:
        _, code, said = ran(PLAN, address, tmp_path)
    assert code == 1 and "is not a valid model identifier listed on" in said, said
    assert "Check the spelling" in said and "does not answer" not in said


def refused(endpoint, cache, **more):
    lines = (
        "import os, rl.model.hub as hub",
        "hub.WAIT_S = 4",
        "hub.refuse_absent('some/model')",
        "print(os.environ.get('HF_HUB_OFFLINE'))",
    )
    return ran([sys.executable, "-c", "; ".join(lines)], endpoint, cache, **more)


def test_a_silent_hub_is_waited_for_as_long_as_said_and_a_cached_model_is_used(tmp_path):
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        seconds, code, said = refused(address, tmp_path)
        assert code == 1 and "does not answer (4 s of silence)" in said and seconds < 30, (seconds, said)
        cached = tmp_path / "hub/models--some--model/snapshots/0123"
        cached.mkdir(parents=True)
        (cached / "config.json").write_text("{}")
        seconds, code, said = refused(address, tmp_path)
        assert code == 0 and "only the hub's cache is read" in said and said.startswith("1\n"), said


def test_offline_on_purpose_asks_nobody(tmp_path):
    _, code, said = refused("http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")
    assert code == 1 and "HF_HUB_OFFLINE is set, so the hub is not asked" in said
    assert "does not answer" not in said
