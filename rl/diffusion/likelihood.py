"""How likely given text is under a diffusion model: bounds on log-likelihoods, multiple choice, perplexity.

It is Algorithm 3 of LLaDA (arXiv:2502.09992) in its unbiased form: mask sizes are spread evenly over 1..m
with one random offset. The rounding of the published script is available, to compare with its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rl.diffusion.elbo import idle_row, masked_elbo, pack_plan
from rl.diffusion.model import DiffusionScorer
from rl.diffusion.objectives import (
    Example,
    Noised,
    Scheme,
    make_plan,
    reference_likelihood_plan,
    step_generator,
)
from rl.model.loading import context_length
from rl.store.rows import RecordLog
from rl.world import World

EXAMPLES_AT_ONCE = 16


@torch.no_grad()
def log_likelihoods(
    scorer: DiffusionScorer,
    examples: Sequence[Example],
    *,
    mask_token_id: int,
    num_draws: int = 128,
    seed: int = 0,
    scheme: Scheme = "subset",
    token_budget: int = 8192,
    reference_batch: int | None = None,
) -> Float[Tensor, " E"]:
    """Estimates, in nats, of the ELBO of each example's maskable tokens given the others.

    A single maskable token needs one draw, whose value is exact. All examples of a call share rows.

    Args:
        num_draws: masks per example; the paper uses 128.
        scheme: "subset" is Algorithm 3; "coupled" has less variance at equal forward passes (num_draws / 2).
        reference_batch: draws sizes as the published script does with this batch size, bias included.

    Raises:
        ValueError: an example has no maskable token, contains the mask token, or is longer than the model's
            context.
    """
    check_lengths(examples, context_length(scorer.model.config))
    device = next(scorer.parameters()).device
    training = scorer.training
    scorer.eval()
    # Examples start at 0: copies without a masked token are left out, and their terms are 0.
    found_E = torch.zeros(len(examples), dtype=torch.float64, device=device)
    for first in range(0, len(examples), EXAMPLES_AT_ONCE):
        plan: list[Noised] = []
        chunk = examples[first : first + EXAMPLES_AT_ONCE]
        for index, example in enumerate(chunk):
            generator, one = step_generator(seed, first + index), example.num_maskable == 1
            draws: dict[str, Any] = {"mask_token_id": mask_token_id, "num_draws": 1 if one else num_draws}
            if reference_batch is not None and not one:
                copies = reference_likelihood_plan(example, generator, batch_size=reference_batch, **draws)
            else:
                copies = make_plan([example], generator, scheme="subset" if one else scheme, **draws)
            plan += [replace(copy, example=index) for copy in copies]
        for row in pack_plan(plan, token_budget):
            found_E[first : first + len(chunk)] += masked_elbo(scorer, [row.to(device)], len(chunk))[0]
    scorer.train(training)
    return found_E.cpu()


def check_lengths(examples: Sequence[Example], limit: int | None) -> None:
    """Checks that no example has more tokens than the model has positions: its value would be meaningless.

    Raises:
        ValueError: an example is too long; the message names the first one.
    """
    for index, example in enumerate(examples):
        length = len(example.token_ids_T)
        if limit is not None and length > limit:
            raise ValueError(
                f"example {index} has {length} tokens, but the model has {limit} positions; shorten it to "
                f"{limit} tokens, or leave it out"
            )


def choose(log_likelihoods_C: Sequence[float], lengths_C: Sequence[int] | None = None) -> int:
    """Index of the choice with the greatest log-likelihood, or the greatest per unit of `lengths_C`
    (characters in lm-eval's acc_norm).
    """
    lengths = lengths_C or [1] * len(log_likelihoods_C)
    scores = [value / length for value, length in zip(log_likelihoods_C, lengths, strict=True)]
    return max(range(len(scores)), key=scores.__getitem__)


@dataclass(frozen=True)
class Bound:
    """An upper bound on the negative log-likelihood of text, in nats per token, over `num_tokens` tokens.

    Attributes:
        error: standard error over the examples, which includes the spread of the masks.
    """

    nats_per_token: float
    error: float
    num_tokens: int
    num_examples: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats_per_token, 700.0))

    def __str__(self) -> str:
        return (
            f"at most {self.nats_per_token:.4f} +- {self.error:.4f} nats a token, perplexity at most "
            f"{self.perplexity:.4g} ({self.num_tokens:,} tokens of {self.num_examples:,} examples)"
        )


@torch.no_grad()
def bound(
    scorer: DiffusionScorer,
    examples: Sequence[Example],
    generator: torch.Generator,
    *,
    mask_token_id: int,
    num_draws: int,
    token_budget: int = 8192,
    world: World | None = None,
    in_step: bool = False,
) -> Bound:
    """The bound on a set of texts by coupled, systematic masks; with a world, its processes share the work.

    The same generator state gives the same masks, so that models can be compared on equal terms.

    Args:
        in_step: all processes do equally many forward passes, as a sharded model requires.

    Raises:
        ValueError: there are no examples; or as `log_likelihoods`.
    """
    if not examples:
        raise ValueError("there are no examples, so a bound per token would be a mean over nothing; give one")
    check_lengths(examples, context_length(scorer.model.config))
    device = next(scorer.parameters()).device
    training = scorer.training
    scorer.eval()
    rank, size = (world.rank, world.size) if world else (0, 1)
    plan = make_plan(examples, generator, mask_token_id=mask_token_id, num_draws=num_draws)
    mine = [copy for copy in plan if copy.example % size == rank]
    elbos = torch.zeros(len(examples), dtype=torch.float64)
    rows = pack_plan(mine, token_budget)
    if world and in_step:
        rows += [idle_row(mask_token_id)] * (int(world.max([len(rows)])[0]) - len(rows))
    for row in rows:
        elbos += masked_elbo(scorer, [row.to(device)], len(examples))[0].cpu()
    scorer.train(training)
    if world:
        elbos = torch.tensor(world.sum(elbos.tolist()), dtype=torch.float64)
    counts = torch.tensor([e.num_maskable for e in examples], dtype=torch.float64)
    mean = -(elbos.sum() / counts.sum()).item()
    # For the error of a ratio of sums, an example's residual is its sum minus the mean times its tokens.
    residuals = -elbos - mean * counts
    n = len(examples)
    error = (residuals.square().sum() * n / max(n - 1, 1)).sqrt().item() / counts.sum().item()
    return Bound(mean, error, int(counts.sum()), n)


def bound_log(run_dir: Path) -> RecordLog[Bound]:
    """`likelihood.jsonl` of a run folder: the held-out bound, at most once per step."""
    return RecordLog(run_dir / "likelihood.jsonl", Bound)
