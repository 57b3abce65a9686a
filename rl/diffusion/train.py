"""The loop of pre-training and fine-tuning: draw masks, score what they hide, step.

Every random number is a function of the seed and the step, drawn for the step's whole batch on every process
alike; each process then computes its own examples. So a gradient does not depend on how many there are, and a
run that was killed goes on bit by bit from its checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from rl.config.diffusion import DiffusionConfig
from rl.diffusion.elbo import idle_row, masked_elbo, pack_plan
from rl.diffusion.likelihood import Bound, BoundLog, bound
from rl.diffusion.objectives import Example, make_plan, normalisers, random_lengths, step_generator
from rl.diffusion.policy import DiffusionPolicy
from rl.diffusion.text import Encoded, padded_examples
from rl.phases import Phases, StopSignal
from rl.store.checkpoint import CheckpointStore, CheckpointWriteError
from rl.store.metrics import MetricsLog
from rl.store.optimizer_state import load_optimizer_state, optimizer_state_by_name
from rl.store.trainer_state import NonFiniteError, TrainerState, capture_rng, restore_rng
from rl.types import Observer
from rl.update import set_learning_rate, sum_gradients
from rl.world import World

ORDER, MASKS, HELD_OUT = range(3)  # streams of random numbers


@dataclass
class DiffusionRun:
    """The collaborators of a run, and where it stands: `start_step` steps are done already.

    Attributes:
        padding: the cycle of ids that follows an answer's end.
    """

    config: DiffusionConfig
    world: World
    policy: DiffusionPolicy
    optimizer: torch.optim.Optimizer
    examples: Sequence[Encoded]
    padding: Sequence[int]
    heldout: Sequence[Example]
    store: CheckpointStore
    log: MetricsLog
    bounds: BoundLog
    observer: Observer
    phases: Phases
    stop: StopSignal
    start_step: int = 0
    bad_steps_in_row: int = 0
    skipped_steps: int = 0


def train(run: DiffusionRun) -> int:
    """Does steps `run.start_step` to `config.train.steps`; returns how many are done when it stops.

    Raises:
        RuntimeError: `train.max_bad_steps` non-finite steps in a row. The newest checkpoint stays valid.
    """
    config, step = run.config, run.start_step
    if step == 0 or step >= config.train.steps:
        evaluate(run, step)
    run.phases.take()  # what came before is no part of a step
    while step < config.train.steps and not run.stop.requested():
        began = time.monotonic()
        values = train_step(run, step)
        step += 1
        values |= run.phases.take() | {"time/step": time.monotonic() - began}
        values["diffusion/tokens_per_second"] = values["diffusion/packed_tokens"] / values["time/step"]
        if run.world.is_main:
            run.log.write(step, values)
            run.observer.step(step, values)
        last = step == config.train.steps
        if last or _every(step, config.checkpoint.every) or run.stop.requested():
            save(run, step)
        if last or _every(step, config.evaluation.every):
            evaluate(run, step)
    return step


def train_step(run: DiffusionRun, step: int) -> dict[str, float]:
    """One optimizer step; its numbers over all processes."""
    config, world, policy = run.config, run.world, run.policy
    objective = config.objective
    with run.phases("pack"):
        generator = step_generator(config.train.seed, MASKS, step)
        examples = step_examples(run, step)
        if objective.random_length_share:
            share = objective.random_length_share
            reference = objective.scheme == "bernoulli" and not objective.systematic
            examples = random_lengths(examples, generator, share=share, whole_batch=reference)
        plan = make_plan(
            examples,
            generator,
            mask_token_id=policy.mask_token_id,
            scheme=objective.scheme,
            systematic=objective.systematic,
            num_draws=objective.num_draws,
        )
        mine = [copy for copy in plan if copy.example % world.size == world.rank]
        rows = pack_plan(mine, config.train.token_budget)
        if policy.sharded:  # its forward passes gather weights from all processes
            most = int(world.max([len(rows)])[0])
            rows += [idle_row(policy.mask_token_id)] * (most - len(rows))
        rows = [row.to(policy.device) for row in rows]
    with run.phases("train"):
        set_learning_rate(run.optimizer, config.optimizer, step, config.train.steps)
        weights_E = torch.tensor(normalisers(examples, objective.normaliser), device=policy.device)
        totals = torch.zeros(2, dtype=torch.float64, device=policy.device)
        for row in rows:
            with policy.autocast():
                elbos_E, _ = masked_elbo(policy.scorer, [row], len(examples))
            loss = -(elbos_E * weights_E).sum()
            # FSDP averages gradients over processes, and weights are global shares: they add up.
            (loss * world.size if policy.sharded else loss).backward()
            totals += torch.stack([loss.detach(), -elbos_E.detach().sum()])
        norm = _finish(run, step)
    loss, nats, packed, scored = world.sum(
        [
            *totals.tolist(),
            float(sum(row.documents.num_tokens for row in rows)),
            float(sum(len(row.columns_L) for row in rows)),
        ]
    )
    return {
        "diffusion/bound": nats / sum(e.num_maskable for e in examples),
        "diffusion/packed_tokens": packed,
        "diffusion/scored_share": scored / max(packed, 1.0),
        "policy/grad_norm": norm,
        "policy/loss": loss,
        "policy/lr": run.optimizer.param_groups[0]["lr"],
        "steps/skipped": float(run.skipped_steps),
        "tokens/trained": scored,
    }


def step_examples(run: DiffusionRun, step: int) -> list[Example]:
    """The examples of a step, all processes': epochs are permutations of the dataset, one after another."""
    config, n = run.config, len(run.examples)
    size = config.train.examples_per_step
    orders: dict[int, list[int]] = {}
    chosen = []
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, n)
        if epoch not in orders:
            generator = step_generator(config.train.seed, ORDER, epoch)
            orders[epoch] = torch.randperm(n, generator=generator).tolist()
        chosen.append(run.examples[orders[epoch][place]])
    return padded_examples(chosen, config.eos, run.padding)


def evaluate(run: DiffusionRun, step: int) -> None:
    """The bound on held-out text after `step` steps, unless it is known."""
    if not run.heldout or run.bounds.at(step) is not None:
        return
    config, policy = run.config, run.policy
    with run.phases("eval"), policy.autocast():
        found = bound(
            policy.scorer,
            run.heldout,
            step_generator(config.train.seed, HELD_OUT),
            mask_token_id=policy.mask_token_id,
            num_draws=config.evaluation.num_draws,
            token_budget=config.train.token_budget,
            world=run.world,
            in_step=policy.sharded,
        )
    if run.world.is_main:
        run.bounds.write(step, found)
        run.observer.note(f"held-out text after step {step}: {found}")
    run.world.wait()


def _finish(run: DiffusionRun, step: int) -> float:
    """Sums gradients over processes, clips, steps if all is finite; the norm before clipping."""
    parameters = [p for _, p in run.policy.trainable()]
    if run.world.size > 1 and not run.policy.sharded:
        sum_gradients(parameters)
    total: Any = nn.utils.clip_grad_norm_(parameters, run.config.optimizer.max_grad_norm)
    norm = (total.full_tensor() if run.policy.sharded else total).item()
    if math.isfinite(norm):
        run.optimizer.step()
        run.bad_steps_in_row = 0
    else:
        run.skipped_steps += 1
        run.bad_steps_in_row += 1
        run.observer.warn(f"step {step}: loss or gradient not finite, update skipped")
    run.optimizer.zero_grad(set_to_none=True)
    if run.bad_steps_in_row >= run.config.train.max_bad_steps:
        raise RuntimeError(
            f"{run.bad_steps_in_row} steps in a row had a non-finite loss or gradient; nothing non-finite "
            "was saved. Lower optimizer.lr or optimizer.max_grad_norm, or use model.dtype=fp32, and start "
            "again from the newest checkpoint in a new run_dir"
        )
    return norm


def save(run: DiffusionRun, step: int) -> None:
    """Publishes a checkpoint; a full disk is reported and survived, since the earlier ones are untouched."""
    with run.phases("save"):
        world, fault = run.world, ""
        state = TrainerState(
            step=step,
            optimizer=optimizer_state_by_name(run.optimizer, run.policy.trainable()),
            scheduler={"lr": run.optimizer.param_groups[0]["lr"], "step": step},
            rng={f"rank{rank}": state for rank, state in enumerate(world.gather_objects(capture_rng()))},
            counters={"bad_steps_in_row": run.bad_steps_in_row, "skipped_steps": run.skipped_steps},
        )
        weights = run.policy.whole_weights()
        if world.is_main:
            try:
                write_model = partial(run.policy.write_model, weights=weights)
                run.store.save(step, write_model=write_model, trainer_state=state)
            except CheckpointWriteError as error:
                run.observer.warn(str(error))
            except NonFiniteError as error:
                fault = str(error)
        if fault := world.gather_objects(fault)[0]:
            raise RuntimeError(fault)


def resume(run: DiffusionRun, state: TrainerState) -> None:
    """Puts a run whose policy was loaded from the checkpoint's folder back to `state`."""
    load_optimizer_state(run.optimizer, run.policy.trainable(), state.optimizer)
    mine: Any = state.rng.get(f"rank{run.world.rank}")
    if mine is not None:
        restore_rng(mine)
    run.start_step = state.step
    run.bad_steps_in_row = state.counters["bad_steps_in_row"]
    run.skipped_steps = state.counters["skipped_steps"]


def _every(step: int, period: int) -> bool:
    return period > 0 and step % period == 0


__all__ = ["Bound", "DiffusionRun", "evaluate", "resume", "save", "train", "train_step"]
