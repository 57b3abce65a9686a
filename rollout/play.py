"""One episode while it is played: its rows of segments, its rewards, and the completion they become."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np

from rl.types import (
    Call,
    Completion,
    Continuation,
    FinishReason,
    Group,
    Message,
    Prompt,
    Segment,
    VersionSpan,
)
from rollout.calls import aborted
from rollout.environment import Episode, ReadCalls, Reply, Turn
from rollout.sampler import completion_seed
from rollout.turns import Step, Talk, Tokens


@dataclass(slots=True)
class Row:
    """A prompt and the completion that grows after it; log-probs of tokens that nobody sampled are 0."""

    prompt_token_ids: tuple[int, ...]
    made: Completion = field(default_factory=aborted)
    routes: list[tuple[int, Any]] = field(default_factory=list)

    def add_turn(self, turn: Completion) -> None:
        made = self.made
        if turn.routes is not None:
            self.routes.append((len(made.token_ids), turn.routes))
        made.token_ids += turn.token_ids
        made.behavior_logprobs += turn.behavior_logprobs
        made.loss_mask += [True] * len(turn.token_ids)
        made.segments.append(Segment("sampled", len(turn.token_ids)))
        for span in turn.version_spans:
            self._span(span.policy_version, span.num_tokens)

    def add_others(self, tokens: Tokens, *, with_logprobs: bool) -> None:
        """Adds tokens that nobody sampled; their version is that of the turn before them."""
        made = self.made
        for _, same in groupby(tokens, key=itemgetter(1)):
            run = list(same)
            made.token_ids += [token for token, _ in run]
            made.segments.append(Segment(run[0][1], len(run)))
        made.loss_mask += [False] * len(tokens)
        made.behavior_logprobs += [0.0] * len(tokens) if with_logprobs else []
        if tokens:
            self._span(made.version_spans[-1].policy_version, len(tokens))

    def _span(self, version: int, number: int) -> None:
        spans = self.made.version_spans
        if spans and spans[-1].policy_version == version:
            number += spans.pop().num_tokens
        spans.append(VersionSpan(version, number))

    @property
    def length(self) -> int:
        return len(self.prompt_token_ids) + len(self.made.token_ids)

    def completion(self, reason: FinishReason, text: str) -> Completion:
        made = self.made
        made.finish_reason, made.text = reason, text
        if self.routes:
            arrays = [routes for _, routes in self.routes]
            kind = np.result_type(*arrays)
            made.routes = np.full((len(made.token_ids), *arrays[0].shape[1:]), -1, kind)
            for begin, routes in self.routes:
                made.routes[begin : begin + len(routes)] = routes
        return made


@dataclass(eq=False)
class Play:
    """An episode: completion `index` of a prompt.

    Attributes:
        call: what was asked for; its sampling's `max_completion_length` is that of the whole episode.
        number: of the episode, in the order in which episodes were submitted.
        turn: number of the turn that is sampled, or was sampled last.
        counts: numeric facts, summed over the turns.
        said: the conversation after the prompt, for readers.
        last, shown: the turn that was sampled last; the messages that follow it, as the model gets them.
    """

    prompt: Prompt
    seed: int
    index: int
    call: Call
    number: int
    is_journaled: bool
    turn: int = 0
    rows: list[Row] = field(default_factory=list)
    rewards: list[float | None] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    said: list[dict[str, Any]] = field(default_factory=list)
    last: Completion | None = None
    shown: list[Message] = field(default_factory=list)
    episode: Episode | None = None
    state: Any = None
    is_dropped: bool = False

    def __post_init__(self) -> None:
        self.talk = Talk(self.prompt)
        self.rows.append(Row(self.prompt.token_ids))

    @property
    def row(self) -> Row:
        return self.rows[-1]

    @property
    def asked(self) -> Prompt:
        """The prompt of the next turn: all tokens of the row, as they are."""
        ids = (*self.row.prompt_token_ids, *self.row.made.token_ids)
        return Prompt(f"{self.prompt.id}, completion {self.index}, turn {self.turn}", "", ids)

    @property
    def turn_seed(self) -> int:
        return completion_seed(completion_seed(self.seed, self.index), self.turn)

    @property
    def key(self) -> str:
        """The turn's key in a journal: episode, turn, and a hash of all tokens with which it is asked."""
        said = json.dumps([self.seed, [(r.prompt_token_ids, r.made.token_ids) for r in self.rows]])
        digest = hashlib.blake2b(said.encode(), digest_size=12).hexdigest()
        return f"{self.prompt.id}/{self.index}/{self.turn}/{digest}"

    @property
    def num_sampled(self) -> int:
        return sum(row.made.num_sampled for row in self.rows)

    @property
    def room(self) -> int:
        return self.room_behind(self.row.length)

    def room_behind(self, length: int) -> int:
        """Tokens that may still be sampled after `length` tokens of a row. An episode samples at most the
        length of one completion, and no row is longer than the prompt with one completion.
        """
        limit = self.call.sampling.max_completion_length
        return min(limit - self.num_sampled, len(self.prompt.token_ids) + limit - length)

    def asks(self, said: Completion, read_calls: ReadCalls | None) -> Turn:
        """The turn that was added last, as the environment gets it."""
        if read_calls is None:
            return Turn(self.turn, said.text)
        before = [*self.row.prompt_token_ids, *self.row.made.token_ids][: -len(said.token_ids)]
        calls = read_calls(before, said.token_ids, self.call.sampling.stop_token_ids)
        return Turn(self.turn, said.text, tuple(calls))

    def add_turn(self, turn: Completion, said: str, ending: str) -> None:
        self.last = turn
        self.row.add_turn(turn)
        self.talk.say(said, ending)
        self.said.append({"role": "assistant", "content": turn.text})

    def add_reply(self, reply: Reply) -> None:
        self.rewards.append(reply.reward)
        self.state = reply.state
        self.counts.update({k: v for k, v in reply.facts.items() if isinstance(v, int | float)})
        self.said += [{"role": m["role"], "content": m["content"]} for m in reply.messages]

    def add_step(self, step: Step) -> bool:
        """Adds what stands between the last turn and the next; returns False if that leaves no room for the
        next. An end of turn that was sampled stays, and is not added a second time.
        """
        tokens = step.tokens
        self.counts["drift"] += step.has_drifted
        if self.talk.ending and self.last and not step.is_new_row:
            is_same = bool(tokens) and tokens[0][0] == self.last.token_ids[-1]
            self.counts["drift"] += not (is_same or step.has_drifted)
            tokens = tokens[1:] if is_same else tokens
        if self.room_behind(len(tokens) + (0 if step.is_new_row else self.row.length)) <= 0:
            return False
        if step.is_new_row:
            self.rows.append(Row(tuple(token for token, _ in tokens)))
        else:
            self.row.add_others(tokens, with_logprobs=self.call.with_logprobs)
        self.turn += 1
        return True

    def completion(self, reason: FinishReason, facts: Mapping[str, Any]) -> Completion:
        """The episode as a completion: a row, and further ones where its prefix changed. Its text is that of
        the last turn.
        """
        made = [row.completion(reason, "") for row in self.rows]
        first = made[0]
        first.text = made[-1].text = self.last.text if self.last else ""
        prompts = [row.prompt_token_ids for row in self.rows]
        first.continuations = [*map(Continuation, prompts[1:], made[1:])]
        numbers = {name: value for name, value in self.counts.items() if value}
        num_turns = sum(segment.origin == "sampled" for row in made for segment in row.segments)
        rewards = [*self.rewards, *[None] * (num_turns - len(self.rewards))]
        first.facts = {"rewards": rewards, "said": self.said, "counts": numbers, **facts}
        return first


@dataclass(eq=False)
class Playing:
    """A group while its episodes are played."""

    prompt: Prompt
    done: dict[int, Completion] = field(default_factory=dict)
    plays: list[Play] = field(default_factory=list)

    @property
    def group(self) -> Group:
        return Group(self.prompt, [self.done[i] for i in range(len(self.plays))])
