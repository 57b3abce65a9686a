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
from rl.record import check_faults, check_update, group_metrics
from rl.resume import recorded_step, training_state
from rl.run import Run
from rl.store.checkpoint import CheckpointWriteError
from rl.store.trainer_state import NonFiniteError
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
    rules = pack_rules(config, share_prompts=policy.shares_prompts)
    source.publish(policy.weights(), version=run.start_step)
    step = run.start_step
    if step == 0 or step >= config.train.steps or _every(step, config.evaluation.every):
        evaluate(run, step)
    phases.take()  # what came before is no part of a step
    while step < config.train.steps and not run.stop.requested():
        began = time.monotonic()
        groups, advantages = collect(run, step)
        with phases("pack"):
            batches = pack(groups, advantages, rules, sum_over_processes=run.world.sum)
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
    if run.saved_step != step:
        save(run, step, must=True)
    return step


def collect(run: Run, step: int) -> tuple[list[ScoredGroup], Advantages]:
    """The groups of a step: from the ledger if a killed run sampled them already, else fresh ones, which are
    recorded.
    """
    source, recorded, cursor = run.source, recorded_step(run, step), run.source.cursor
    if recorded is not None:
        groups, source.last_rejected = recorded.groups, recorded.rejected
        source.cursor, source.last_counts = recorded.cursor_after, recorded.counts
    else:
        groups = source.next_groups(run.config.train.prompts_per_step)
    sampled = [*groups, *source.last_rejected]
    if fault := check_faults(sampled, run.config.rewards.max_fault_share, run.world.sum):
        run.warn_once("graders", f"step {step + 1}: {fault}")
    advantages = compute_advantages(
        groups, config=run.config.advantage, weights=run.reward_weights, reduce_moments=run.world.sum
    )
    if recorded is None:
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
        run.observer.heldout(step, evaluation.accuracy, evaluation.low, evaluation.high)
    run.world.wait()


def record(
    run: Run, step: int, groups: Sequence[ScoredGroup], update: UpdateResult, report: Any, seconds: float
) -> None:
    """One row of metrics for the step that just ended (rows count from 1: the number of steps done)."""
    values = group_metrics(
        groups,
        rejected=run.source.last_rejected,
        step=step - 1,
        config=run.config.advantage,
        weights=run.reward_weights,
        world=run.world,
        counts=run.source.last_counts,
    )
    values |= update.metrics | report.metrics | run.phases.take()
    values |= {
        "policy/lr": run.optimizer.param_groups[0]["lr"],
        "steps/skipped": float(run.skipped_steps),
        "tokens/trained": run.world.sum([float(update.num_trained_tokens)])[0],
        "tokens/per_second": values["tokens/completion"] / seconds,
        "time/step": seconds,
    }
    if run.world.is_main:
        run.log.write(step, values)
        run.observer.step(step, values)


def save(run: Run, step: int, *, must: bool = False) -> None:
    """Publishes a checkpoint; a full disk is reported and survived, since the earlier ones are untouched.

    Raises:
        RuntimeError: a tensor is not finite; or the disk fails and `must`, because the run is about to end.
    """
    with run.phases("save"):
        state = training_state(run, step)
        fault, is_fatal = "", False
        if run.world.is_main:
            try:
                run.store.save(step, write_model=run.policy.write_model, trainer_state=state)
            except CheckpointWriteError as error:
                fault, is_fatal = f"{error}; started again, the run repeats what follows them", must
            except NonFiniteError as error:
                fault, is_fatal = str(error), True
        fault, is_fatal = run.world.gather_objects((fault, is_fatal))[0]
    if is_fatal:
        raise RuntimeError(fault)
    if fault:
        run.observer.warn(fault)
    else:
        run.saved_step = step


def _every(step: int, period: int) -> bool:
    return period > 0 and step % period == 0
