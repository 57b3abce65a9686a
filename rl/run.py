"""`Run`: everything that the loop of `rl.train` works with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from rl.config import Config
from rl.driver import Progress
from rl.phases import Phases, StopSignal
from rl.policy import Policy, Reference
from rl.store.checkpoint import CheckpointStore
from rl.store.folder import MUCH_CUT, Evaluation
from rl.store.ledger import Ledger, LedgerStep
from rl.store.metrics import MetricsLog
from rl.store.rows import RecordLog
from rl.teacher import Teacher
from rl.types import Observer, Source
from rl.world import World


@dataclass
class Run:
    """The parts of a run (policy, source, logs ...), and how far it is.

    Attributes:
        measure: measures held-out accuracy after a number of steps; None without held-out prompts.
        num_recorded: steps that an earlier process of this run recorded in the ledger.
    """

    config: Config
    world: World
    policy: Policy
    reference: Reference | None
    optimizer: torch.optim.Optimizer
    source: Source
    measure: Callable[[int], Evaluation] | None
    store: CheckpointStore
    ledger: Ledger
    log: MetricsLog
    evaluations: RecordLog[Evaluation]
    observer: Observer
    phases: Phases
    stop: StopSignal
    progress: Progress = field(default_factory=Progress)
    num_recorded: int = 0
    teacher: Teacher | None = None

    @property
    def reward_weights(self) -> dict[str, float]:
        return {spec.name: spec.weight for spec in self.config.paid_rewards}

    @property
    def logs(self) -> tuple[RecordLog[Evaluation], ...]:
        return (self.evaluations,)

    def evaluate(self, step: int) -> None:
        """Measures held-out accuracy, unless it is known; never consumes training prompts."""
        self.source.settle()
        if self.measure is None or self.evaluations.at(step) is not None:
            return
        with self.phases("eval"):
            found = self.measure(step)
        if self.world.is_main:
            self.evaluations.write(step, found)
            self.observer.heldout(step, found.accuracy, found.low, found.high)
            if found.truncated > MUCH_CUT:
                e, limit = self.config.environment, self.config.evaluation.sampling.max_completion_length
                more = f", environment.max_turns={e.max_turns} or max_turn_length" if e else ""
                cut = f"{found.truncated:.0%} of the held-out completions were cut, so mostly wrong: raise"
                text = f"{cut} evaluation.sampling.max_completion_length={limit}{more}"
                self.observer.warn(text, topic="cut")
        self.world.wait()

    def counters(self) -> dict[str, Any]:
        return {"cursor": self.source.cursor}

    def put_back(self, counters: Mapping[str, Any]) -> None:
        self.source.cursor = counters["cursor"]

    def recorded(self, step: int) -> LedgerStep | None:
        """What this process trained on in a step of a run that was stopped; None: the step must be sampled.

        Records of a run with another number of processes are dealt out again. If one process finds its
        record lost or damaged, all sample the step again, and a warning names the file. With
        train.max_staleness > 0, completions in flight are sampled again too, by newer weights. Every prompt
        is still consumed once and in order, and no step is trained on two different batches.
        """
        found = self.ledger.read(step)
        fits = found is not None and found.cursor_before == self.source.cursor
        sizes = self.world.gather(found.world_size if found is not None and fits else None)
        if None not in sizes and len(set(sizes)) == 1:  # shares of one and the same record
            return found
        if step < self.num_recorded:
            fault = self.ledger.fault(step) if found is None else ""
            if faults := [text for text in self.world.gather(fault) if text]:
                self.observer.warn(f"step {step + 1} is sampled again and may differ: {'; '.join(faults)}")
        return None
