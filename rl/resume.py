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

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from rl.checkpoint import CheckpointStore, LoadedCheckpoint
from rl.display import Display
from rl.metrics import MetricsLog
from rl.optimizer_state import load_optimizer_state, optimizer_state_by_name
from rl.run import Run
from rl.trainer_state import TrainerState, capture_rng, restore_rng
from rl.world import World


class Resumable(Protocol):
    """A run that can go on from a checkpoint, whatever it trains."""

    world: World
    store: CheckpointStore
    log: MetricsLog
    display: Display
    policy: Any


R = TypeVar("R", bound=Resumable)


def go_on(run: R, put_back: Callable[[R, TrainerState], None]) -> LoadedCheckpoint | None:
    """Loads the newest valid checkpoint on every process and says what was skipped; None if there is none."""
    newest = run.store.load_newest() if run.world.is_main else None
    folder: list[Any] = [str(newest.path) if newest else None]
    if run.world.size > 1:
        torch.distributed.broadcast_object_list(folder)
    if folder[0] is None:
        if run.world.is_main:
            run.log.truncate_after(0)
        return None
    loaded = newest or run.store.load(Path(folder[0]))
    for sentence in (*loaded.skipped, *loaded.version_changes):
        run.display.warn(sentence)
    run.policy.load_weights(loaded.path)
    put_back(run, loaded.trainer_state)
    return loaded


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
    """Puts a run whose policy was loaded from the checkpoint's folder back to `state`, and cuts the logs back
    to it.
    """
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
    if run.world.is_main:
        run.log.truncate_after(state.step)
        run.evaluations.truncate_after(state.step)
    run.world.wait()


def _moving_reference(run: Run) -> dict[str, Any]:
    """A reference that follows the policy is state; a frozen one is loaded again from where it came."""
    if run.policy.reference is None or not run.config.model.reference.update_every:
        return {}
    return {"reference": run.policy.reference.state_dict()}
