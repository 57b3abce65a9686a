"""Which tokens to mask, and the weight of each masked token's log-prob: plans, as data.

Let m tokens of an example be maskable (an answer; everything in pre-training) and S the masked ones. All
schemes estimate the same bound on the log-likelihood, the ELBO (LLaDA, arXiv:2502.09992, equations 3 to 6):

    ELBO = E_{t ~ U(0,1)} [ 1/t  sum_{i in S} log p(x_i | x without S) ],  each token in S with probability t
         = E_{l ~ U{1..m}} [ m/l  sum_{i in S} log p(x_i | x without S) ],  S one of all subsets of l tokens
         = E_{k ~ U{0..m}} [ (m+1)/k  sum_{i in S} log p(x_i | x without S) ],  S of k tokens

The last is the first with 1/t averaged out: given that t masked k tokens, 1/t is (m+1)/k on average.

A plan lists noised copies of examples with a weight for each scored token. The weighted sum of log-probs over
all copies of an example estimates its ELBO. A plan is drawn before any forward pass, from an explicit
generator, so that a second model (old policy, reference) sees the same masks.

Some prints of the formula have 1/(t+L) by mistake: per-sequence training losses divide by t times L, as the
reference code (GUIDELINES.md) does. Dividing by the number of masked tokens is another objective: on a toy
model it gives -7.9 where the bound is -8.9. `normalisers` divides by L.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Scheme = Literal["coupled", "count", "subset", "bernoulli"]
MIN_RATE = 1e-3  # of "bernoulli", as in the reference: masked with p = (1 - 1e-3) t + 1e-3


@dataclass(frozen=True)
class Example:
    """Clean token ids, and which of them may be masked (never the prompt)."""

    token_ids_T: Int[Tensor, " T"]
    maskable_T: Bool[Tensor, " T"]

    @property
    def num_maskable(self) -> int:
        return int(self.maskable_T.sum())

    def cut(self, length: int) -> Example:
        """The first `length` tokens, but at least up to the first one that may be masked."""
        length = max(length, 1 + int(self.maskable_T.int().argmax()))
        return Example(self.token_ids_T[:length], self.maskable_T[:length])


@dataclass(frozen=True)
class Noised:
    """A copy of an example with masks, in which K columns are scored.

    Attributes:
        example: its index in the batch that was planned.
        weights_K: weights of log p(target) in the estimate of the example's ELBO.
    """

    example: int
    token_ids_T: Int[Tensor, " T"]
    columns_K: Int[Tensor, " K"]
    targets_K: Int[Tensor, " K"]
    weights_K: Float[Tensor, " K"]


def make_plan(
    examples: Sequence[Example],
    generator: torch.Generator,
    *,
    mask_token_id: int,
    scheme: Scheme = "coupled",
    systematic: bool = True,
    num_draws: int = 1,
) -> list[Noised]:
    """Noised copies of every example, without copies that mask no token.

    Args:
        generator: on the CPU. Draws depend on the whole batch: plan it as one, equally on every process, and
            then split the plan.
        scheme: "bernoulli": Algorithms 1 and 2 of the paper. "subset": Algorithm 3. "count": "bernoulli" with
            1/t averaged out. "coupled": "count" with every mask and its complement (arXiv:2512.03759), two
            copies per draw; each maskable token is scored once.
        systematic: noise levels of the batch are spread evenly with one random offset instead of drawn
            independently; the distribution of each level stays the same.
        num_draws: draws per example; their mean is the estimate.

    Raises:
        ValueError: an example has no maskable token, or contains the mask token.
    """
    for index, example in enumerate(examples):
        _check(index, example, mask_token_id)
    if scheme == "bernoulli":
        draws = _bernoulli_masks(examples, generator, systematic, num_draws)
    else:
        levels = _levels(len(examples), num_draws, generator, systematic)
        draws = [
            (index, mask, weight)
            for draw in range(num_draws)
            for index, example in enumerate(examples)
            for mask, weight in _masks(
                example.num_maskable, COUNTS[scheme](levels[draw][index], example.num_maskable), generator
            )
        ]
    return [
        _noised(examples[index], index, mask_m=mask, weight=weight / num_draws, mask_token_id=mask_token_id)
        for index, mask, weight in draws
        if mask.any()
    ]


def normalisers(examples: Sequence[Example], per: Literal["sequence", "token"]) -> list[float]:
    """Factor of each example's ELBO in the loss of an optimizer step; pass all examples of the step.

    "sequence": 1 / (B m), the mean over examples of the bound per token, as LLaDA trains. "token": 1 over all
    maskable tokens of the step, so that long answers count more.
    """
    counts = [example.num_maskable for example in examples]
    if per == "sequence":
        return [1.0 / (len(counts) * m) for m in counts]
    return [1.0 / sum(counts)] * len(counts)


def random_lengths(
    examples: Sequence[Example], generator: torch.Generator, *, share: float = 0.01, whole_batch: bool = False
) -> list[Example]:
    """Cuts a share of the examples to a length from U{1..T}, so that a model also learns short texts
    (pre-training by Algorithm 1).

    Args:
        whole_batch: one draw for all, with random numbers in the order of the reference code.
    """
    if whole_batch:
        if torch.rand(1, generator=generator).item() >= share:
            return list(examples)
        longest = max(len(e.token_ids_T) for e in examples)
        length = int(torch.randint(1, longest + 1, (1,), generator=generator))
        return [e.cut(length) for e in examples]
    chosen = torch.rand(len(examples), generator=generator) < share
    parts = torch.rand(len(examples), generator=generator, dtype=torch.float64)
    return [
        e.cut(1 + int(part * len(e.token_ids_T))) if cut else e
        for e, cut, part in zip(examples, chosen.tolist(), parts.tolist(), strict=True)
    ]


def step_generator(*numbers: int) -> torch.Generator:
    """A generator that depends only on the numbers, such as (seed, step): it is the same on every process and
    after every restart.
    """
    state = np.random.SeedSequence(list(numbers)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def _count(level: float, m: int) -> list[tuple[int, float]]:
    """k uniform on 0..m, weight (m + 1) / k."""
    k = min(int(level * (m + 1)), m)
    return [(k, (m + 1) / max(k, 1))]


def _subset(level: float, m: int) -> list[tuple[int, float]]:
    """l uniform on 1..m, weight m / l (Algorithm 3).

    The reference script rounds to the nearest even number where this rounds down, and so draws some l more
    often than others; `reference_likelihood_plan` repeats it.
    """
    size = 1 + min(int(level * m), m - 1)
    return [(size, m / size)]


def _coupled(level: float, m: int) -> list[tuple[int, float]]:
    """k and m - k, complementary, each with half its weight (m + 1) / k.

    Levels cover half the range, since k and m - k give the same pair. So evenly spread levels are twice as
    dense.
    """
    k = min(int(level / 2 * (m + 1)), m)
    return [(size, (m + 1) / max(size, 1) / 2) for size in (k, m - k)]


COUNTS: dict[str, Callable[[float, int], list[tuple[int, float]]]] = {
    "count": _count,
    "subset": _subset,
    "coupled": _coupled,
}
"""Scheme -> (noise level in [0, 1), m) -> sizes of disjoint masks with their weights."""


def _levels(
    num_examples: int, num_draws: int, generator: torch.Generator, systematic: bool
) -> list[list[float]]:
    """Noise levels in [0, 1) by draw and example, evenly spread within a draw and within an example."""
    shape = (num_draws, num_examples)
    if not systematic:
        return torch.rand(shape, generator=generator, dtype=torch.float64).tolist()
    offset = torch.rand(1, generator=generator, dtype=torch.float64)
    grid = torch.arange(num_draws * num_examples, dtype=torch.float64) / (num_draws * num_examples)
    return ((offset + grid.view(shape)) % 1.0).tolist()


def _masks(
    m: int, sizes: Sequence[tuple[int, float]], generator: torch.Generator
) -> list[tuple[Bool[Tensor, " m"], float]]:
    """For each (size, weight) a random subset of m maskable tokens, with its weight; subsets are disjoint."""
    order = torch.randperm(m, generator=generator)
    masks = []
    for size, weight in sizes:
        masks.append((torch.zeros(m, dtype=torch.bool).index_fill(0, order[:size], True), weight))
        order = order[size:]
    return masks


def _bernoulli_masks(
    examples: Sequence[Example], generator: torch.Generator, systematic: bool, num_draws: int
) -> list[tuple[int, Bool[Tensor, " m"], float]]:
    """Masks and 1/p as the reference code draws them: t for each row, then a rectangle B x longest. Numbers
    for prompts and padding are not used. Independent draws repeat the reference bit by bit.

    Without the floor on p the estimator would have no finite variance; with it, the bound has a relative
    error of 6e-4.
    """
    found = []
    longest = max(len(e.token_ids_T) for e in examples)
    for _ in range(num_draws):
        if systematic:
            grid = torch.arange(len(examples)) / len(examples)
            t = (torch.rand(1, generator=generator) + grid) % 1
        else:
            t = torch.rand(len(examples), generator=generator)
        p = (1 - MIN_RATE) * t + MIN_RATE
        hit = torch.rand((len(examples), longest), generator=generator) < p[:, None]
        for index, example in enumerate(examples):
            mask = hit[index, : len(example.token_ids_T)][example.maskable_T]
            found.append((index, mask, 1.0 / p[index].item()))
    return found


def reference_likelihood_plan(
    example: Example, generator: torch.Generator, *, mask_token_id: int, num_draws: int, batch_size: int
) -> list[Noised]:
    """Algorithm 3 with the rounding of the published get_log_likelihood.py, for comparison with its numbers.

    Sizes come from `round(linspace(...))`, which rounds halves to even. If L / batch_size has a fraction of
    one half, even sizes are drawn more often (L = 4, batch 8: 1/8, 3/8, 1/8, 3/8), which is a bias.

    Raises:
        ValueError: `num_draws` is not a positive multiple of `batch_size`.
    """
    _check(0, example, mask_token_id)
    if num_draws < 1 or num_draws % batch_size:
        raise ValueError(
            f"{num_draws} draws do not split into batches of {batch_size}; the reference needs a multiple, "
            f"such as {batch_size * max(1, num_draws // batch_size)}"
        )
    m, plan = example.num_maskable, []
    for _ in range(num_draws // batch_size):
        k = torch.randint(1, m + 1, (), generator=generator)
        steps = torch.linspace(float(k), float(k + (batch_size - 1) * (m / batch_size)), steps=batch_size)
        sizes = (torch.round(steps).long() - 1) % m + 1
        for size in sizes.tolist():
            mask = (torch.arange(m) < size)[torch.randperm(m, generator=generator)]
            plan.append(
                _noised(example, 0, mask_m=mask, weight=m / size / num_draws, mask_token_id=mask_token_id)
            )
    return plan


def _noised(
    example: Example, index: int, *, mask_m: Bool[Tensor, " m"], weight: float, mask_token_id: int
) -> Noised:
    columns = example.maskable_T.nonzero().squeeze(-1)[mask_m]
    return Noised(
        example=index,
        token_ids_T=example.token_ids_T.index_fill(0, columns, mask_token_id),
        columns_K=columns,
        targets_K=example.token_ids_T[columns],
        weights_K=torch.full((len(columns),), weight),
    )


def _check(index: int, example: Example, mask_token_id: int) -> None:
    if not example.num_maskable:
        raise ValueError(
            f"example {index} of {len(example.token_ids_T)} tokens has none that may be masked, so its loss "
            "would be a mean over nothing; leave it out, or give it an answer"
        )
    if bool((example.token_ids_T == mask_token_id).any()):
        raise ValueError(
            f"example {index} contains the mask token (id {mask_token_id}), which the model could not tell "
            "from a mask; choose a token that your text never uses (model.mask_token)"
        )
