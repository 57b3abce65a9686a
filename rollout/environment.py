"""Protocols of the environments in which completions of several turns play, and of the journal that the
engine of such episodes keeps (`rollout.episodes`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rl.types import Message

ROLES = ("tool", "user", "system")


class EnvironmentFault(RuntimeError):
    """An environment failed through no fault of the policy: the episode abstains, not with a reward of 0."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool by its name, or the `fault` that prevents it."""

    name: str = ""
    arguments: Mapping[str, Any] | None = None
    fault: str = ""


ReadCalls = Callable[[Sequence[int], Sequence[int], Sequence[int]], Sequence[ToolCall]]
"""(ids before a turn, ids of the turn, ids that end a turn) -> its calls, in order."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What the policy said in turn `number`, counted from 0, without the end-of-turn token.

    Attributes:
        calls: tool calls that were found in the text; None if nobody has looked for them.
    """

    number: int
    text: str
    calls: tuple[ToolCall, ...] | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Turn:
        """A turn from what `dataclasses.asdict` made of it, whether or not it went through JSON."""
        calls = values["calls"]
        calls = None if calls is None else tuple(ToolCall(**call) for call in calls)
        return cls(values["number"], values["text"], calls)


@dataclass(frozen=True, slots=True)
class Reply:
    """An environment's answer to a turn.

    Attributes:
        messages: what the policy reads next, of roles tool, user or system; content is text.
        reward: of this turn; None: it has none.
        done: the episode is over.
        facts: JSON values, for graders and the report; numbers are summed over the turns.
        state: a JSON value from which `Environment.open` goes on in another process, {} if it needs none.
            None: there is no such value, so that an interrupted episode abstains.
    """

    messages: tuple[Message, ...] = ()
    reward: float | None = None
    done: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)
    state: Any = None


class Episode(Protocol):
    def step(self, turn: Turn) -> Reply:
        """Answers a turn, within a time that the environment bounds.

        Raises:
            EnvironmentFault: the environment failed. Any other exception counts as one.
        """
        ...

    def close(self) -> None:
        """Frees what the episode holds; safe to call twice."""
        return


class Environment(Protocol):
    """Opens episodes, from several threads at once.

    Attributes:
        repeatable: a call that was under way when the run was killed may be made again.
        tools: JSON schemas of the tools that the chat template shows to the model.
    """

    repeatable: bool
    tools: Sequence[Mapping[str, Any]]

    def open(self, row: Mapping[str, Any], seed: int, state: Any = None) -> Episode:
        """Begins an episode, or goes on from the `state` of a reply.

        Args:
            row: the columns of the prompt, and `prompt` itself: its messages, or a plain text.
            seed: the same for all completions of a prompt, so that they begin alike.
        """
        ...

    def close(self) -> None:
        """Ends all processes; calls that wait for them fail. Safe to call twice."""
        return


class Journal(Protocol):
    """Turns and answers that outlive a killed run."""

    def find(self, key: str) -> Mapping[str, Any] | None:
        """The newest entry of a turn: its "ids" when it was asked, or a "reply", "fault" or "interrupted"."""
        ...

    def append(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Writes entries, each with its "key"; they are on disk when this returns."""
        ...

    def begin(self, version: int) -> None:
        """Called with new weights: forgets entries that no later step can ask for."""
        ...


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def checked_reply(reply: Any, calls: Sequence[ToolCall] = ()) -> Reply:
    """The reply with text that a tokenizer takes; messages of tools without a name get that of their call.

    Raises:
        EnvironmentFault: the reply is malformed.
    """
    if not isinstance(reply, Reply):
        raise EnvironmentFault(f"the environment answered {type(reply).__name__} instead of a Reply")
    messages, names = [], iter([call.name for call in calls])
    for message in reply.messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise EnvironmentFault(
                f"the environment answered with a message of role {role!r} and content "
                f"{type(content).__name__}; the role is one of {', '.join(ROLES)}, and the content is text"
            )
        if role == "tool" and (name := next(names, "")):
            message = {"name": name, **message}
        messages.append({k: _encodable(v) if isinstance(v, str) else v for k, v in message.items()})
    if reply.reward is not None and not math.isfinite(reply.reward):
        raise EnvironmentFault(f"the environment gave a reward of {reply.reward}")
    if not (reply.done or messages):
        raise EnvironmentFault("the environment answered nothing, but the episode is not over")
    try:
        json.dumps([dict(reply.facts), reply.state, messages], allow_nan=False)
    except (TypeError, ValueError) as error:
        raise EnvironmentFault(f"facts, state and messages must be JSON values: {error}") from None
    return Reply(tuple(messages), reply.reward, bool(reply.done), dict(reply.facts), reply.state)
