"""One step of training: a packed batch in, new weights and metrics out."""

from __future__ import annotations

import math
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from rl.batch import Batch, PackRules
from rl.config import Config, LossConfig
from rl.losses import LOSSES, LossInputs, LossOutput, aggregation_weight, policy_loss
from rl.policy import Policy, Prepared, Reference, Scores
from rl.teacher import Teacher, lesson
from rl.world import World


@dataclass
class UpdateResult:
    """What an update did. `metrics` are over all processes; `bad_steps` were not finite and skipped."""

    metrics: dict[str, float]
    num_updates: int = 0
    bad_steps: int = 0
    num_trained_tokens: int = 0


def pack_rules(config: Config, *, share_prompts: bool = True) -> PackRules:
    """How the configured loss weighs tokens, and which rows need no forward pass."""
    loss = config.loss
    weight = {"max_completion_length": config.sampling.max_completion_length}
    return PackRules(
        token_budget=config.token_budget,
        row_weight=partial(aggregation_weight, aggregation=LOSSES[loss.name].aggregation, **weight),
        num_minibatches=config.train.num_minibatches,
        skip_without_signal=loss.kl_coef == 0 and loss.entropy_coef == 0 and not config.trains_all_rows,
        mask_truncated=loss.mask_truncated,
        share_prompts=share_prompts,
    )


@dataclass
class Part:
    """A micro-batch of an optimizer step, with log-probs of other models and of the policy before its first
    update. None stands for those that are not needed.
    """

    prepared: Prepared
    reference_L: Tensor | None
    taught: Scores | None
    old_L: Tensor | None = None


def update_policy(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    loss: LossConfig,
    *,
    world: World,
    reference: Reference | None = None,
    teacher: Teacher | None = None,
    num_epochs: int = 1,
    max_grad_norm: float = 1.0,
) -> UpdateResult:
    """Does `num_epochs` passes over the batches of a step, with one optimizer step per batch.

    With a single update the ratio is 1 and needs no old log-probs. Otherwise these are from before the first
    update. The first batch keeps those of its first pass. For other batches, and for each new draw of a
    policy that `redraws`, they are computed beforehand. An update without signal on any process changes
    nothing, not even moments; one whose gradient is not finite is skipped and counted.
    """
    tally, result, norms = Tally(), UpdateResult({}), list[float]()
    draws = range(num_epochs if policy.redraws else 1)
    updates = [
        (batch, _parts(policy, batch, reference=reference, teacher=teacher, draw=draw))
        for draw in draws
        for batch in batches
    ]
    for part in (part for _, parts in updates[1:] for part in parts):
        with torch.no_grad():
            part.old_L = policy.score(part.prepared).logprobs_L
    for batch, parts in updates * (1 if policy.redraws else num_epochs):
        if not world.any(any(not part.prepared.is_idle for part in parts)):
            continue
        for part in parts:
            prepared = part.prepared
            scores = policy.score(prepared, ids_LK=part.taught.ids_LK if part.taught else None)
            output = _loss(loss, part, scores, teacher=teacher, num_tokens=batch.num_loss_tokens)
            policy.backward(output.loss, last=part is parts[-1])
            tally.add(output, scores.metrics)
            result.num_trained_tokens += 0 if prepared.is_idle else len(prepared.batch.columns_L)
            if num_epochs > 1 and part.old_L is None:
                part.old_L = scores.logprobs_L.detach()
        norms.append(policy.finish_gradients(max_grad_norm))
        if math.isfinite(norms[-1]):
            optimizer.step()
            result.num_updates += 1
        else:
            result.bad_steps += 1
        optimizer.zero_grad(set_to_none=True)
    if norms:
        result.metrics["policy/grad_norm"] = max(norms, key=lambda norm: (not math.isfinite(norm), norm))
    result.metrics |= tally.means(world, result.num_updates + result.bad_steps) | policy.step_metrics()
    result.metrics["memory/peak"] = world.max([peak_memory_gib(policy.device)])[0]
    return result


def peak_memory_gib(device: torch.device) -> float:
    """This process's memory peak so far: allocated by torch on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _parts(
    policy: Policy, batch: Batch, *, reference: Reference | None, teacher: Teacher | None, draw: int
) -> list[Part]:
    return [
        Part(
            p,
            reference_L=None if reference is None else reference.logprobs(p),
            taught=None if teacher is None else teacher.score(p),
        )
        for p in policy.prepare(batch, draw=draw)
    ]


def _loss(
    config: LossConfig, part: Part, scores: Scores, *, teacher: Teacher | None, num_tokens: float
) -> LossOutput:
    micro_batch, advantages_N = part.prepared.batch, part.prepared.batch.advantages_L
    mask_N = torch.full_like(micro_batch.columns_L, not part.prepared.is_idle, dtype=torch.bool)
    more, own = 0.0, {}
    if teacher is not None and part.taught is not None:
        old = scores.logprobs_L if part.old_L is None else part.old_L
        given = {"old_L": old, "weights_L": micro_batch.weights_L, "mask_L": mask_N}
        learnt, more, own = lesson(teacher.config, part.taught, scores, **given)
        advantages_N = advantages_N + learnt
    inputs = LossInputs(
        logprobs_N=scores.logprobs_L,
        advantages_N=advantages_N,
        mask_N=mask_N,
        sequence_ids_N=micro_batch.sequence_ids_L,
        num_sequences=micro_batch.num_sequences,
        weights_N=micro_batch.weights_L,
        token_mean_weight=1.0 / max(num_tokens, 1.0),
        old_logprobs_N=part.old_L,
        behavior_logprobs_N=micro_batch.behavior_logprobs_L,
        reference_logprobs_N=part.reference_L,
        entropy_N=scores.entropy_L if config.entropy_coef > 0 else scores.entropy_L.detach(),
    )
    output = policy_loss(inputs, config=config)
    loss = output.loss + more if scores.extra_loss is None else output.loss + more + scores.extra_loss
    return replace(output, loss=loss, metrics=output.metrics | own)


@dataclass
class Tally:
    """Loss metrics of a step as running sums on the device, which are read and exchanged once, at the end."""

    sums: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)
    minima: dict[str, Tensor] = field(default_factory=dict)
    loss: Tensor | None = None

    def add(self, output: LossOutput, of_policy: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Adds a micro-batch: the loss, its metrics, and those that the policy reports."""
        self.loss = output.loss.detach() + (0 if self.loss is None else self.loss)
        for name, (total, count) in (*output.metrics.items(), *of_policy.items()):
            old_total, old_count = self.sums.get(name, (0, 0))
            self.sums[name] = (old_total + total, old_count + count)
        for name, value in output.maxima.items():
            self.maxima[name] = torch.maximum(value, self.maxima.get(name, value))
        for name, value in output.minima.items():
            self.minima[name] = torch.minimum(value, self.minima.get(name, value))

    def means(self, world: World, num_losses: int) -> dict[str, float]:
        """Name -> value over all processes; names that cover no token are left out. `policy/loss` is the mean
        of `num_losses` optimizer steps.
        """
        ratios = {name: (total.item(), count.item()) for name, (total, count) in self.sums.items()}
        loss = 0.0 if self.loss is None else self.loss.item()
        ratios["policy/loss"] = (loss, num_losses * world.is_main)
        maxima = {name: x.item() for name, x in self.maxima.items() if x != -math.inf}
        minima = {name: x.item() for name, x in self.minima.items() if x != math.inf}
        return world.merged(ratios, maxima=maxima, minima=minima)
