"""A process that runs environments, so that a hanging one can be killed. It exchanges only JSON frames."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from recipes.environments import load
from recipes.environments.calls import seed_call
from rewards.pool.worker import encode_frame, limit_memory, read_frame, take_pipes
from rollout.environment import Environment, EnvironmentFault, Episode, Turn, checked_reply

MAX_CHARACTERS = 1 << 18  # of a message; more than a model reads
MAX_TEXT = 500
MAX_BYTES = 16 << 20  # of an answer, its facts and state included


def main(parent_pid: int) -> None:
    """Serves frames from stdin until it ends. The first says what to load; its answer, what was loaded."""
    requests, descriptor = take_pipes(parent_pid)
    answers = os.fdopen(descriptor, "wb")
    hello = read_frame(requests)
    if hello is None:
        return

    def send(message: Mapping[str, Any]) -> None:
        frame = encode_frame(message)
        if len(frame) > MAX_BYTES:
            frame = encode_frame({"fault": f"its answer has {len(frame):,} bytes, over {MAX_BYTES:,}"})
        answers.write(frame)
        answers.flush()

    try:
        environment = load(hello["name"], hello["options"])
        send({"tools": list(environment.tools), "repeatable": bool(environment.repeatable)})
    except Exception as error:
        send({"error": str(error)})
        return
    limit_memory(hello["memory_bytes"])
    episodes: dict[int, Episode] = {}
    while (call := read_frame(requests)) is not None:
        send(_answer(environment, episodes, call))


def _answer(
    environment: Environment, episodes: dict[int, Episode], call: Mapping[str, Any]
) -> dict[str, Any]:
    """Plays a turn of an episode, opened first if `call` has "open"; a call without "turn" closes it."""
    try:
        if "turn" not in call:
            if (over := episodes.pop(call["episode"], None)) is not None:
                over.close()
            return {}
        turn = Turn.of(call["turn"])
        seed_call(call["seed"], turn.number, "open")
        if "open" in call:
            episodes[call["episode"]] = environment.open(**call["open"])
        began = time.monotonic()
        seed_call(call["seed"], turn.number, "step")  # no matter what other episodes drew
        reply = asdict(checked_reply(episodes[call["episode"]].step(turn)))
        own = {f"seconds/{tool.get('function', tool)['name']}" for tool in environment.tools}
        facts = {n: v for n, v in reply["facts"].items() if n in own or not n.startswith("seconds/")}
        if not own & facts.keys():
            facts["seconds/environment"] = round(time.monotonic() - began, 4)
        reply["facts"] = facts
        for message in reply["messages"]:
            message["content"] = message["content"][:MAX_CHARACTERS]
        return {"reply": reply}
    except EnvironmentFault as error:
        return {"fault": str(error)[:MAX_TEXT]}
    except BaseException as error:  # also SystemExit: whatever it raises is the environment's fault
        error.__traceback__ = None  # its frames may hold what filled the memory
        # After a MemoryError the heap cannot be trusted with other episodes.
        return {
            "fault": f"{type(error).__name__}: {error}"[:MAX_TEXT],
            "ends": isinstance(error, MemoryError),
        }
