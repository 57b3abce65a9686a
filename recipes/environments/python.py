"""A Python session as a tool, in the sandbox of the code grader."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from recipes.environments.calls import ToolError, answer_calls
from recipes.environments.tools import schemas
from rewards.sandbox import Limits, Sandbox, SandboxError, own_seconds
from rollout.environment import Environment, EnvironmentFault, Episode, Reply, Turn

LEAST_S = 0.05  # less time is left for no call
LONG = 1000  # characters: an error stands before such an output, and is not cut off with its end


class PythonSession(Environment):
    """The tool `python`; names stay from call to call. Earlier cells are run again before each new one, so
    that a session is a function of its cells, and goes on after a kill.

    Args:
        timeout_s: of all cells of a session together, for all calls of a turn; less than
            environment.deadline_s. Waiting for a processor that others keep busy does not count.
        memory_mib: address space of a session.
    """

    repeatable = True

    def __init__(self, *, timeout_s: float = 5.0, memory_mib: int = 512) -> None:
        limits = Limits(timeout_s=timeout_s, memory_mib=memory_mib, output_mib=1)
        self.sandbox = Sandbox(num_workers=1, limits=limits)
        self.tools = schemas([Session(self, [], 0).python])

    def open(self, row: Mapping[str, Any], seed: int, state: Any = None) -> Session:
        return Session(self, list((state or {"cells": []})["cells"]), seed)

    def close(self) -> None:
        self.sandbox.close()


class Session(Episode):
    def __init__(self, owner: PythonSession, cells: list[str], seed: int) -> None:
        self.owner, self.cells, self.left_s = owner, cells, 0.0
        self.seeded = f"__import__('random').seed({seed})"  # earlier cells draw what they drew

    def step(self, turn: Turn) -> Reply:
        self.left_s = self.owner.sandbox.limits.timeout_s
        messages, counts = answer_calls(turn, {"python": self.python})
        return Reply(tuple(messages), None, not messages, counts, {"cells": self.cells})

    def python(self, code: str) -> str:
        """
        Runs Python code and returns what it prints; names stay from call to call.

        Args:
            code: the program.
        """
        limits, began = self.owner.sandbox.limits, time.monotonic()
        if self.left_s < LEAST_S:
            raise _failed("", f"no end within {limits.timeout_s:g} s of the calls of a turn")
        mark = f"\x1e{secrets.token_hex(8)}\x1e"  # on a line before the output of the newest cell, and after
        source = "\n".join([self.seeded, *self.cells, f"print({mark!r})", code, "", f"print({mark!r})"])
        try:
            result = self.owner.sandbox.run(source, limits=replace(limits, timeout_s=self.left_s))
        except SandboxError as error:
            raise EnvironmentFault(f"the sandbox failed: {error}") from error
        self.left_s -= own_seconds(result.cpu_s, time.monotonic() - began)
        parts = result.stdout.decode("utf-8", "replace").split(f"{mark}\n")
        out = parts[1] if len(parts) > 1 else ""
        if result.timed_out:
            raise _failed(out, f"no end within {limits.timeout_s:g} s")
        if result.truncated:
            raise _failed(out, f"more than {limits.output_mib} MiB of output")
        if result.exit_code != 0:
            said = result.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
            raise _failed(out, "".join(said) or f"signal {result.signal}")
        if len(parts) < 3:
            raise _failed(out, "the program ended the session")
        self.cells.append(code)
        return out or "(no output)"


def _failed(out: str, why: str) -> ToolError:
    return ToolError(f"{out}error: {why}" if len(out) < LONG else f"error: {why}\n{out}")
