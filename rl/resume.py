"""Going on after a stop: what a checkpoint holds besides weights, and how a run is put back to it.

Exactness rests on three things: every random number is a function of (seed, prompt ordinal), not of a
stream's state; the ledger has the groups of steps after the checkpoint, so they are replayed instead of
sampled again; and logs are cut back to the checkpoint, so that metrics have neither gaps nor doubles.

With train.max_staleness > 0 the steps that the ledger holds are repeated bit for bit, and what was in flight
is sampled again, by newer weights. Every prompt is still consumed once and in order, and no step is trained
on two different batches; only the weights after the first step that had to be sampled anew are not those of
an undisturbed run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rl.run import Run
from rl.store.checkpoint import CheckpointStore, LoadedCheckpoint
from rl.store.ledger import LedgerStep
from rl.store.metrics import MetricsLog
from rl.store.optimizer_state import load_optimizer_state, optimizer_state_by_name
from rl.store.trainer_state import TrainerState, capture_rng, restore_rng
from rl.types import Observer
from rl.world import World


class Resumable(Protocol):
    """A run that can go on from a checkpoint, whatever it trains."""

    world: World
    store: CheckpointStore
    log: MetricsLog
    observer: Observer
    policy: Any


class Log(Protocol):
    """A file with a row per step."""

    def truncate_after(self, step: int, /) -> Any: ...


R = TypeVar("R", bound=Resumable)


def go_on(run: R, put_back: Callable[[R, TrainerState], None], *logs: Log) -> LoadedCheckpoint | None:
    """Loads the newest valid checkpoint on every process and says what was skipped; None if there is none.

    Args:
        logs: what is cut back to the checkpoint besides the run's metrics.
    """
    newest = run.store.load_newest() if run.world.is_main else None
    folder = run.world.gather_objects(str(newest.path) if newest else None)[0]
    loaded = newest or (run.store.load(Path(folder)) if folder else None)
    if loaded is not None:
        for sentence in (*loaded.skipped, *loaded.version_changes):
            run.observer.warn(sentence)
        run.policy.load_weights(loaded.path)
        put_back(run, loaded.trainer_state)
    if run.world.is_main:
        step = loaded.step if loaded else 0
        for log in (run.log, *logs):
            log.truncate_after(step)
        if lost := sorted(set(range(1, step + 1)) - {row["step"] for row in run.log.read()}):
            run.observer.warn(f"metrics.jsonl has no rows of steps {_spans(lost)}: lost, or damaged")
    run.world.wait()
    return loaded


def recorded_step(run: Run, step: int) -> LedgerStep | None:
    """What this process trained on in a step of a run that was stopped; None: the step has to be sampled.

    Where such a record is lost or damaged on any process, all sample the step again, and the file is named.
    """
    found = run.ledger.read(step)
    if run.world.all(found is not None and found.cursor_before == run.source.cursor):
        return found
    if step < run.num_recorded:
        fault = run.ledger.fault(step) if found is None else ""
        if faults := [text for text in run.world.gather_objects(fault) if text]:
            lost = "; ".join(faults)
            run.observer.warn(f"step {step + 1} is sampled again, perhaps otherwise than before: {lost}")
    return None


def _spans(steps: Sequence[int]) -> str:
    """Ascending numbers as text: 1, 4 to 9, 12; at most ten spans."""
    spans: list[list[int]] = []
    for step in steps:
        if spans and step == spans[-1][1] + 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    texts = [str(a) if a == b else f"{a} to {b}" for a, b in spans]
    return ", ".join(texts[:10]) + (f" and {len(texts) - 10} more" if len(texts) > 10 else "")


def training_state(run: Run, step: int) -> TrainerState:
    """Everything but the weights. Called by all processes: each contributes its random state."""
    return TrainerState(
        step=step,
        optimizer=optimizer_state_by_name(run.optimizer, run.policy.trainable()) | _moving_reference(run),
        scheduler={"lr": run.optimizer.param_groups[0]["lr"], "step": step},
        rng={f"rank{rank}": state for rank, state in enumerate(run.world.gather_objects(capture_rng()))},
        counters={
            "cursor": run.source.cursor,
            "bad_steps_in_row": run.bad_steps_in_row,
            "skipped_steps": run.skipped_steps,
            "seconds": run.seconds,
        },
    )


def resume(run: Run, state: TrainerState) -> None:
    """Puts a run whose policy was loaded from the checkpoint's folder back to `state`."""
    load_optimizer_state(run.optimizer, run.policy.trainable(), state.optimizer)
    if (reference := state.optimizer.get("reference")) is not None and run.policy.reference is not None:
        run.policy.reference.load_state_dict(reference)
    mine = state.rng.get(f"rank{run.world.rank}")
    if mine is not None:
        restore_rng(mine)
    run.start_step = run.saved_step = state.step
    run.seconds_before = state.counters.get("seconds", 0.0)
    run.source.cursor = state.counters["cursor"]
    run.bad_steps_in_row = state.counters["bad_steps_in_row"]
    run.skipped_steps = state.counters["skipped_steps"]


def _moving_reference(run: Run) -> dict[str, Any]:
    """A reference that follows the policy is state; a frozen one is loaded again from where it came."""
    if run.policy.reference is None or not run.config.model.reference.update_every:
        return {}
    return {"reference": run.policy.reference.state_dict()}
