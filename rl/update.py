"""One step of learning: a packed batch in, new weights and the step's numbers out."""

from __future__ import annotations

import math
import resource
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rl.batch import Batch, MicroBatch, PackRules
from rl.config import Config, LossConfig, OptimizerConfig
from rl.losses import LOSSES, LossInputs, LossOutput, aggregation_weight, policy_loss
from rl.policy import Policy
from rl.world import World


@dataclass
class UpdateResult:
    """What an update did. `metrics` are means over all processes; `bad_steps` counts optimizer steps skipped
    as not finite.
    """

    metrics: dict[str, float]
    num_updates: int = 0
    bad_steps: int = 0
    num_trained_tokens: int = 0


def pack_rules(config: Config, *, share_prompts: bool = True) -> PackRules:
    """How the configured loss weighs tokens, and which rows it needs no forward pass for."""
    loss, limit = config.loss, config.sampling.max_completion_length

    def row_weight(tokens: float, sequences: float, step_tokens: float, mean_step_tokens: float) -> float:
        return aggregation_weight(
            tokens,
            sequences,
            step_tokens,
            mean_step_tokens,
            aggregation=LOSSES[loss.name].aggregation,
            max_completion_length=limit,
        )

    return PackRules(
        token_budget=config.train.token_budget,
        row_weight=row_weight,
        num_minibatches=config.train.num_minibatches,
        skip_without_signal=loss.kl_coef == 0 and loss.entropy_coef == 0,
        mask_truncated=loss.mask_truncated,
        share_prompts=share_prompts,
    )


def update_policy(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    loss: LossConfig,
    *,
    num_epochs: int = 1,
    max_grad_norm: float = 1.0,
) -> UpdateResult:
    """`num_epochs` passes over the batches of a step, one optimizer step each.

    A step of one update needs no forward pass for old log-probs: the ratio is 1. Otherwise they are those
    before the first update: kept from the first pass over the first batch, and computed beforehand for the
    others, and for the passes on other masks of a policy that `redraws`. An update without any signal on any
    process changes nothing, moments included; one whose gradient is not finite is skipped and counted.
    """
    tally, result, world = Tally(), UpdateResult({}), World(policy.accelerator)
    for batch in batches:
        batch.micro_batches[:] = [m.to(policy.device) for m in batch.micro_batches]
    drawn = list(batches)
    if policy.redraws:
        drawn += [batch.drawn_again(draw) for draw in range(1, num_epochs) for batch in batches]
    for batch in drawn[1:]:
        for micro_batch in batch.micro_batches:
            with torch.no_grad():
                micro_batch.old_logprobs_L = policy.logprobs(micro_batch)[0]
    references = _reference_logprobs(policy, drawn) if loss.kl_coef > 0 else {}
    keep_old = num_epochs > 1
    for batch in drawn if policy.redraws else drawn * num_epochs:
        if not world.any(bool(batch.micro_batches)):
            continue
        for micro_batch in batch.micro_batches:
            logprobs_L, entropy_L = policy.logprobs(micro_batch)
            output = _loss(loss, batch, micro_batch, logprobs_L, entropy_L, references.get(id(micro_batch)))
            output.loss.backward()
            tally.add(output)
            result.num_trained_tokens += len(micro_batch.columns_L)
            if keep_old and micro_batch.old_logprobs_L is None:
                micro_batch.old_logprobs_L = logprobs_L.detach()
        norm = _finish_gradients(policy, max_grad_norm)
        if math.isfinite(norm):
            optimizer.step()
            result.num_updates += 1
        else:
            result.bad_steps += 1
        optimizer.zero_grad(set_to_none=True)
        result.metrics["policy/grad_norm"] = norm
    result.metrics |= tally.means(world, result.num_updates + result.bad_steps)
    result.metrics["memory/peak"] = world.max([peak_memory_gib(policy.device)])[0]
    return result


def peak_memory_gib(device: torch.device) -> float:
    """The most this process has held so far: on its GPU as torch allocated it, on a CPU resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _loss(
    config: LossConfig,
    batch: Batch,
    micro_batch: MicroBatch,
    logprobs_L: Tensor,
    entropy_L: Tensor,
    reference_L: Tensor | None,
) -> LossOutput:
    inputs = LossInputs(
        logprobs_N=logprobs_L,
        advantages_N=micro_batch.advantages_L,
        mask_N=torch.ones_like(micro_batch.columns_L, dtype=torch.bool),
        sequence_ids_N=micro_batch.sequence_ids_L,
        num_sequences=micro_batch.num_sequences,
        weights_N=micro_batch.weights_L,
        token_mean_weight=1.0 / max(batch.num_loss_tokens, 1.0),
        old_logprobs_N=micro_batch.old_logprobs_L,
        behavior_logprobs_N=micro_batch.behavior_logprobs_L,
        reference_logprobs_N=reference_L,
        entropy_N=entropy_L if config.entropy_coef > 0 else entropy_L.detach(),
    )
    return policy_loss(inputs, config=config)


def _reference_logprobs(policy: Policy, batches: Sequence[Batch]) -> dict[int, Tensor]:
    return {id(m): policy.reference_logprobs(m) for batch in batches for m in batch.micro_batches}


def _finish_gradients(policy: Policy, max_grad_norm: float) -> float:
    """Sums the gradients over processes (never averages: weights are global shares), clips, and returns the
    norm before.
    """
    parameters = [p for _, p in policy.trainable()]
    if policy.accelerator.num_processes > 1:
        sum_gradients(parameters)
    return nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()


def sum_gradients(parameters: Sequence[nn.Parameter], bucket_bytes: int = 64 << 20) -> None:
    """grad <- sum of grad over all processes, in flat buckets; a process without a gradient contributes
    zeros.
    """
    buckets: list[list[nn.Parameter]] = [[]]
    size = 0
    for parameter in parameters:
        num_bytes = parameter.numel() * parameter.element_size()
        if buckets[-1] and (size + num_bytes > bucket_bytes or parameter.dtype != buckets[-1][0].dtype):
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += num_bytes
    for bucket in filter(None, buckets):
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in bucket]
        flat = torch.cat([g.reshape(-1) for g in grads])
        torch.distributed.all_reduce(flat)
        for parameter, piece in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = piece.view_as(parameter).clone()


@dataclass
class Tally:
    """Loss metrics of a step as running sums on the device; read once, at the end, after one reduction per
    kind.
    """

    sums: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)
    minima: dict[str, Tensor] = field(default_factory=dict)
    loss: Tensor | None = None

    def add(self, output: LossOutput) -> None:
        self.loss = output.loss.detach() + (0 if self.loss is None else self.loss)
        for name, (total, count) in output.metrics.items():
            old = self.sums.get(name)
            self.sums[name] = (total, count) if old is None else (old[0] + total, old[1] + count)
        for name, value in output.maxima.items():
            self.maxima[name] = torch.maximum(value, self.maxima.get(name, value))
        for name, value in output.minima.items():
            self.minima[name] = torch.minimum(value, self.minima.get(name, value))

    def means(self, world: World, num_losses: int) -> dict[str, float]:
        """Name -> value over all processes; names without a token anywhere are left out. The loss is the mean
        of `num_losses`, one for each optimizer step.
        """
        ours = {
            "sum": {name: [t.item(), c.item()] for name, (t, c) in self.sums.items()},
            "max": {name: [t.item()] for name, t in self.maxima.items()},
            "min": {name: [t.item()] for name, t in self.minima.items()},
            "loss": {"policy/loss": [self.loss.item()]} if self.loss is not None else {},
        }
        merged: dict[str, dict[str, list[list[float]]]] = {kind: {} for kind in ours}
        for theirs in world.gather_objects(ours):
            for kind, numbers in theirs.items():
                for name, values in numbers.items():
                    merged[kind].setdefault(name, []).append(values)
        values = {name: sum(x[0] for x in rows) / num_losses for name, rows in merged["loss"].items()}
        for name, rows in merged["sum"].items():
            if count := sum(row[1] for row in rows):
                values[name] = sum(row[0] for row in rows) / count
        values |= {name: max(x[0] for x in rows) for name, rows in merged["max"].items()}
        values |= {name: min(x[0] for x in rows) for name, rows in merged["min"].items()}
        return {name: value for name, value in values.items() if abs(value) != math.inf}


def weight_decay_groups(policy: Policy, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; norms and biases (one axis) do not."""
    named = policy.trainable()
    return [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]


def learning_rate_factor(step: int, *, schedule: str, warmup_steps: int, total_steps: int) -> float:
    """Share of the peak rate at optimizer step `step`: linear warm-up, then constant, linear or cosine to 0
    at the end.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, step: int, total_steps: int
) -> None:
    """A pure function of the step, so that a resumed run needs no scheduler state."""
    factor = learning_rate_factor(
        step, schedule=config.schedule, warmup_steps=config.warmup_steps, total_steps=total_steps
    )
    for group in optimizer.param_groups:
        group["lr"] = config.lr * factor
