"""Where scored groups come from. `OnPolicySource` samples with the current weights, grades, and hands groups
to the trainer.

A source owns the order in which prompts are consumed: a cursor into a seeded, endless shuffle of the dataset,
so that a resumed run goes on exactly where it stopped, with any number of processes.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from rl.types import Group, Prompt, SamplingParams, ScoredGroup, Scorer, WeightStream
from rollout.engine import Engine
from rollout.weight_sync import SyncReport, publish

GatherInts = Callable[[int], list[int]]
Phase = Callable[[str], AbstractContextManager[Any]]


class Source(Protocol):
    """What the training loop needs from rollouts; asynchrony is a property of the source, not of the loop.

    Attributes:
        cursor: prompts consumed so far over all processes, a JSON value; saved in checkpoints. A source whose
            cursor is set goes on from there, and forgets what it had started.
        policy_version: version of the weights that the engine samples from.
        max_staleness: training step minus policy version never exceeds it.
        last_counts: what the latest `next_groups` sampled and threw away, for the metrics.
        last_rejected: the groups it threw away, for the ledger.
    """

    cursor: Any
    policy_version: int
    max_staleness: int
    last_counts: dict[str, float]
    last_rejected: list[ScoredGroup]

    def next_groups(self, num_groups: int) -> list[ScoredGroup]: ...

    def publish(self, weights: WeightStream, *, version: int) -> SyncReport: ...

    def close(self) -> None: ...


class PromptStream:
    """An endless seeded order of the prompts: every epoch holds each prompt once, shuffled anew."""

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool = True) -> None:
        self.prompts, self.seed, self.shuffle = prompts, seed, shuffle
        self._order: tuple[int, Sequence[int]] = (-1, ())

    def at(self, ordinal: int) -> Prompt:
        """The prompt that is consumed as number `ordinal`, counted from 0 over all epochs."""
        epoch, index = divmod(ordinal, len(self.prompts))
        if self._order[0] != epoch:
            order = list(range(len(self.prompts)))
            if self.shuffle:
                random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self.prompts[self._order[1][index]]


def sampling_seed(run_seed: int, ordinal: int, purpose: str = "train") -> int:
    """A 31-bit seed for the completions of one consumed prompt: the same on any number of processes and after
    a restart.
    """
    digest = hashlib.blake2b(f"{purpose}/{run_seed}/{ordinal}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF


class OnPolicySource:
    """Samples every group with the newest weights (staleness 0).

    With `keep_fn` groups that fail it are replaced by fresh ones, up to `max_rounds` sampling rounds a step
    (dynamic sampling, DAPO section 3.2); what is still missing then is filled with rejected groups, so that a
    step has its size.
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
        with_logprobs: bool = True,
        keep_fn: Callable[[ScoredGroup], bool] | None = None,
        max_rounds: int = 1,
        process: tuple[int, int] = (0, 1),
        gather_ints: GatherInts = lambda n: [n],
        phase: Phase = lambda name: nullcontext(),
        sync_tolerance: float | None = None,
        verify_sync: bool = True,
    ) -> None:
        self.engine, self.scorer, self.stream, self.sampling = engine, scorer, stream, sampling
        self.group_size, self.seed, self.with_logprobs = group_size, seed, with_logprobs
        self.keep_fn, self.max_rounds = keep_fn, max_rounds
        self.rank, self.num_processes = process
        self.gather_ints, self.phase = gather_ints, phase
        self.sync_tolerance, self.verify_sync = sync_tolerance, verify_sync
        self.cursor, self.policy_version, self.max_staleness = 0, 0, 0
        self.last_counts: dict[str, float] = {}
        self.last_rejected: list[ScoredGroup] = []

    def next_groups(self, num_groups: int) -> list[ScoredGroup]:
        """This process's share of `num_groups` groups (over all processes), sampled and graded.

        Raises:
            RuntimeError: the engine failed for every prompt of the call, or did not answer within its time
                limit.
        """
        share = num_groups // self.num_processes
        kept: list[ScoredGroup] = []
        rejected: list[ScoredGroup] = []
        rounds = 0
        while True:
            wanted = self.gather_ints(share - len(kept))
            if not any(wanted) or rounds == self.max_rounds:
                break
            rounds += 1
            scored = self._sample(wanted)
            passing = [self.keep_fn is None or self.keep_fn(group) for group in scored]
            kept += [group for group, passes in zip(scored, passing, strict=True) if passes]
            rejected += [group for group, passes in zip(scored, passing, strict=True) if not passes]
        missing = share - len(kept)
        self.last_counts = {
            "rounds": float(rounds),
            "replaced": float(len(rejected) - missing),
            "sampled_tokens": float(sum(len(c.token_ids) for g in kept + rejected for c in g.completions)),
        }
        self.last_rejected = rejected[missing:] if missing else rejected
        return kept + rejected[:missing]

    def _sample(self, wanted: Sequence[int]) -> list[ScoredGroup]:
        """Consumes sum(wanted) prompts over all processes; this one takes every num_processes-th while shares
        are equal.
        """
        ordinals = deal(self.cursor, wanted)[self.rank]
        self.cursor += sum(wanted)
        if not ordinals:
            return []
        with self.phase("sample"):
            groups = self.engine.generate(
                [self.stream.at(n) for n in ordinals],
                num_completions=self.group_size,
                sampling=self.sampling,
                seeds=[sampling_seed(self.seed, n) for n in ordinals],
                with_logprobs=self.with_logprobs,
            )
        with self.phase("score"):
            return self.scorer.score(groups)

    def publish(self, weights: WeightStream, *, version: int) -> SyncReport:
        """Gives the engine the policy's weights and proves that they arrived."""
        with self.phase("sync"):
            report = publish(
                self.engine, weights, version=version, tolerance=self.sync_tolerance, verify=self.verify_sync
            )
        self.policy_version = version
        return report

    def close(self) -> None:
        self.scorer.close()
        self.engine.close()


def deal(first: int, wanted: Sequence[int]) -> list[list[int]]:
    """Ordinals from `first` on, dealt round to the processes until each has what it wants: [2, 1] -> [[0,
    2], [1]].
    """
    hands: list[list[int]] = [[] for _ in wanted]
    while any(len(hand) < n for hand, n in zip(hands, wanted, strict=True)):
        for hand, n in zip(hands, wanted, strict=True):
            if len(hand) < n:
                hand.append(first)
                first += 1
    return hands


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
    groups: list[Group] = engine.generate(
        [prompts[n] for n in ordinals],
        num_completions=num_samples,
        sampling=sampling,
        seeds=[sampling_seed(seed, n, "evaluate") for n in ordinals],
        with_logprobs=False,
    )
    return scorer.score(groups)
