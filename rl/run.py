"""The collaborators of a run, as the loop sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from rl.checkpoint import CheckpointStore
from rl.config import Config
from rl.display import Display
from rl.ledger import Ledger
from rl.metrics import MetricsLog
from rl.phases import Phases, StopSignal
from rl.policy import Policy
from rl.rundir import Evaluation, EvaluationLog
from rl.trackers import Trackers
from rl.types import ScoredGroup, WeightStream
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
    """The collaborators of a run, and where it stands: `start_step` steps are done already."""

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
    display: Display
    phases: Phases
    trackers: Trackers
    stop: StopSignal
    start_step: int = 0
    bad_steps_in_row: int = 0
    skipped_steps: int = 0

    @property
    def reward_weights(self) -> dict[str, float]:
        return {spec.name: spec.weight for spec in self.config.rewards.functions}
