"""Serves a folder of weights by HTTP GET to servers that do not see it; both ends know the run's token."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx

from rollout.vllm.lock import TOKEN_FILE, bears, read_token

INDEX = "model.safetensors.index.json"
FETCH_S = 60.0  # without a byte
_FILE = re.compile(r"/\w[\w.-]*/\w[\w.-]*")


@contextmanager
def serving(folder: Path, token: str, url: str) -> Iterator[None]:
    """Serves the files one level below `folder` to clients that bear the token.

    Args:
        url: http, a host's own name or address, and a port. A network that others share needs a tunnel,
            since nothing is encrypted.

    Raises:
        ValueError: this host cannot listen there.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = FETCH_S

        def do_GET(self) -> None:
            headers = [(name.encode(), value.encode("latin-1")) for name, value in self.headers.items()]
            if not bears(headers, token):
                return self.send_error(401)
            path = folder / self.path[1:]
            if not _FILE.fullmatch(self.path) or not path.is_file():
                return self.send_error(404)
            with path.open("rb") as file:
                self.send_response(200)
                self.send_header("Content-Length", str(os.fstat(file.fileno()).st_size))
                self.end_headers()
                shutil.copyfileobj(file, self.wfile, 2**20)

        def log_message(self, format: str, *args: Any) -> None:
            pass  # standard error belongs to the run's display

    host, _, port = url.removeprefix("http://").rpartition(":")
    try:
        server = ThreadingHTTPServer((host, int(port)), Handler)
    except (OSError, OverflowError) as error:
        raise ValueError(f"engine.weights_url={url}: this host cannot listen there: {error}") from error
    # A vLLM server that hangs up reports by itself what it lacks.
    server.handle_error = lambda request, client_address: None
    Thread(target=server.serve_forever, name="weight files", daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def fetch(url: str, folder: Path) -> None:
    """Fetches the index at `url` and the files that it names into `folder`, by COHORT_TOKEN_FILE's token.

    Raises:
        ValueError: something could not be fetched; the message says what.
    """
    headers = {"Authorization": f"Bearer {read_token(os.environ[TOKEN_FILE])}"}
    try:
        with httpx.Client(headers=headers, timeout=FETCH_S, trust_env=False) as client:
            _fetch_file(client, f"{url}/{INDEX}", folder / INDEX)
            for name in json.loads((folder / INDEX).read_bytes())["metadata"]["files"]:
                if Path(name).name != name:
                    raise ValueError(f"{url}/{INDEX} names a file outside its folder")
                _fetch_file(client, f"{url}/{name}", folder / name)
    except httpx.HTTPError as error:
        raise ValueError(f"cannot fetch weights from {url}: {type(error).__name__} {error}") from error


def _fetch_file(client: httpx.Client, url: str, path: Path) -> None:
    with client.stream("GET", url) as answer, path.open("wb") as file:
        answer.raise_for_status()
        for chunk in answer.iter_bytes(2**20):
            file.write(chunk)
