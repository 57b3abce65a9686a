"""A sampler that is given the exact posterior of a Markov chain, one token at a time, samples that chain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rollout.diffusion.denoise import denoise
from rollout.diffusion.model import Layout
from rollout.diffusion.steps import DenoisingParams

K, MASK, LENGTH = 3, 3, 5
START = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
CHAIN = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [0.3, 0.6, 0.1]], dtype=torch.float64)


class ExactChain:
    """A `Denoiser` without weights: its hidden states are log p(x_i | given tokens), by forward-backward."""

    mask_token_id, context_length, shift, device = MASK, None, False, torch.device("cpu")

    def hidden(self, token_ids_N: Tensor, layout: Layout) -> Tensor:
        rows = token_ids_N.unflatten(0, (layout.num_rows, layout.width))
        seen = torch.nn.functional.one_hot(rows, K + 1)[..., :K].double()
        seen[rows == MASK] = 1.0
        forward, backward = [START * seen[:, 0]], [torch.ones(len(rows), K, dtype=torch.float64)]
        for i in range(1, layout.width):
            forward.append(forward[-1] @ CHAIN * seen[:, i])
            backward.append((backward[-1] * seen[:, layout.width - i]) @ CHAIN.T)
        both = torch.stack(forward, 1) * torch.stack(backward[::-1], 1)
        return torch.nn.functional.pad(both.log(), (0, 1)).flatten(0, 1)

    def logits(self, hidden_LD: Tensor) -> Tensor:
        return hidden_LD


def exact_joint() -> Tensor:
    """[K] * LENGTH probabilities of every sequence."""
    joint = START
    for _ in range(LENGTH - 1):
        joint = joint[..., None] * CHAIN
    return joint


@pytest.mark.parametrize("remasking", ["random", "low_confidence"])
def test_one_token_a_step_in_random_order_samples_the_exact_joint(remasking):
    """20,000 sequences of 243: with a random order every conditional is exact, and so is the joint. The
    confidence order prefers what is likely, and the test sees that bias.
    """
    params = DenoisingParams(LENGTH, block_length=LENGTH, temperature=1.0, remasking=remasking)
    n = 20_000
    rows = denoise(ExactChain(), [[MASK] * LENGTH] * n, params, seeds=range(n), max_rows=n)
    base = K ** torch.arange(LENGTH - 1, -1, -1)
    cells = (torch.tensor([row.token_ids for row in rows]) * base).sum(1)
    counts = torch.bincount(cells, minlength=K**LENGTH).double()
    expected = exact_joint().flatten() * n
    small = expected < 5
    counts = torch.cat([counts[~small], counts[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    degrees = len(expected) - 1
    within = statistic < degrees + 4 * (2 * degrees) ** 0.5
    assert within if remasking == "random" else not within


def test_two_tokens_at_once_ignore_how_they_depend_on_each_other():
    """All five at one step gives the product of the marginals; neighbours become independent."""
    params = DenoisingParams(LENGTH, block_length=LENGTH, steps=1, temperature=1.0)
    n = 20_000
    rows = denoise(ExactChain(), [[MASK] * LENGTH] * n, params, seeds=range(n), max_rows=n)
    ids = torch.tensor([row.token_ids for row in rows])
    assert all(row.num_steps == 1 for row in rows)
    found = torch.bincount(ids[:, 0] * K + ids[:, 1], minlength=K * K).double().reshape(K, K) / n
    product = START[:, None] * (START @ CHAIN)[None]
    torch.testing.assert_close(found, product, rtol=0, atol=0.015)
    assert (found - START[:, None] * CHAIN).abs().max() > 0.1
