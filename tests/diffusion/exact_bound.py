"""The bound of a sequence short enough to mask in every way, by three routes that share nothing but the
table of log-probs.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from rl.diffusion.model import DiffusionScorer
from rl.diffusion.objectives import Example
from rl.model.bidirectional import Documents


def logprob_table(scorer: DiffusionScorer, example: Example, mask_token_id: int) -> np.ndarray:
    """log p(x_i | x without S), [2^m, m]: row S as a bit mask over the maskable tokens; 0 where i is not in
    S.
    """
    columns = example.maskable_T.nonzero().squeeze(-1)
    m, length = len(columns), len(example.token_ids_T)
    table = np.zeros((2**m, m))
    subsets = [[i for i in range(m) if bits >> i & 1] for bits in range(2**m)]
    rows = torch.stack([example.token_ids_T.index_fill(0, columns[s], mask_token_id) for s in subsets[1:]])
    scored = torch.cat([columns[s] + length * b for b, s in enumerate(subsets[1:])])
    targets = torch.cat([example.token_ids_T[columns[s]] for s in subsets[1:]])
    with torch.no_grad():
        found = scorer(rows.flatten(), Documents.of([length] * len(rows)), scored, targets)[0].tolist()
    for bits, s in enumerate(subsets):
        table[bits, s] = [found.pop(0) for _ in s]
    return table


def by_size(table: np.ndarray) -> float:
    """sum over l of 1/l times the mean over subsets of l tokens of their summed log-probs."""
    m = table.shape[1]
    sums = {size: [] for size in range(1, m + 1)}
    for bits in range(1, 2**m):
        sums[bits.bit_count()].append(table[bits].sum())
    return sum(np.mean(values) / size for size, values in sums.items())


def by_time(table: np.ndarray, low: float = 0.0) -> float:
    """Integral over the mask rate t from `low` to 1 of 1/t E_S sum log p, by Gauss-Legendre quadrature (exact
    for the polynomial it is when low = 0), over 1 - low.
    """
    m = table.shape[1]
    nodes, weights = np.polynomial.legendre.leggauss(64)
    total = 0.0
    for node, weight in zip(nodes, weights, strict=True):
        t = low + (1 - low) * (node + 1) / 2
        for bits in range(1, 2**m):
            k = bits.bit_count()
            total += weight / 2 * t**k * (1 - t) ** (m - k) / t * table[bits].sum()
    return total


def by_order(table: np.ndarray) -> float:
    """Mean over all m! orders of revealing tokens one by one, of the sequence's log-prob."""
    m = table.shape[1]
    total = 0.0
    for order in itertools.permutations(range(m)):
        hidden = 2**m - 1
        for i in order:
            total += table[hidden, i]
            hidden &= ~(1 << i)
    return total / math.factorial(m)


class TableScorer:
    """Looks log-probs up instead of computing them: one example, any masks."""

    def __init__(self, example: Example, table: np.ndarray, mask_token_id: int) -> None:
        self.length, self.mask_token_id = len(example.token_ids_T), mask_token_id
        self.columns = example.maskable_T.nonzero().squeeze(-1)
        self.table = torch.from_numpy(table)
        self.index = torch.full((self.length,), -1)
        self.index[self.columns] = torch.arange(len(self.columns))

    def __call__(self, token_ids_N, documents, columns_L, targets_L):
        rows = token_ids_N.view(-1, self.length)
        hidden = (rows[:, self.columns] == self.mask_token_id).long()
        bits = (hidden << torch.arange(len(self.columns))).sum(1)
        found = self.table[bits[columns_L // self.length], self.index[columns_L % self.length]]
        return found, torch.zeros_like(found)
