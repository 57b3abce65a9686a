"""`ContinuousSource`: sampling goes on across training steps, and no token is older than `max_staleness`.

Training consumes prompts strictly in the order in which they were started. A group that finishes early waits
in the queue for its turn, so which groups are trained does not depend on how long they took: the lengths that
are trained are those that were sampled. Taking whatever finishes first would prefer short completions.

Age is bounded by admission, not by throwing work away. With version v in the engine the step to come is step
v, and at most (1 + max_staleness) steps' worth of prompts are started and not consumed. A step consumes at
least its own size from the head of the queue, so what is started at version v is trained at step
v + max_staleness at the latest, and none of its tokens is older than v. An over-age group can only mean that
the engine sampled with weights it should have replaced: it is counted, and sampled again in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any

from rl.types import SamplingParams, ScoredGroup, Scorer, WeightStream
from rollout.engine import Engine, EngineError
from rollout.in_flight import InFlight, Request
from rollout.source import Phase, PromptStream, deal
from rollout.weight_sync import SyncReport, publish

Gather = Callable[[Any], list[Any]]
MAX_ATTEMPTS = 3


class ContinuousSource:
    """Keeps completions in flight while the trainer learns, and grades each group as it finishes.

    With `max_staleness=0` it asks the engine for what `OnPolicySource` asks for and returns the same, bit for
    bit. Dynamic sampling: a rejected group is replaced by the next one in the queue, and a step goes round at
    most `max_rounds` times, as in `OnPolicySource`.

    Args:
        in_flight: most completions that are submitted and not collected; None: all that age allows.
        num_steps: steps of the run; no prompt is started that no step would train on.
        gather: what every process gives, in rank order; all processes call it equally often.
        timeout_s: longest wait for the engine to finish any group, or for the graders to finish any.
    """

    def __init__(
        self,
        engine: Engine,
        scorer: Scorer,
        stream: PromptStream,
        sampling: SamplingParams,
        *,
        group_size: int,
        seed: int,
        max_staleness: int,
        in_flight: int | None = None,
        num_steps: int | None = None,
        with_logprobs: bool = True,
        keep_fn: Callable[[ScoredGroup], bool] | None = None,
        max_rounds: int = 1,
        process: tuple[int, int] = (0, 1),
        gather: Gather = lambda mine: [mine],
        phase: Phase = lambda name: nullcontext(),
        sync_tolerance: float | None = None,
        verify_sync: bool = True,
        timeout_s: float = 600.0,
    ) -> None:
        self.engine, self.scorer, self.stream = engine, scorer, stream
        self.max_staleness, self.num_steps = max_staleness, num_steps
        self.keep_fn, self.max_rounds = keep_fn, max_rounds
        self.rank, self.num_processes = process
        self.gather, self.phase = gather, phase
        self.sync_tolerance, self.verify_sync = sync_tolerance, verify_sync
        self.policy_version = 0
        self.last_counts: dict[str, float] = {}
        self.last_rejected: list[ScoredGroup] = []
        self._in_flight = InFlight(
            engine,
            scorer,
            sampling,
            group_size=group_size,
            seed=seed,
            with_logprobs=with_logprobs,
            limit=in_flight,
            timeout_s=timeout_s,
        )
        self._share = 0
        self._over_age: list[ScoredGroup] = []
        self._next = 0
        self._cursor: Any = 0

    @property
    def cursor(self) -> Any:
        """Prompts consumed so far over all processes, as `OnPolicySource` counts them.

        What is in flight is not part of it: a restart samples that again, and every prompt is consumed once.
        Uneven dynamic sampling of several processes leaves holes in the order: then it is
        {"next": n, "pending": [...]}, with every number below n consumed but the pending ones.
        """
        return self._cursor

    @cursor.setter
    def cursor(self, value: Any) -> None:
        self._cursor = value
        self._next, pending = (value["next"], value["pending"]) if isinstance(value, dict) else (value, [])
        self._in_flight.end_overlap()
        self._in_flight.clear()
        self._start(pending[self.rank :: self.num_processes])

    def next_groups(self, num_groups: int) -> list[ScoredGroup]:
        """This process's share of the next `num_groups` groups over all processes, in the order of their
        start.

        Raises:
            RuntimeError: the engine failed for all of them, finished nothing within its time limit, or keeps
                weights that were replaced; or the graders did not answer.
        """
        self._in_flight.end_overlap()
        self._share = num_groups // self.num_processes
        self._over_age = []
        kept: list[ScoredGroup] = []
        rejected: list[ScoredGroup] = []
        rounds = 0
        while True:
            lacking = self._share - len(kept)
            needs = self.gather((lacking, self._room(lacking)))
            if not any(lacks for lacks, _ in needs) or rounds == self.max_rounds:
                break
            rounds += 1
            self._deal([room for _, room in needs])
            for scored in self._take(lacking):
                passes = self.keep_fn is None or self.keep_fn(scored)
                (kept if passes else rejected).append(scored)
        missing = self._share - len(kept)
        self.last_rejected = rejected[missing:] + self._over_age
        self.last_counts = self._counts(kept + rejected, rounds=rounds, replaced=len(rejected) - missing)
        pending = self.gather(self._in_flight.ordinals)
        self._cursor = _consumed(self._next, sorted(n for ordinals in pending for n in ordinals))
        self._in_flight.begin_overlap()
        return kept + rejected[:missing]

    def publish(self, weights: WeightStream, *, version: int) -> SyncReport:
        """Gives the engine the policy's weights, under what is in flight, and starts what they admit."""
        self._in_flight.end_overlap()
        with self.phase("sync"):
            report = publish(
                self.engine, weights, version=version, tolerance=self.sync_tolerance, verify=self.verify_sync
            )
        self.policy_version = version
        # Until the first batch is asked for, a run may be replaying what its ledger holds. Without staleness,
        # prompts would run beside an evaluation in one run and not in another, and round otherwise.
        if self._share and self.max_staleness:
            self._deal(self.gather(self._room(self._share)))
            self._in_flight.refill()
        return report

    def close(self) -> None:
        with suppress(EngineError):
            self._in_flight.end_overlap()
        self.scorer.close()
        self.engine.close()

    def _room(self, lacking: int) -> int:
        """How many more prompts may be started while the step to come lacks `lacking` groups."""
        ahead = self.max_staleness
        if self.num_steps is not None:
            ahead = min(ahead, self.num_steps - 1 - self.policy_version)
        return max(0, lacking + ahead * self._share - len(self._in_flight)) if ahead >= 0 else 0

    def _deal(self, wanted: Sequence[int]) -> None:
        """Consumes sum(wanted) numbers over all processes and starts those of this one."""
        self._start(deal(self._next, wanted)[self.rank])
        self._next += sum(wanted)

    def _start(self, ordinals: Sequence[int]) -> None:
        self._in_flight.append(Request(n, self.stream.at(n)) for n in ordinals)

    def _take(self, count: int) -> list[ScoredGroup]:
        """The first `count` groups of the queue, sampled and graded, none of them over-age."""
        heads = self._in_flight.heads(count)
        if not heads:
            return []
        while True:
            with self.phase("sample"):
                self._in_flight.wait_for_engine(heads)
            with self.phase("score"):
                groups = self._in_flight.wait_for_graders(heads)
            pairs = zip(heads, groups, strict=True)
            late = [(request, group) for request, group in pairs if self._age(group) > self.max_staleness]
            if not late:
                break
            for request, group in late:
                self._sample_again(request, group)
        if all(c.finish_reason == "abort" for group in groups for c in group.completions):
            raise EngineError(f"engine {self.engine.name} failed for all completions of {count} prompts")
        self._in_flight.drop(count)
        return groups

    def _sample_again(self, request: Request, group: ScoredGroup) -> None:
        self._over_age.append(group)
        if request.attempt + 1 == MAX_ATTEMPTS:
            raise EngineError(
                f"engine {self.engine.name} answered prompt {request.prompt.id} {MAX_ATTEMPTS} times, "
                f"at last {self._age(group)} versions behind version {self.policy_version}, which it was "
                f"given: more than train.max_staleness={self.max_staleness}"
            )
        self._in_flight.sample_again(request)

    def _age(self, group: ScoredGroup) -> int:
        """Versions between the oldest token of a group and the step to come; 0 for a group without tokens."""
        versions = [span.policy_version for c in group.completions for span in c.version_spans]
        return self.policy_version - min(versions, default=self.policy_version)

    def _counts(self, consumed: Sequence[ScoredGroup], *, rounds: int, replaced: int) -> dict[str, float]:
        sampled = [*consumed, *self._over_age]
        counts = {
            "rounds": float(rounds),
            "replaced": float(replaced),
            "sampled_tokens": float(sum(len(c.token_ids) for g in sampled for c in g.completions)),
        }
        if self.max_staleness:
            counts |= {"over_age": float(len(self._over_age)), "in_flight": float(self.engine.in_flight)}
        return counts


def _consumed(next_ordinal: int, pending: list[int]) -> Any:
    """The shortest cursor: pending numbers at the end of the order count as not dealt yet."""
    while pending and pending[-1] == next_ordinal - 1:
        next_ordinal = pending.pop()
    return {"next": next_ordinal, "pending": pending} if pending else next_ordinal
