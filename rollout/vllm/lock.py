"""The lock of a server: every route except /health asks for the run's token.

vLLM's own `--api-key` leaves the routes open that replace weights. Start a server with
`--middleware rollout.vllm.lock.RequireToken` and name the token's file in `COHORT_TOKEN_FILE`. The token
itself is never in an environment, on a command line or in a log.
"""

from __future__ import annotations

import hmac
import os
import secrets
import stat
from pathlib import Path
from typing import Any

TOKEN_FILE = "COHORT_TOKEN_FILE"
RECEIVER = "rollout.vllm.worker.WeightReceiver"  # the worker extension, which a run's server needs as well
OPEN_PATHS = ("/health",)
MIN_CHARACTERS = 16


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


class RequireToken:
    """ASGI middleware that answers 401 to any request, and closes any web socket, without the token.

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
            await self.app(scope, receive, send)
        elif kind == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"text/plain"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b"the token is missing or wrong"})
