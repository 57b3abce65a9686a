"""The lock of a server: nothing but /health answers without the token, and the token's file is private."""

import asyncio
import os

import pytest

from rollout.vllm.lock import TOKEN_FILE, RequireToken, make_token, read_token

RIGHT = [(b"authorization", b"Bearer 0123456789abcdef")]


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """A request through the lock: what was sent back, and whether the app behind it was reached."""
    file = tmp_path / "token"
    file.touch(0o600)
    file.write_text("0123456789abcdef\n")
    monkeypatch.setenv(TOKEN_FILE, str(file))
    reached = []

    async def app(scope, receive, send):
        reached.append(scope["type"])

    async def receive():
        return {"type": "websocket.connect"}

    def one(kind, path, headers):
        sent = []
        reached.clear()

        async def send(message):
            sent.append(message)

        asyncio.run(RequireToken(app)({"type": kind, "path": path, "headers": headers}, receive, send))
        return bool(reached), sent[0] if sent else None

    return one


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"Bearer 0123456789abcdeg")],
        [(b"authorization", b"0123456789abcdef")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"Bearer \xff\xfe")],
        [(b"authorization", b"Bearer no"), *RIGHT],  # whoever reads the other one would be of another mind
        [(b"x-api-key", b"0123456789abcdef")],
    ],
)
@pytest.mark.parametrize("path", ["/", "/v1/models", "/health/", "//health", "/HEALTH", "/update_weights"])
def test_a_request_without_the_token_is_answered_401(ask, path, headers):
    reached, first = ask("http", path, headers)
    assert not reached and first["status"] == 401


def test_a_web_socket_without_the_token_is_closed(ask):
    assert ask("websocket", "/health", []) == (False, {"type": "websocket.close", "code": 1008})


@pytest.mark.parametrize(
    ("kind", "path", "headers"),
    [
        ("http", "/health", []),
        ("lifespan", "", []),
        ("http", "/pause", RIGHT),
        ("http", "/pause", [(b"Authorization", RIGHT[0][1])]),
        ("websocket", "/v1/realtime", RIGHT),
    ],
)
def test_health_and_who_bears_the_token_come_through(ask, kind, path, headers):
    assert ask(kind, path, headers) == (True, None)


def test_a_made_token_is_long_random_private_and_kept(tmp_path):
    files = tmp_path / "a" / "token", tmp_path / "b" / "token"
    for file in files:
        make_token(file)
        assert oct(os.stat(file).st_mode & 0o777) == "0o600"
    first, second = map(read_token, files)
    assert first != second and len(first) == 43  # 32 random bytes in base64
    make_token(files[0])
    assert read_token(files[0]) == first


def test_bad_token_files_are_named_and_their_words_are_not(tmp_path):
    file = tmp_path / "token"
    with pytest.raises(
        ValueError, match=r"token cannot be read: FileNotFoundError; `cohort serve` makes one"
    ):
        read_token(file)
    file.touch(0o600)
    file.write_text("hunter2")
    with pytest.raises(ValueError, match="at least 16 printable characters") as caught:
        read_token(file)
    assert "hunter2" not in str(caught.value)
    file.write_text("0123456789 abcdef")
    with pytest.raises(ValueError, match="without spaces"):
        read_token(file)
    file.chmod(0o640)
    with pytest.raises(ValueError, match=r"others may read the token file .*chmod 600"):
        read_token(file)


def test_a_server_without_a_token_file_does_not_start(monkeypatch):
    monkeypatch.delenv(TOKEN_FILE, raising=False)
    with pytest.raises(ValueError, match="COHORT_TOKEN_FILE must name the file"):
        RequireToken(None)
