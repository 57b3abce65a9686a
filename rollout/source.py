"""Where scored groups come from: prompts in a seeded order, sampled, graded, and handed to the trainer.

Sampling may go on across training steps, and no token is older than `max_staleness`. With `max_staleness=0`
every group is sampled with the newest weights, and no thread is started.

Training consumes prompts strictly in the order in which they were started. A group that finishes early waits
in the queue for its turn, so which groups are trained does not depend on how long they took. Taking whatever
finishes first would prefer short completions.

Age is bounded by admission, not by throwing work away. With version v in the engine, step v comes next, and
at most (1 + max_staleness) steps' worth of prompts are started and not consumed. A step consumes at least its
own size from the head of the queue. So what is started at version v is trained at step v + max_staleness at
the latest. None of its tokens is older than v. An older token can only mean that the engine sampled with
weights it should have replaced, which ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from typing import Any

from rl.types import ALONE, Call, Completion, Prompt, SamplingParams, ScoredGroup, Scorer, Team, WeightStream
from rollout.engine import Engine, EngineError
from rollout.in_flight import GroupSampling, InFlight, Request
from rollout.prompts import PromptStream, deal, sampling_seed, shortest_cursor
from rollout.weight_sync import SyncReport, publish


@dataclass(frozen=True, slots=True)
class Admission:
    """How far sampling may be ahead of training.

    Attributes:
        max_staleness: training step minus policy version never exceeds it.
        num_steps: steps of the run; no prompt is started that no step would train on. None: endless.
        in_flight, timeout_s: `InFlight`'s limit (None: all that age allows) and longest wait.
    """

    max_staleness: int = 0
    num_steps: int | None = None
    in_flight: int | None = None
    timeout_s: float = 600.0


@dataclass(frozen=True, slots=True)
class DynamicSampling:
    """Groups that fail `keep_fn` are replaced by the next of the queue (DAPO section 3.2, arXiv:2503.14476).

    A step takes at most `max_rounds` rounds. Then rejected groups fill it up, so that every step has its
    size.
    """

    keep_fn: Callable[[ScoredGroup], bool] = lambda group: True
    max_rounds: int = 1


@dataclass(frozen=True, slots=True)
class WeightSync:
    """How new weights reach the engine; see `rollout.weight_sync.publish`."""

    tolerance: float | None = None
    verify: bool = True
    sends: bool = True


class RolloutSource:
    """The `Source` of a run: keeps completions in flight, and grades each group as it finishes.

    Args:
        sampling: what the engine is asked for, per prompt.
        team: all its processes call `groups` and `publish` equally often.
        phase: a context manager for what the run waits for: "sample", "score", "sync".
    """

    def __init__(
        self,
        engine: Engine,
        scorer: Scorer,
        stream: PromptStream,
        sampling: GroupSampling,
        *,
        admission: Admission = Admission(),
        dynamic: DynamicSampling = DynamicSampling(),
        sync: WeightSync = WeightSync(),
        team: Team = ALONE,
        phase: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.engine, self.scorer, self.stream = engine, scorer, stream
        self.admission, self.dynamic, self.sync = admission, dynamic, sync
        self.team, self.phase = team, phase
        self.policy_version = 0
        self.last_counts: dict[str, float] = {}
        self.last_rejected: list[ScoredGroup] = []
        self._in_flight = InFlight(
            engine, scorer, sampling, limit=admission.in_flight, timeout_s=admission.timeout_s
        )
        self._share = 0
        self._verdict: Callable[[], SyncReport] | None = None
        self._canary: Mapping[str, float] = {}
        self._next = 0
        self._cursor: Any = 0

    @property
    def cursor(self) -> Any:
        """The position in the stream, without what is in flight: a restart samples that again. Uneven dynamic
        sampling of several processes may leave holes in the order. Then it is {"next": n, "pending": [...]},
        and all numbers below n are consumed except the pending ones.
        """
        return self._cursor

    @cursor.setter
    def cursor(self, value: Any) -> None:
        self.settle()
        self._cursor = value
        self._next, pending = (value["next"], value["pending"]) if isinstance(value, dict) else (value, [])
        self._in_flight.end_overlap()
        self._in_flight.clear()
        self._start(pending[self.team.rank :: self.team.size])
        if self.engine.sleeps_while_training:  # next comes training on recorded groups, or a sync
            self.engine.hold(release=True)

    def groups(self, num_groups: int) -> Iterator[ScoredGroup]:
        """As `Source.groups`, in the order of their start; rejected ones that fill a step up come last.

        The first group comes when all are graded: rounds are collective, and what the caller does between two
        groups may be, too. RuntimeError is also raised if the engine keeps weights that were replaced.
        """
        self._in_flight.end_overlap()
        self._share = num_groups // self.team.size
        kept: list[ScoredGroup] = []
        rejected: list[ScoredGroup] = []
        rounds = 0
        while True:
            lacking = self._share - len(kept)
            needs = self.team.gather((lacking, self._room(lacking)))
            if not any(lacks for lacks, _ in needs) or rounds == self.dynamic.max_rounds:
                break
            rounds += 1
            self._deal([room for _, room in needs])
            if self._verdict is not None:  # the engine samples meanwhile
                self._in_flight.refill()
                self.settle()
            for scored in self._take(lacking):
                (kept if self.dynamic.keep_fn(scored) else rejected).append(scored)
        missing = self._share - len(kept)
        self.last_rejected = rejected[missing:]
        self.last_counts = self._counts(kept + rejected, rounds=rounds, replaced=len(rejected) - missing)
        pending = self.team.gather([request.ordinal for request in self._in_flight.queue])
        self._cursor = shortest_cursor(self._next, sorted(n for ordinals in pending for n in ordinals))
        self._in_flight.begin_overlap()
        yield from kept + rejected[:missing]

    def yield_device(self) -> None:
        self._in_flight.yield_device()

    def publish(self, weights: WeightStream, *, version: int) -> Mapping[str, float]:
        """Sends the engine the policy's weights, with requests in flight, and starts what they admit.

        An engine that samples by itself begins before its canary is compared, which `groups` does before
        anything is trained. The metrics then have the canary of the version before.
        """
        self._in_flight.end_overlap()
        assert self._verdict is None, "weights were replaced before their canary was compared"
        # Until the first batch is asked for, a run may be replaying what its ledger holds.
        waits = self.engine.runs_alone and self._share > 0
        how = {"team": self.team, "canary_waits": waits, **asdict(self.sync)}
        with self.phase("sync"):
            report = publish(self.engine, weights, version=version, **how)
        self.policy_version, self._verdict = version, report.verdict
        if not waits:
            self._canary = report.canary_metrics
        # Without staleness, prompts would run beside an evaluation in one run and not in another, and round
        # otherwise. A run may be replaying, as above.
        if self._share and self.admission.max_staleness:
            self._deal(self.team.gather(self._room(self._share)))
            self._in_flight.refill()
        return {**report.metrics, **self._canary}

    def settle(self) -> None:
        self._in_flight.end_overlap()
        verdict, self._verdict = self._verdict, None
        if verdict is not None:
            with self.phase("sample"):
                self._canary = verdict().canary_metrics

    def close(self) -> None:
        with suppress(EngineError):
            self._in_flight.end_overlap()
        self.scorer.close()
        self.engine.close()

    def _room(self, lacking: int) -> int:
        """How many more prompts may be started while the next step still needs `lacking` groups."""
        ahead = self.admission.max_staleness
        if self.admission.num_steps is not None:
            ahead = min(ahead, self.admission.num_steps - 1 - self.policy_version)
        return max(0, lacking + ahead * self._share - len(self._in_flight.queue)) if ahead >= 0 else 0

    def _deal(self, wanted: Sequence[int]) -> None:
        """Consumes sum(wanted) numbers over all processes and starts those of this one."""
        self._start(deal(self._next, wanted)[self.team.rank])
        self._next += sum(wanted)

    def _start(self, ordinals: Sequence[int]) -> None:
        self._in_flight.queue += (Request(n, self.stream.at(n)) for n in ordinals)

    def _take(self, count: int) -> list[ScoredGroup]:
        """The first `count` groups of the queue, sampled and graded, none of them too old."""
        heads = self._in_flight.queue[:count]
        if not heads:
            return []
        with self.phase("sample"):
            self._in_flight.wait_for_engine(heads)
        with self.phase("score"):
            groups = self._in_flight.wait_for_graders(heads)
        if (age := max(map(self._age, groups))) > self.admission.max_staleness:
            raise EngineError(
                f"engine {self.engine.name} sampled with weights {age} versions behind version "
                f"{self.policy_version}, which it was given: more than train.max_staleness="
                f"{self.admission.max_staleness}; read the engine's log"
            )
        if all(is_engine_fault(c) for group in groups for c in group.completions):
            # `collect` returns failures as data; `generate` makes the engine say what is wrong.
            self.engine.generate(self._in_flight.call(heads))
            raise EngineError(f"engine {self.engine.name} failed for all completions of {count} prompts")
        del self._in_flight.queue[:count]
        return groups

    def _age(self, group: ScoredGroup) -> int:
        """Versions between the oldest token of a group and the step to come; 0 for a group without tokens."""
        versions = [c.policy_version for c in group.completions if c.token_ids]
        return self.policy_version - min(versions, default=self.policy_version)

    def _counts(self, consumed: Sequence[ScoredGroup], *, rounds: int, replaced: int) -> dict[str, float]:
        num_tokens = sum(c.num_sampled for g in consumed for c in g.completions)
        counts = {"rounds": rounds, "replaced": replaced, "sampled_tokens": num_tokens}
        if self.admission.max_staleness:
            counts["in_flight"] = self.engine.in_flight
        return {name: float(number) for name, number in counts.items()}


def is_engine_fault(completion: Completion) -> bool:
    """Whether the engine, and not an environment, gave up the completion."""
    named = completion.facts.keys() & {"fault", "interrupted"}
    return completion.finish_reason == "abort" and not named


def sample_and_score(
    engine: Engine,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    *,
    num_samples: int,
    seed: int,
    first: int = 0,
    stride: int = 1,
) -> list[ScoredGroup]:
    """Held-out evaluation of prompts first, first + stride, ...: own sampling, own seeds, no cursor is
    moved.
    """
    ordinals = range(first, len(prompts), stride)
    if not ordinals:
        return []
    asked = tuple(prompts[n] for n in ordinals)
    seeds = tuple(sampling_seed(seed, n, "evaluate") for n in ordinals)
    return scorer.score(engine.generate(Call(asked, num_samples, sampling, seeds, with_logprobs=False)))
