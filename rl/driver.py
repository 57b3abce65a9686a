"""What every training loop shares: when to stop, log, save and evaluate, and how a run resumes.

A loop is `for step in steps(run): ...`; `rl.train.train` is the loop of reinforcement learning.

A killed run resumes exactly: every random number is a function of the seed and of its purpose, not of a
stream's state. Logs are cut back to the checkpoint, so metrics have neither gaps nor duplicates.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from rl.optimizer import lost_to_rounding
from rl.phases import Phases, StopSignal
from rl.policy import Reference, Trained
from rl.store.checkpoint import CheckpointStore, CheckpointWriteError, LoadedCheckpoint
from rl.store.metrics import MetricsLog
from rl.store.optimizer_state import state_bytes
from rl.store.rows import RecordLog
from rl.store.trainer_state import TrainerState, capture_rng, restore_rng
from rl.types import Observer
from rl.world import World


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: steps done.
        start_step: steps done when this process began.
        saved_step: step of the newest checkpoint; 0 if there is none.
        bad_steps_in_row, skipped_steps: optimizer steps skipped because loss or gradient was not finite.
        began: `time.monotonic()` when this process was started.
        seconds_before: seconds that earlier processes of this run took, up to the checkpoint it resumed from.
        values: the metrics of the step under way; the loop's body fills it.
    """

    step: int = 0
    start_step: int = 0
    saved_step: int = 0
    bad_steps_in_row: int = 0
    skipped_steps: int = 0
    began: float = field(default_factory=time.monotonic)
    seconds_before: float = 0.0
    values: dict[str, float] = field(default_factory=dict)
    step_began: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken so far, earlier processes included."""
        return self.seconds_before + time.monotonic() - self.began

    @property
    def step_seconds(self) -> float:
        """Seconds since the step under way began."""
        return time.monotonic() - self.step_began


class Loop(Protocol):
    """A run, whatever it trains.

    Attributes:
        config: has `train.steps`, `train.max_bad_steps`, `checkpoint.every` and `evaluation.every`.
        reference: the model of a KL term, or None.
        logs: files to cut back to the checkpoint in addition to the metrics.
    """

    config: Any
    world: World
    optimizer: torch.optim.Optimizer
    store: CheckpointStore
    log: MetricsLog
    phases: Phases
    stop: StopSignal
    progress: Progress

    @property
    def policy(self) -> Trained: ...
    @property
    def reference(self) -> Reference | None: ...
    @property
    def observer(self) -> Observer: ...
    @property
    def logs(self) -> Sequence[RecordLog[Any]]: ...

    def evaluate(self, step: int) -> None:
        """Measures the weights after `step` steps on held-out data, unless that is done or there is none."""
        ...

    def counters(self) -> dict[str, Any]:
        """JSON values that a checkpoint keeps in addition to the driver's own."""
        ...

    def put_back(self, counters: Mapping[str, Any]) -> None:
        """Restores what `counters` returned."""
        ...


def steps(run: Loop) -> Iterator[int]:
    """Yields the steps to do, from 0. Between two it logs, evaluates, saves, and checks for a stop signal.

    The body of the loop does the step, and puts its metrics into `run.progress.values`.

    Raises:
        RuntimeError: a tensor to save is not finite; or the disk fails and the run is about to end.
    """
    at, total = run.progress, run.config.train.steps
    if at.step == 0 or at.step >= total or every(at.step, run.config.evaluation.every):
        run.evaluate(at.step)
    if at.step < total and (lost := lost_to_rounding(run.policy.trainable(), run.config.optimizer.lr)):
        run.observer.warn(lost)
    run.phases.take()  # drops what was timed before the first step
    while at.step < total and not run.stop.requested():
        at.values, at.step_began = {}, time.monotonic()
        yield at.step
        at.step += 1
        _log(run)
        is_last = at.step == total
        if is_last or every(at.step, run.config.checkpoint.every) or run.stop.requested():
            save(run)
        if is_last or every(at.step, run.config.evaluation.every):
            run.evaluate(at.step)
    if at.saved_step != at.step:
        save(run, must=True)


def every(step: int, period: int) -> bool:
    """Whether something that is due each `period` steps (0: never) is due after `step` of them."""
    return period > 0 and step % period == 0


def _log(run: Loop) -> None:
    """One row of metrics for the step that just ended (rows count from 1: the number of steps done)."""
    at = run.progress
    rate = run.optimizer.param_groups[0]["lr"]
    values = {**at.values, **run.phases.take(), "policy/lr": rate, "steps/skipped": float(at.skipped_steps)}
    values["time/step"] = at.step_seconds
    if run.world.is_main:
        run.log.write(at.step, values)
        run.observer.step(at.step, values)


def count_bad_steps(run: Loop, bad_steps: int, *, where: str) -> None:
    """Counts optimizer steps that the last update skipped because loss or gradient was not finite.

    Args:
        where: end of the message, which says where to look.

    Raises:
        RuntimeError: this was the case `train.max_bad_steps` times in a row.
    """
    at = run.progress
    at.skipped_steps += bad_steps
    at.bad_steps_in_row = at.bad_steps_in_row + 1 if bad_steps else 0
    if not bad_steps:
        return
    run.observer.warn(f"step {at.step + 1}: loss or gradient not finite, update skipped{where}")
    if at.bad_steps_in_row >= run.config.train.max_bad_steps:
        raise RuntimeError(
            f"{at.bad_steps_in_row} steps in a row had a non-finite loss or gradient{where}. Nothing "
            "non-finite was saved. Lower optimizer.lr or optimizer.max_grad_norm, or use model.dtype=fp32, "
            "and start again from the newest checkpoint in a new run_dir"
        )


def save(run: Loop, *, must: bool = False) -> None:
    """Publishes a checkpoint. A full disk only causes a warning, since earlier checkpoints are untouched.

    Raises:
        RuntimeError: a tensor is not finite; or the disk fails and `must`, because the run is about to end.
    """
    at = run.progress
    with run.phases("save"):
        snapshots = [run.policy.snapshot(run.optimizer), run.reference and run.reference.snapshot()]
        writers = [writer for writer in snapshots if writer is not None]
        num_bytes = state_bytes(run.optimizer, copies=len(writers))

        def write(folder: Path) -> None:
            for writer in writers:
                writer(folder)

        own = {name: getattr(at, name) for name in ("bad_steps_in_row", "skipped_steps", "seconds")}
        rng = {f"rank{rank}": state for rank, state in enumerate(run.world.gather(capture_rng()))}
        state = TrainerState(step=at.step, rng=rng, counters=own | run.counters())
        try:
            run.store.save(at.step, write=write, state=state, team=run.world, num_bytes=num_bytes)
        except CheckpointWriteError as error:
            sentence = f"{error}; if started again, the run repeats the steps after them"
            if must:
                raise RuntimeError(sentence) from error
            run.observer.warn(sentence)
        else:
            at.saved_step = at.step


def go_on(run: Loop) -> LoadedCheckpoint | None:
    """Resumes a run from its newest valid checkpoint and warns of skipped ones; None if there is none."""
    newest = run.store.load_newest() if run.world.is_main else None
    folder = run.world.gather(str(newest.path) if newest else None)[0]
    loaded = newest or (run.store.load(Path(folder)) if folder else None)
    if loaded is not None:
        for sentence in (*loaded.skipped, *loaded.version_changes):
            run.observer.warn(sentence)
        _put_back(run, loaded)
    if run.world.is_main:
        step = loaded.step if loaded else 0
        for log in (run.log, *run.logs):
            log.truncate_after(step)
        if lost := sorted(set(range(1, step + 1)) - {row["step"] for row in run.log.read()}):
            run.observer.warn(f"metrics.jsonl lacks the rows of steps {_spans(lost)}: lost, or damaged")
    run.world.wait()
    return loaded


def _put_back(run: Loop, loaded: LoadedCheckpoint) -> None:
    at, state = run.progress, loaded.trainer_state
    run.policy.load(loaded.path, run.optimizer)
    if run.reference is not None:
        run.reference.load(loaded.path)
    if (mine := state.rng.get(f"rank{run.world.rank}")) is not None:
        for sentence in restore_rng(mine):
            run.observer.warn(sentence)
    at.step = at.start_step = at.saved_step = state.step
    at.seconds_before = state.counters.get("seconds", 0.0)
    at.bad_steps_in_row = state.counters["bad_steps_in_row"]
    at.skipped_steps = state.counters["skipped_steps"]
    run.put_back(state.counters)


def _spans(numbers: Sequence[int]) -> str:
    """Ascending numbers as text: 1, 4 to 9, 12; at most ten spans."""
    runs = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    spans = [[number for _, number in run] for _, run in runs]
    texts = [f"{span[0]} to {span[-1]}" if len(span) > 1 else str(span[0]) for span in spans]
    return ", ".join(texts[:10]) + (f" and {len(texts) - 10} more" if len(texts) > 10 else "")
