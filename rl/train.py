"""READ FIRST: the loop. Sample groups, grade them, compute advantages, update the policy, send the weights.

Everything else in the library is called from here. `recipes/grpo.py` builds a `Run` and calls `train`;
`rl.driver.steps` stops, logs, saves and evaluates between two steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rl.advantages import compute_advantages
from rl.batch import PackRules, pack
from rl.driver import count_bad_steps, every, steps
from rl.optimizer import set_learning_rate
from rl.record import check_faults, group_metrics
from rl.run import Run
from rl.together import divide, exchange, predicted_cost
from rl.types import Advantage, ScoredGroup
from rl.update import UpdateResult, pack_rules, update_policy

Advantages = list[list[Advantage]]


def train(run: Run) -> int:
    """Trains up to `config.train.steps` steps; returns how many are done when it stops.

    Raises:
        RuntimeError: `train.max_bad_steps` consecutive steps were not finite, graders failed too often, or
            weights did not arrive in the engine. The newest checkpoint stays valid.
    """
    config, source, policy, phases = run.config, run.source, run.policy, run.phases
    rules = pack_rules(config, share_prompts=policy.shares_prompts)
    source.publish(policy.weights(), version=run.progress.step)
    for step in steps(run):
        groups, advantages, owners = collect(run, step, rules)
        with phases("pack"):
            parts = rules.num_minibatches
            mine, weighed, minibatch_of = exchange(
                groups, advantages, owners=owners, num_minibatches=parts, team=run.world
            )
            batches = pack(mine, weighed, rules, sum_over_processes=run.world.sum, minibatch_of=minibatch_of)
        source.yield_device()
        with phases("train"):
            set_learning_rate(run.optimizer, config.optimizer, step, config.train.steps)
            update = update_policy(
                policy,
                run.optimizer,
                batches,
                config.loss,
                world=run.world,
                reference=run.reference,
                teacher=run.teacher,
                num_epochs=config.train.num_epochs,
                max_grad_norm=config.optimizer.max_grad_norm,
            )
        run.ledger.settle()
        record = f"{run.ledger.folder}/step-{step:06d}-rank*.jsonl.gz"
        count_bad_steps(run, update.bad_steps, where=f"; the batch is in {record}")
        if run.reference is not None and every(step + 1, config.model.reference.update_every):
            run.reference.follow(policy, config.model.reference.mixup)
        sync = source.publish(policy.weights(), version=step + 1)
        run.progress.values |= metrics(run, step, groups=groups, update=update, sync=sync)
    return run.progress.step


def collect(run: Run, step: int, rules: PackRules) -> tuple[list[ScoredGroup], Advantages, list[int]]:
    """The groups of a step, their advantages, and the process that trains each. Groups come from the ledger
    if a killed run recorded them; else they are sampled and recorded now.
    """
    source, recorded, cursor = run.source, run.recorded(step), run.source.cursor
    if recorded is not None:
        groups, source.last_rejected = recorded.groups, recorded.rejected
        source.cursor, source.last_counts = recorded.cursor_after, recorded.counts
    else:
        groups = list(source.groups(run.config.train.prompts_per_step))
    sampled = [*groups, *source.last_rejected]
    if fault := check_faults(sampled, run.config.rewards.max_fault_share, run.world.sum):
        run.observer.warn(f"step {step + 1}: {fault}", topic="graders")
    advantages = compute_advantages(
        groups, config=run.config.advantage, weights=run.reward_weights, reduce_moments=run.world.sum
    )
    costs = [predicted_cost(group, row, rules) for group, row in zip(groups, advantages, strict=True)]
    owners = divide(costs, rules.num_minibatches, run.world)
    if recorded is None:
        run.ledger.begin(
            step,
            groups,
            cursor_before=cursor,
            cursor_after=source.cursor,
            policy_version=source.policy_version,
            rejected=source.last_rejected,
            advantages=advantages,
            counts=source.last_counts,
            trained_by=owners if run.world.size > 1 else None,
        )
    return groups, advantages, owners


def metrics(
    run: Run, step: int, *, groups: Sequence[ScoredGroup], update: UpdateResult, sync: Mapping[str, float]
) -> dict[str, float]:
    """The metrics of a step, over all processes."""
    values = group_metrics(
        groups,
        rejected=run.source.last_rejected,
        step=step,
        config=run.config.advantage,
        weights=run.reward_weights,
        world=run.world,
        counts=run.source.last_counts,
    )
    values |= {**update.metrics, **sync}
    values["tokens/trained"] = run.world.sum([float(update.num_trained_tokens)])[0]
    values["tokens/per_second"] = values["tokens/completion"] / run.progress.step_seconds
    return values
