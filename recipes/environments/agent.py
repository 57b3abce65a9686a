"""A user's program as an environment: it asks an OpenAI-compatible endpoint, and the policy answers.

The endpoint is on loopback, and each episode has its own token. What a request adds after the last answer is
the policy's next input. So the policy is trained on exactly the ids that it sampled.
"""

from __future__ import annotations

import json
import queue
import secrets
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from recipes.environments import chat_of, found
from recipes.environments.calls import openai_calls
from rollout.environment import Environment, EnvironmentFault, Episode, Reply, Turn

MAX_BODY_BYTES = 4 << 20


class Agent(Environment):
    """Runs `agent(base_url, api_key, row, seed)` in a thread; a number that it returns is the reward.

    It posts to /v1/chat/completions, without streaming, as the package openai does. Its first request is
    row["prompt"]; each later one begins with the earlier messages and the last answer. Sampling follows the
    run's settings, not the request's.

    Args:
        tools: JSON schemas in OpenAI's form; requests with others are refused.
        repeatable: the program does the same again if it gets the same answers. After a kill it is then run
            again with the answers that it had.
        timeout_s: how long it may compute before its first request, or between an answer and the next; less
            than half of environment.deadline_s. Imports at the top of its module are not counted.
    """

    def __init__(
        self, agent: str, tools: Sequence[Any] = (), *, repeatable: bool = False, timeout_s: float = 4.0
    ) -> None:
        self.agent, self.tools, self.repeatable, self.timeout_s = found(agent), tools, repeatable, timeout_s
        self.talks: dict[str, Talking] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
        self.server.daemon_threads, self.server.talks = True, self.talks  # type: ignore[attr-defined]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def open(self, row: Mapping[str, Any], seed: int, state: Any = None) -> Talking:
        return Talking(self, row, seed, [Turn.of(turn) for turn in (state or {"said": []})["said"]])

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        for talk in list(self.talks.values()):
            talk.close()


class Talking(Episode):
    """An episode. `said` holds the policy's turns; a request waits on `answers` for the next one."""

    def __init__(self, owner: Agent, row: Mapping[str, Any], seed: int, said: list[Turn]) -> None:
        self.owner, self.said, self.is_over = owner, said, False
        self.messages = [_plain(message) for message in chat_of(row)]
        self.asked: queue.Queue[Any] = queue.Queue()
        self.answers: queue.Queue[Turn | None] = queue.Queue()
        self.token = secrets.token_urlsafe(24)
        owner.talks[self.token] = self
        url = f"http://127.0.0.1:{owner.server.server_port}/v1"
        threading.Thread(target=self._run, args=(url, dict(row), seed), daemon=True).start()
        try:
            self._next(is_first=True)
            for turn in said:
                self._tell(turn)
        except EnvironmentFault:
            self.close()  # the caller gets no reference
            raise

    def _run(self, url: str, row: dict[str, Any], seed: int) -> None:
        try:
            paid = self.owner.agent(url, self.token, row, seed)
            self.asked.put(None if paid is None else float(paid))
        except BaseException as error:
            self.asked.put(EnvironmentFault(f"the agent raised {type(error).__name__}: {error}"))

    def step(self, turn: Turn) -> Reply:
        new = self._tell(turn)
        self.said.append(turn)
        if not isinstance(new, list):
            return Reply((), new, done=True, state={})
        state = {"said": [asdict(turn) for turn in self.said]} if self.owner.repeatable else None
        return Reply(tuple(new), state=state)

    def _tell(self, turn: Turn) -> list[dict[str, str]] | float | None:
        """Answers the waiting request; returns what the next one adds, or what the program returned."""
        if self.is_over:
            raise EnvironmentFault("the agent ended before it got all answers of the policy")
        self.messages.append({"role": "assistant", "content": turn.text})
        self.answers.put(turn)
        return self._next()

    def _next(self, *, is_first: bool = False) -> list[dict[str, str]] | float | None:
        try:
            event = self.asked.get(timeout=self.owner.timeout_s)
        except queue.Empty:
            raise EnvironmentFault(f"the agent sent no request for {self.owner.timeout_s:g} s") from None
        if isinstance(event, EnvironmentFault):
            raise event
        if not isinstance(event, list):
            self.is_over = True
            return event
        known = len(self.messages)
        if event[:known] != self.messages or (len(event) == known) is not is_first:
            raise EnvironmentFault(
                "a request must be the earlier messages, the last answer, and something new; the first one "
                "must be row['prompt']; an agent that rewrites its history cannot be trained here"
            )
        self.messages = event
        return event[known:]

    def close(self) -> None:
        self.owner.talks.pop(self.token, None)
        self.answers.put(None)


class Endpoint(BaseHTTPRequestHandler):
    """POST /v1/chat/completions of the episode whose token it carries."""

    timeout = 60.0  # seconds for a request to arrive

    def do_POST(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        talk: Talking | None = self.server.talks.get(token)  # type: ignore[attr-defined]
        if talk is None:
            return self._send(401, {"error": {"message": "no episode has this token"}})
        tools = list(talk.owner.tools)
        try:
            size = int(self.headers.get("Content-Length") or 0)
            if self.path != "/v1/chat/completions" or not 0 < size <= MAX_BODY_BYTES:
                raise ValueError("only POST /v1/chat/completions of at most 4 MiB is served")
            asked = json.loads(self.rfile.read(size))
            if asked.get("stream") or asked.get("n", 1) != 1 or list(asked.get("tools") or tools) != tools:
                raise ValueError("not served: stream, n above 1, tools not in environment.options")
            messages = [_plain(message) for message in asked["messages"]]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
            return self._send(400, {"error": {"message": f"{type(error).__name__}: {error}"}})
        talk.asked.put(messages)
        turn = talk.answers.get()
        if turn is None:
            talk.answers.put(None)  # for other waiting requests
            return self._send(410, {"error": {"message": "the episode is over"}})
        self._send(200, _completion(turn))

    def _send(self, status: int, body: Mapping[str, Any]) -> None:
        data = json.dumps(body).encode()
        with suppress(OSError):  # the client may be gone
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        return


def _plain(message: Mapping[str, Any]) -> dict[str, str]:
    """Role and text of a message; parts of text are joined."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "".join(part["text"] for part in content)
    return {"role": message["role"], "content": content}


def _completion(turn: Turn) -> dict[str, Any]:
    """The answer of an OpenAI-compatible server. Its `content` is the whole turn, tool calls included."""
    message: dict[str, Any] = {"role": "assistant", "content": turn.text}
    if calls := openai_calls(turn):
        message["tool_calls"] = calls
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if calls else "stop"}
    head = {"id": f"turn-{turn.number}", "object": "chat.completion", "created": 0, "model": "policy"}
    return {**head, "choices": [choice], "usage": None}
