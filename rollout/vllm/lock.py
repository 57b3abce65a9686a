"""The lock of a server: every route except /health asks for the run's token. It adds a route, `SAMPLED`: how
many tokens a paused server has sampled of each completion. A message brings several (--stream-interval of
vLLM), which may be of two versions. A POST counts, and keeps the answer under the label of these weights (the
query). A GET returns what was kept, for processes that took no part in the pause.

vLLM's own `--api-key` leaves the routes open that replace weights. Start a server with
`--middleware rollout.vllm.lock.RequireToken` and name the token's file in `COHORT_TOKEN_FILE`. The token
itself is never in an environment, on a command line or in a log.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import secrets
import stat
import time
from pathlib import Path
from typing import Any

from rollout.vllm.internals import reach, require

TOKEN_FILE = "COHORT_TOKEN_FILE"
RECEIVER = "rollout.vllm.worker.WeightReceiver"  # the worker extension, which a run's server needs as well
OPEN_PATHS = ("/health",)
MIN_CHARACTERS = 16
LOCK = "rollout.vllm.lock.RequireToken"
SCHEDULER = "rollout.vllm.scheduler.make_server_scheduler"  # less Python per token
SAMPLED = "/cohort/sampled"
PREFIX = "generate-tokens-"  # vLLM's, before the id that a request gives
QUIET_TURNS = 5  # of the event loop, in which vLLM reads what its engine has sent
TURN_S = 0.001
LONGEST_S = 10.0


def read_token(file: str | Path) -> str:
    """The token in `file`.

    Raises:
        ValueError: there is no file, others may read it, or it holds fewer than `MIN_CHARACTERS` plain ones.
    """
    path = Path(file)
    try:
        mode, token = path.stat().st_mode, path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"the token file {path} cannot be read: {type(error).__name__}; `cohort serve` makes one"
        ) from None
    if stat.S_IMODE(mode) & 0o077:
        raise ValueError(f"others may read the token file {path}; chmod 600 {path}")
    if len(token) < MIN_CHARACTERS or not all(" " < c <= "~" for c in token):
        raise ValueError(
            f"the token file {path} must hold one line of at least {MIN_CHARACTERS} printable "
            "characters without spaces; delete it, and `cohort serve` makes one"
        )
    return token


def make_token(file: str | Path) -> None:
    """Writes a new random token into `file`, which nobody else may read; keeps one that is there."""
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with os.fdopen(handle, "w", encoding="ascii") as out:
        out.write(secrets.token_urlsafe(32) + "\n")


def bears(headers: Any, token: str) -> bool:
    """Whether the (name, value) pairs hold one Authorization only, with the token; in constant time."""
    given = [bytes(value) for name, value in headers if bytes(name).lower() == b"authorization"]
    return len(given) == 1 and hmac.compare_digest(given[0], f"Bearer {token}".encode())


async def counted(engine: Any) -> dict[str, int] | None:
    """{id of a request: its tokens so far} of vLLM's frontend; None if they still become more.

    The engine answers a pause after it has sent its last tokens, so that all of them are here already.
    """
    require("server", engine)
    states, came = reach("server", "states", engine), reach("server", "came", engine)
    before: dict[str, int] | None = None
    quiet, deadline = 0, time.monotonic() + LONGEST_S
    while quiet < QUIET_TURNS and time.monotonic() < deadline:
        await asyncio.sleep(TURN_S)
        now = {
            state.external_req_id.removeprefix(PREFIX): state.detokenizer.num_output_tokens()
            for state in states.values()
        }
        quiet = quiet + 1 if now == before and came.empty() else 0
        before = now
    return before if quiet == QUIET_TURNS else None


async def answer(scope: Any, send: Any) -> None:
    """Answers a request for `SAMPLED`, with 409 if the server samples on, or nothing is kept."""
    state, label = scope["app"].state, scope["query_string"]
    if scope["method"] == "POST":
        state.cohort_sampled = {label: await counted(state.engine_client)}
    found = getattr(state, "cohort_sampled", {}).get(label)
    status = 409 if found is None else 200
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    said = "not counted: it samples, or was not paused" if found is None else found
    await send({"type": "http.response.body", "body": json.dumps(said).encode()})


class RequireToken:
    """ASGI middleware that answers 401 to any request, and closes any web socket, without the token. It adds
    the route `SAMPLED`.

    Raises:
        ValueError: `COHORT_TOKEN_FILE` does not name a token's file.
    """

    def __init__(self, app: Any) -> None:
        if TOKEN_FILE not in os.environ:
            raise ValueError(f"{TOKEN_FILE} must name the file that holds the server's token")
        self.app, self._token = app, read_token(os.environ[TOKEN_FILE])

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        kind = scope["type"]
        is_open = kind == "lifespan" or (kind == "http" and scope["path"] in OPEN_PATHS)
        if is_open or bears(scope["headers"], self._token):
            is_ours = kind == "http" and scope["path"] == SAMPLED
            await (answer(scope, send) if is_ours else self.app(scope, receive, send))
        elif kind == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"text/plain"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b"the token is missing or wrong"})
