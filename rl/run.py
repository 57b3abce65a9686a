"""The collaborators of a run, as the loop sees them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from rl.config import Config
from rl.phases import Phases, StopSignal
from rl.policy import Policy
from rl.store.checkpoint import CheckpointStore
from rl.store.folder import Evaluation, EvaluationLog
from rl.store.ledger import Ledger
from rl.store.metrics import MetricsLog
from rl.types import Observer, ScoredGroup, WeightStream
from rl.world import World


class GroupSource(Protocol):
    """Where scored groups come from; `rollout.source` has the real ones."""

    cursor: Any
    policy_version: int
    last_counts: dict[str, float]
    last_rejected: list[ScoredGroup]

    def next_groups(self, num_groups: int) -> list[ScoredGroup]: ...
    def publish(self, weights: WeightStream, *, version: int) -> Any: ...


@dataclass
class Run:
    """The collaborators of a run, and where it stands: `start_step` steps are done already.

    Attributes:
        began: `time.monotonic()` when this process was started.
        seconds_before: what earlier processes of this run took, up to the checkpoint that it goes on from.
        saved_step: step of the newest checkpoint; 0 if there is none.
        num_recorded: steps that an earlier process of this run recorded in the ledger.
    """

    config: Config
    world: World
    policy: Policy
    optimizer: torch.optim.Optimizer
    source: GroupSource
    evaluate: Callable[[int], Evaluation] | None
    store: CheckpointStore
    ledger: Ledger
    log: MetricsLog
    evaluations: EvaluationLog
    observer: Observer
    phases: Phases
    stop: StopSignal
    began: float
    start_step: int = 0
    saved_step: int = 0
    num_recorded: int = 0
    seconds_before: float = 0.0
    bad_steps_in_row: int = 0
    skipped_steps: int = 0
    told: set[str] = field(default_factory=set)

    @property
    def reward_weights(self) -> dict[str, float]:
        return {spec.name: spec.weight for spec in self.config.rewards.functions}

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken so far, earlier processes included."""
        return self.seconds_before + time.monotonic() - self.began

    def warn_once(self, topic: str, text: str) -> None:
        """Shows a warning, unless there was one of this topic already."""
        if topic not in self.told:
            self.told.add(topic)
            self.observer.warn(text)
