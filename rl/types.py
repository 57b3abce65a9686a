"""The nouns of Cohort. Standard library only, so that graders and engines import them without torch.

A `Prompt` is rendered to token ids once. An engine turns it into a `Group` of `Completion`s. A grader turns
each completion into a `Reward`. A `ScoredGroup` is what crosses from `rollout/` into `rl/`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length", "abort"]
Message = Mapping[str, str]


class Reason(StrEnum):
    """Why a reward has its score. `INFRA_ERROR`, `BAD_GOLD` and `NOT_APPLICABLE` abstain (score None)."""

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
        teacher_token_ids: the prompt as a teacher reads it, with a demonstration; empty: `token_ids`.
    """

    id: str
    text: str
    token_ids: tuple[int, ...]
    messages: tuple[Message, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    teacher_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """`num_tokens` consecutive completion tokens that the policy of version `policy_version` sampled."""

    policy_version: int
    num_tokens: int


Origin = Literal["sampled", "scaffold", "tool", "user"]


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive completion tokens of one origin: the policy, a template around a turn, a tool, a user."""

    origin: Origin
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Continuation:
    """A further row of an episode. It has its own prompt, because it does not continue the row before."""

    prompt_token_ids: tuple[int, ...]
    completion: Completion


@dataclass(slots=True)
class Completion:
    """What the behavior policy answered to one prompt: one turn, or the turns of an episode in one row.

    Attributes:
        token_ids: sampled ids, the end-of-turn id included when `finish_reason` is "stop".
        behavior_logprobs: nats, one per token, under the distribution that was sampled from (temperature
            applied); empty if the call did not ask for them.
        loss_mask: one per token; False for tokens that the policy did not choose (tool output).
        finish_reason: "stop", "length" (cut off) or "abort" (the engine failed: never a reward of 0).
        version_spans: in order, they add up to len(token_ids).
        text: the ids decoded once, for graders and readers. Trailing end and pad tokens are cut; other
            special tokens, such as <think> in some vocabularies, stay.
        routes: expert ids that sampling used, [tokens, decoder layers, K], -1 where unknown; None: no record.
        segments: in order, they add up to len(token_ids); empty: the policy sampled all of it.
        facts: JSON values by name that tell graders, policies and the report how it was sampled.
        continuations: further rows of the same episode, in order.
    """

    token_ids: list[int]
    behavior_logprobs: list[float]
    loss_mask: list[bool]
    finish_reason: FinishReason
    version_spans: list[VersionSpan]
    text: str = ""
    routes: Any = None
    segments: list[Segment] = field(default_factory=list)
    facts: Mapping[str, Any] = field(default_factory=dict)
    continuations: list[Continuation] = field(default_factory=list)

    @property
    def policy_version(self) -> int:
        """The oldest policy version that sampled a token of this completion; 0 without tokens."""
        return min((span.policy_version for row in self.rows for span in row.version_spans), default=0)

    @property
    def rows(self) -> list[Completion]:
        """This row and the further rows of its episode."""
        return [self, *(further.completion for further in self.continuations)]

    @property
    def num_sampled(self) -> int:
        """The number of tokens that the policy chose, in all rows."""
        return sum(sum(row.loss_mask) for row in self.rows)


@dataclass(slots=True)
class Group:
    """A prompt and its G completions, as an engine returns them: ragged, aborted ones included."""

    prompt: Prompt
    completions: list[Completion]


@dataclass(frozen=True, slots=True)
class Reward:
    """A grader's verdict on one completion. `score` is never overwritten by an advantage.

    Attributes:
        score: None if the grader abstains (it failed, or the gold is unusable); left out of the baseline.
        reason: see `Reason`.
        detail: one sentence for a reader.
        extracted: the answer found in the completion, if any.
        elapsed_ms: grading time in milliseconds.
        parts: name -> score of each reward composed into this one, before weights; None if it abstained.
        turns: reward of each turn of an episode, None for a turn without one; empty for a single turn.
    """

    score: float | None
    reason: Reason = Reason.SCORED
    detail: str = ""
    extracted: str | None = None
    elapsed_ms: float = 0.0
    parts: Mapping[str, float | None] = field(default_factory=dict)
    turns: tuple[float | None, ...] = ()


Advantage = float | Sequence[float]
"""One completion's advantage: one number for all of its tokens, or one number per token."""


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
    """How one call samples. Temperature 0 is greedy; top_k=0, top_p=1 and min_p=0 cut nothing off.

    Attributes:
        stop: a completion ends after the token that completes one of these strings.
    """

    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """One request to an engine: `num_completions` completions of each prompt.

    Attributes:
        seeds: one number per prompt. Completion g draws from a seed made of that number and g.
        with_logprobs: whether completions carry `behavior_logprobs`.
    """

    prompts: tuple[Prompt, ...]
    num_completions: int
    sampling: SamplingParams
    seeds: tuple[int, ...]
    with_logprobs: bool = True

    def __post_init__(self) -> None:
        if len(self.seeds) != len(self.prompts):
            raise ValueError(f"{len(self.seeds)} seeds for {len(self.prompts)} prompts; give one per prompt")


class Team(Protocol):
    """The processes that work on one run. All call `gather` equally often."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...

    def gather(self, mine: Any) -> list[Any]:
        """The values of all processes, in rank order; `mine` is made of JSON values and tensors."""
        ...


@dataclass(frozen=True, slots=True)
class OneProcess:
    """The team of a run in a single process."""

    rank: int = 0
    size: int = 1

    def gather(self, mine: Any) -> list[Any]:
        return [mine]


ALONE = OneProcess()


class WeightStream(Protocol):
    """The policy's weights on their way to an engine, under their Hugging Face names, LoRA merged."""

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """(name, torch.Tensor): every tensor of the model once, tied ones once. Can be iterated again."""
        ...

    def canary(self) -> tuple[list[int], list[float]]:
        """Fixed token ids, and the policy's log-probs (nats, temperature 1) of ids[1:] after the rest."""
        ...


class Observer(Protocol):
    """Receives the progress of a run: a screen, a tracker, a watchdog. It never stops a run or breaks it.

    Every process of a run has one; what is the same on all processes is reported by the main one only.
    """

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Receives the metrics of a step that just ended."""
        ...

    def heldout(self, step: int, accuracy: float, low: float, high: float) -> None:
        """Receives held-out accuracy of the weights after `step` steps, with its 95 % interval."""
        ...

    def warn(self, text: str, *, topic: str = "") -> None:
        """Receives a sentence that the user should read; of each named topic only the first is shown."""
        ...

    def note(self, text: str) -> None:
        """Receives a sentence that the user may read."""
        ...

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """Shows what the run waits for inside the `with` block."""
        ...


class Source(Protocol):
    """Where scored groups come from. Asynchrony is a property of the source, not of the loop.

    Attributes:
        cursor: prompts consumed so far over all processes, a JSON value; saved in checkpoints. Setting it
            makes the source continue from there and forget what it had started.
        policy_version: version of the weights that the engine samples from.
        last_counts, last_rejected: counts of what the latest `groups` sampled, and what it threw away.
    """

    cursor: Any
    policy_version: int
    last_counts: dict[str, float]
    last_rejected: list[ScoredGroup]

    def groups(self, num_groups: int) -> Iterator[ScoredGroup]:
        """This process's share of `num_groups` groups over all processes, in the order of the queue.

        `cursor`, `last_counts` and `last_rejected` are valid once the iterator has ended.

        Raises:
            RuntimeError: engine or graders failed for all of them, or did not answer in time.
        """
        ...

    def yield_device(self) -> None:
        """Stops an engine that shares the trainer's device until `publish`; called once groups are packed."""
        ...

    def publish(self, weights: WeightStream, *, version: int) -> Mapping[str, float]:
        """Sends the policy's weights to the engine, proves that they arrived, and returns metrics of that.

        Raises:
            RuntimeError: the weights did not arrive, on this process or another.
        """
        ...

    def settle(self) -> None:
        """Ends the proof of the newest weights, on all processes; it raises what `publish` raises."""
        ...

    def close(self) -> None:
        """Ends engine and graders; safe to call twice."""
        ...


class Scorer(Protocol):
    """Grades completions. `rewards.pool.RewardPool` is one; any object with these methods is."""

    def score(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        """Rewards for every completion, in order. Never raises for a bad sample: that sample abstains."""
        ...

    def submit(self, group: Group) -> Future[ScoredGroup]:
        """Starts grading a group and returns at once; the future ends within the grader's deadlines."""
        ...

    def close(self) -> None:
        """Ends all workers; safe to call twice."""
        ...
