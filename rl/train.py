"""READ FIRST: the loop. Sample groups, grade them, turn rewards into advantages, update the policy, send the
weights back.

Everything else in the library is called from here. `recipes/grpo.py` builds a `Run` and calls `train`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rl.advantages import compute_advantages
from rl.batch import pack
from rl.checkpoint import CheckpointWriteError
from rl.record import check_faults, group_metrics
from rl.resume import training_state
from rl.run import Run
from rl.trainer_state import NonFiniteError
from rl.types import ScoredGroup
from rl.update import UpdateResult, pack_rules, set_learning_rate, update_policy

Advantages = list[list[float]]


def train(run: Run) -> int:
    """Does steps `run.start_step` to `config.train.steps`; returns how many are done when it stops.

    Raises:
        RuntimeError: `train.max_bad_steps` non-finite steps in a row, graders that fail too often, or weights
            that did not arrive in the engine. The newest checkpoint stays valid.
    """
    config, source, policy, phases = run.config, run.source, run.policy, run.phases
    source.publish(policy.weights(), version=run.start_step)
    step = run.start_step
    if step == 0 or _every(step, config.evaluation.every):
        evaluate(run, step)
    while step < config.train.steps and not run.stop.requested():
        began = time.monotonic()
        groups, advantages = collect(run, step)
        with phases("pack"):
            batches = pack(groups, advantages, pack_rules(config), sum_over_processes=run.world.sum)
        with phases("train"):
            set_learning_rate(run.optimizer, config.optimizer, step, config.train.steps)
            update = update_policy(
                policy,
                run.optimizer,
                batches,
                config.loss,
                num_epochs=config.train.num_epochs,
                max_grad_norm=config.optimizer.max_grad_norm,
            )
        check_update(run, step, update)
        step += 1
        follow_reference(run, step)
        report = source.publish(policy.weights(), version=step)
        record(run, step, groups, update, report, time.monotonic() - began)
        last = step == config.train.steps
        if last or _every(step, config.checkpoint.every) or run.stop.requested():
            save(run, step)
        if last or _every(step, config.evaluation.every):
            evaluate(run, step)
    return step


def collect(run: Run, step: int) -> tuple[list[ScoredGroup], Advantages]:
    """The groups of a step: from the ledger if a killed run sampled them already, else fresh ones, which are
    recorded.
    """
    source = run.source
    recorded = run.ledger.read(step)
    replays = run.world.all(recorded is not None and recorded.world_size == run.world.size)
    cursor = source.cursor
    if recorded is not None and replays:
        groups = recorded.groups
        source.cursor, source.last_counts = recorded.cursor_after, recorded.counts
    else:
        groups = source.next_groups(run.config.train.prompts_per_step)
    check_faults(groups, run.config.rewards.max_fault_share, run.world.sum)
    advantages = compute_advantages(
        groups, config=run.config.advantage, weights=run.reward_weights, reduce_moments=run.world.sum
    )
    if not replays:
        run.ledger.write(
            step,
            groups,
            cursor_before=cursor,
            cursor_after=source.cursor,
            policy_version=source.policy_version,
            rejected=source.last_rejected,
            advantages=advantages,
            counts=source.last_counts,
        )
    return groups, advantages


def check_update(run: Run, step: int, update: UpdateResult) -> None:
    """Counts skipped optimizer steps; stops the run after too many in a row. The step's ledger holds the
    batch.
    """
    run.skipped_steps += update.bad_steps
    run.bad_steps_in_row = run.bad_steps_in_row + 1 if update.bad_steps else 0
    if update.bad_steps:
        where = f"the batch is in {run.ledger.folder}/step-{step:06d}-rank*.jsonl.gz"
        run.display.warn(f"step {step}: loss or gradient not finite, update skipped; {where}")
        if run.bad_steps_in_row >= run.config.train.max_bad_steps:
            raise RuntimeError(
                f"{run.bad_steps_in_row} steps in a row had a non-finite loss or gradient; {where}. Nothing "
                "non-finite was saved. Lower optimizer.lr or optimizer.max_grad_norm, or use "
                "model.dtype=fp32, and start again from the newest checkpoint in a new run_dir"
            )


def follow_reference(run: Run, step: int) -> None:
    reference = run.config.model.reference
    if run.policy.reference is not None and _every(step, reference.update_every):
        run.policy.move_reference(reference.mixup)


def evaluate(run: Run, step: int) -> None:
    """Held-out accuracy of the weights after `step` steps, unless it is known; never moves the training
    stream.
    """
    if run.evaluate is None or run.evaluations.at(step) is not None:
        return
    with run.phases("eval"):
        evaluation = run.evaluate(step)
    if run.world.is_main:
        run.evaluations.write(evaluation)
        run.display.heldout(step, evaluation.accuracy, evaluation.low, evaluation.high)
    run.world.wait()


def record(
    run: Run, step: int, groups: Sequence[ScoredGroup], update: UpdateResult, report: Any, seconds: float
) -> None:
    """One row of metrics for the step that just ended (rows count from 1: the number of steps done)."""
    values = group_metrics(
        groups,
        step=step - 1,
        config=run.config.advantage,
        weights=run.reward_weights,
        world=run.world,
        counts=run.source.last_counts,
    )
    values |= update.metrics | run.phases.take()
    values |= {
        "policy/lr": run.optimizer.param_groups[0]["lr"],
        "steps/skipped": float(run.skipped_steps),
        "sync/seconds": report.seconds,
        "sync/canary_gap_max": report.canary_max_gap,
        "tokens/trained": run.world.sum([float(update.num_trained_tokens)])[0],
        "tokens/per_second": values["tokens/completion"] / seconds,
        "time/step": seconds,
    }
    if run.world.is_main:
        run.log.write(step, values)
        run.trackers.log(step, values)
        run.display.step(step, values)


def save(run: Run, step: int) -> None:
    """Publishes a checkpoint; a full disk is reported and survived, since the earlier ones are untouched."""
    with run.phases("save"):
        state = training_state(run, step)
        fault = ""
        if run.world.is_main:
            try:
                run.store.save(step, write_model=run.policy.write_model, trainer_state=state)
            except CheckpointWriteError as error:
                run.display.warn(str(error))
            except NonFiniteError as error:
                fault = str(error)
        if fault := run.world.gather_objects(fault)[0]:
            raise RuntimeError(fault)


def _every(step: int, period: int) -> bool:
    return period > 0 and step % period == 0
