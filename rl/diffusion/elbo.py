"""The estimator of the bound on a log-likelihood (ELBO), and the packed rows that it is computed on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rl.diffusion.objectives import Noised
from rl.model.bidirectional import Documents
from rl.model.packed import first_fit

Scorer = Callable[..., tuple[Tensor, Tensor]]
"""`DiffusionScorer`, or anything with its call: (token ids, documents, columns, targets) -> (log-probs,
entropies).
"""


@dataclass(frozen=True)
class PlanRow:
    """Noised copies side by side in one row; each is its own document.

    Attributes:
        columns_L: scored columns of the row; `targets_L`, `weights_L` and `examples_L` belong to them.
    """

    token_ids_N: Int[Tensor, " N"]
    documents: Documents
    columns_L: Int[Tensor, " L"]
    targets_L: Int[Tensor, " L"]
    weights_L: Float[Tensor, " L"]
    examples_L: Int[Tensor, " L"]

    def to(self, device: torch.device) -> PlanRow:
        tensors = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors, documents=Documents.of(self.documents.lengths, device))


def pack_plan(plan: Sequence[Noised], token_budget: int) -> list[PlanRow]:
    """Rows of at most `token_budget` tokens, filled first-fit with the longest copies first. A copy beyond
    the budget has its own row.
    """
    bins = first_fit([len(copy.token_ids_T) for copy in plan], token_budget)
    return [_row([plan[i] for i in members]) for members in bins]


def idle_row(mask_token_id: int) -> PlanRow:
    """A row that changes nothing, for a process that must do as many forward passes as the others."""
    zero = torch.zeros(1, dtype=torch.long)
    return PlanRow(zero + mask_token_id, Documents.of([1]), zero, zero, torch.zeros(1), zero)


def masked_elbo(
    scorer: Scorer, rows: Sequence[PlanRow], num_examples: int
) -> tuple[Float[Tensor, " E"], Float[Tensor, " L"]]:
    """Estimates of the E examples' ELBOs in nats (fp64): sum of weight * log p over scored tokens. Also those
    log p, detached, in the order of the rows.

    Estimates are differentiable. Those of single rows add up to the estimate over all rows of a plan.
    """
    estimates, scored = [], []
    for row in rows:
        logprobs_L, _ = scorer(row.token_ids_N, row.documents, row.columns_L, row.targets_L)
        scored.append(logprobs_L.detach())
        weighted_L = row.weights_L * logprobs_L.double()  # thousands of terms add up
        estimates.append(weighted_L.new_zeros(num_examples).index_add(0, row.examples_L, weighted_L))
    return torch.stack(estimates).sum(0), torch.cat(scored)


def _row(copies: Sequence[Noised]) -> PlanRow:
    lengths = [len(copy.token_ids_T) for copy in copies]
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    return PlanRow(
        token_ids_N=torch.cat([copy.token_ids_T for copy in copies]),
        documents=Documents.of(lengths),
        columns_L=torch.cat([copy.columns_K + start for copy, start in zip(copies, starts, strict=True)]),
        targets_L=torch.cat([copy.targets_K for copy in copies]),
        weights_L=torch.cat([copy.weights_K for copy in copies]),
        examples_L=torch.cat([torch.full_like(copy.columns_K, copy.example) for copy in copies]),
    )
