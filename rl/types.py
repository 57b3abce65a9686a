"""The nouns of Cohort. Standard library only, so that graders and engines import them without torch.

A `Prompt` is rendered to token ids once. An engine turns it into a `Group` of `Completion`s. A grader turns
each completion into a `Reward`. A `ScoredGroup` is what crosses from `rollout/` into `rl/`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length", "abort"]
Message = Mapping[str, str]


class Reason(StrEnum):
    """Why a reward has the score it has. `INFRA_ERROR`, `BAD_GOLD` and `NOT_APPLICABLE` abstain (score
    None).
    """

    CORRECT = "correct"
    WRONG_ANSWER = "wrong_answer"
    NO_ANSWER = "no_answer"
    HEDGE = "hedge"
    TRUNCATED = "truncated"
    FORMAT = "format"
    PARSE_ERROR = "parse_error"
    TOO_COMPLEX = "too_complex"
    TIMEOUT = "timeout"
    MEMORY = "memory"
    OUTPUT_LIMIT = "output_limit"
    CRASH = "crash"
    FORBIDDEN = "forbidden"
    BAD_VALUE = "bad_value"
    TEST_ERROR = "test_error"
    SCORED = "scored"
    INFRA_ERROR = "infra_error"
    BAD_GOLD = "bad_gold"
    NOT_APPLICABLE = "not_applicable"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question. `token_ids` are what the engine and the policy both see; nothing is ever re-tokenised.

    Attributes:
        id: unique and stable within its source, such as "train/000017".
        text: the rendered chat (or the plain text) that `token_ids` encode.
        messages: the chat it was rendered from; empty for a plain-text prompt.
        columns: what graders need: `answer`, `tests`, ... JSON values only.
    """

    id: str
    text: str
    token_ids: tuple[int, ...]
    messages: tuple[Message, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """`num_tokens` consecutive completion tokens that the policy of version `policy_version` sampled."""

    policy_version: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Trace:
    """In which order a masked diffusion sampler wrote a canvas: a completion and the tail behind its end.

    Attributes:
        steps: of each column of the canvas, the step (from 0) that committed its token; `num_steps` where
            none did.
        tail_ids: what stands behind the completion; the mask token where no token was committed.
        num_steps: model calls of the row.
        pieces: the text of each token of the completion, for readers.
    """

    steps: list[int]
    tail_ids: list[int]
    num_steps: int
    pieces: list[str]


@dataclass(slots=True)
class Completion:
    """What the behavior policy answered to one prompt.

    Attributes:
        token_ids: sampled ids, the end-of-turn id included when `finish_reason` is "stop".
        behavior_logprobs: nats, one per token, of the distribution that was sampled from (temperature
            applied); empty if the engine was asked for none.
        loss_mask: one per token; False for tokens that the policy did not choose (tool output).
        finish_reason: "stop", "length" (cut by max_completion_length) or "abort" (the engine failed; data,
        never a reward of 0).
        version_spans: in order, they add up to len(token_ids).
        text: the ids decoded once, without the end and pad tokens behind them, for graders and readers; other
        special tokens, such as <think> in some vocabularies, stay.
        routes: experts chosen per token and layer (mixture-of-experts replay), or None.
        trace: the order in which a masked diffusion sampler committed the tokens, or None.
    """

    token_ids: list[int]
    behavior_logprobs: list[float]
    loss_mask: list[bool]
    finish_reason: FinishReason
    version_spans: list[VersionSpan]
    text: str = ""
    routes: Any = None
    trace: Trace | None = None

    @property
    def policy_version(self) -> int:
        """The oldest policy version that sampled a token of this completion; 0 if it has none."""
        return min((span.policy_version for span in self.version_spans), default=0)


@dataclass(slots=True)
class Group:
    """A prompt and its G completions: what an engine returns. Groups may be ragged: an aborted completion
    stays in.
    """

    prompt: Prompt
    completions: list[Completion]


@dataclass(frozen=True, slots=True)
class Reward:
    """A grader's verdict on one completion. `score` is never overwritten by an advantage.

    Attributes:
        score: the number, or None when the grader abstains (its own fault, an unusable gold): left out of the
        group's baseline.
        reason: see `Reason`.
        detail: one sentence for a reader.
        extracted: the answer that was found in the completion, if any.
        elapsed_ms: grading time in milliseconds.
        parts: name -> score of each reward that was composed into this one, before weights; None where it
            abstained.
    """

    score: float | None
    reason: Reason = Reason.SCORED
    detail: str = ""
    extracted: str | None = None
    elapsed_ms: float = 0.0
    parts: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(slots=True)
class ScoredGroup:
    """A group and one reward per completion, in the same order: the boundary from `rollout/` to `rl/`."""

    group: Group
    rewards: list[Reward]

    @property
    def prompt(self) -> Prompt:
        return self.group.prompt

    @property
    def completions(self) -> list[Completion]:
        return self.group.completions


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one call samples. `top_k=0`, `top_p=1.0`, `min_p=0.0` mean the whole distribution;
    `temperature=0.0` means greedy.

    Attributes:
        stop: a completion ends behind the token in which one of these strings is complete.
    """

    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()


class WeightStream(Protocol):
    """The policy's weights on their way to an engine, under their Hugging Face names, LoRA merged."""

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """(name, torch.Tensor) pairs, every tensor of the model once, tied ones once. May be iterated several
        times.
        """
        ...

    def canary(self) -> tuple[list[int], list[float]]:
        """Fixed token ids and the policy's own log-probs (nats, temperature 1) of ids[1:] given what precedes
        them.
        """
        ...


class Observer(Protocol):
    """Who is told how a run goes: screens, trackers, watchdogs. It never stops a run and never fails one.

    Every process of a run has one; what is the same for all is told on the main process alone.
    """

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """The row of metrics of a step that just ended."""
        ...

    def heldout(self, step: int, accuracy: float, low: float, high: float) -> None:
        """Held-out accuracy of the weights after `step` steps, with its 95 % interval."""
        ...

    def warn(self, text: str) -> None:
        """A sentence that the user should read."""
        ...

    def note(self, text: str) -> None:
        """A sentence that the user may read."""
        ...


class Scorer(Protocol):
    """Grades completions. `rewards.pool.RewardPool` is one; anything with these methods is."""

    def score(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        """Rewards for every completion, in order. Never raises for a bad sample: that sample abstains."""
        ...

    def submit(self, group: Group) -> Future[ScoredGroup]:
        """Starts grading a group and returns at once; the future ends within the grader's deadlines."""
        ...

    def close(self) -> None:
        """Ends all workers; safe to call twice."""
        ...
