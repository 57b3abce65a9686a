"""The loop of pre-training and fine-tuning: draw masks, score what they hide, step.

Every random number is a function of the seed and the step. Every process draws the same numbers for the whole
batch of a step, then computes its own examples. So gradients do not depend on the number of processes, and a
killed run resumes bit by bit from its checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rl.config.diffusion import DiffusionConfig
from rl.diffusion.elbo import idle_row, masked_elbo, pack_plan
from rl.diffusion.likelihood import Bound, bound
from rl.diffusion.objectives import Example, make_plan, normalisers, random_lengths, step_generator
from rl.diffusion.policy import DiffusionPolicy
from rl.diffusion.text import Encoded, padded_examples
from rl.driver import Progress, count_bad_steps, steps
from rl.optimizer import set_learning_rate
from rl.phases import Phases, StopSignal
from rl.store.checkpoint import CheckpointStore
from rl.store.metrics import MetricsLog
from rl.store.rows import RecordLog
from rl.types import Observer
from rl.update import peak_memory_gib
from rl.world import World

ORDER, MASKS, HELD_OUT = range(3)  # streams of random numbers


@dataclass
class DiffusionRun:
    """The parts of a run (policy, examples, logs ...), and how far it is.

    Attributes:
        padding: the cycle of ids that pads an answer.
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
    bounds: RecordLog[Bound]
    observer: Observer
    phases: Phases
    stop: StopSignal
    progress: Progress = field(default_factory=Progress)
    reference: None = None

    @property
    def logs(self) -> tuple[RecordLog[Bound], ...]:
        return (self.bounds,)

    def evaluate(self, step: int) -> None:
        """Measures the bound on held-out text after `step` steps, unless it is known."""
        if not self.heldout or self.bounds.at(step) is not None:
            return
        config, policy = self.config, self.policy
        with self.phases("eval"), policy.autocast():
            found = bound(
                policy.scorer,
                self.heldout,
                step_generator(config.train.seed, HELD_OUT),
                mask_token_id=policy.mask_token_id,
                num_draws=config.evaluation.num_draws,
                token_budget=config.token_budget,
                world=self.world,
                in_step=policy.in_step,
            )
        if self.world.is_main:
            self.bounds.write(step, found)
            self.observer.note(f"held-out text after step {step}: {found}")
        self.world.wait()

    def counters(self) -> dict[str, Any]:
        return {}

    def put_back(self, counters: Mapping[str, Any]) -> None:
        return


def train(run: DiffusionRun) -> int:
    """Trains up to `config.train.steps` steps; returns how many are done when it stops.

    Raises:
        RuntimeError: `train.max_bad_steps` consecutive steps were not finite. The newest checkpoint is valid.
    """
    for step in steps(run):
        values = train_step(run, step)
        seconds = run.progress.step_seconds
        values["diffusion/tokens_per_second"] = values["diffusion/packed_tokens"] / seconds
        run.progress.values |= values
    return run.progress.step


def train_step(run: DiffusionRun, step: int) -> dict[str, float]:
    """Does one optimizer step; returns its metrics over all processes."""
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
        rows = pack_plan(mine, config.token_budget)
        if policy.in_step:  # forward passes gather weights from all processes
            most = int(world.max([len(rows)])[0])
            rows += [idle_row(policy.mask_token_id)] * (most - len(rows))
        rows = [row.to(policy.device) for row in rows]
    with run.phases("train"):
        set_learning_rate(run.optimizer, config.optimizer, step, config.train.steps)
        weights_E = torch.tensor(normalisers(examples, objective.normaliser), device=policy.device)
        totals = torch.zeros(2, dtype=torch.float64, device=policy.device)
        for i, row in enumerate(rows):
            with policy.autocast():
                elbos_E, _ = masked_elbo(policy.scorer, [row], len(examples))
            loss = -(elbos_E * weights_E).sum()
            policy.backward(loss, last=i + 1 == len(rows))
            totals += torch.stack([loss.detach(), -elbos_E.detach().sum()])
        norm = policy.finish_gradients(config.optimizer.max_grad_norm)
        if math.isfinite(norm):
            run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        count_bad_steps(run, int(not math.isfinite(norm)), where="")
    num_packed = float(sum(row.documents.num_tokens for row in rows))
    num_scored = float(sum(len(row.columns_L) for row in rows))
    loss, nats, packed, scored = world.sum([*totals.tolist(), num_packed, num_scored])
    return {
        "diffusion/bound": nats / sum(e.num_maskable for e in examples),
        "diffusion/packed_tokens": packed,
        "diffusion/scored_share": scored / max(packed, 1.0),
        "memory/peak": world.max([peak_memory_gib(policy.device)])[0],
        "policy/grad_norm": norm,
        "policy/loss": loss,
        "tokens/trained": scored,
    }


def step_examples(run: DiffusionRun, step: int) -> list[Example]:
    """The examples of a step, over all processes; epochs are consecutive permutations of the dataset."""
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
