"""A tiny model learns a Markov chain whose entropy is known: its bound is no less than the entropy, and
little more; what it samples is the chain.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rl.diffusion.elbo import masked_elbo, pack_plan
from rl.diffusion.model import DiffusionScorer, to_diffusion
from rl.diffusion.objectives import Example, make_plan, step_generator
from rollout.diffusion.denoise import denoise
from rollout.diffusion.model import TransformersDenoiser
from rollout.diffusion.steps import DenoisingParams
from tests.diffusion.conftest import SMALL

STATES, LENGTH, MASK = 5, 8, 5
STEPS, BATCH, RATE = 400, 64, 3e-3
pytestmark = pytest.mark.slow


class Chain:
    """A stationary chain with transitions drawn once."""

    def __init__(self) -> None:
        self.moves = np.random.default_rng(3).dirichlet([0.6] * STATES, STATES)
        values, vectors = np.linalg.eig(self.moves.T)
        start = np.real(vectors[:, np.argmax(np.real(values))])
        self.start = start / start.sum()

    @property
    def entropy(self) -> float:
        """Entropy of a whole sequence, in nats: H(start) + (T - 1) H(next | last)."""
        move = -(self.start[:, None] * self.moves * np.log(self.moves)).sum()
        return -(self.start * np.log(self.start)).sum() + (LENGTH - 1) * move

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        moves = torch.from_numpy(self.moves)
        columns = [torch.multinomial(torch.from_numpy(self.start), n, True, generator=generator)]
        for _ in range(LENGTH - 1):
            columns.append(torch.multinomial(moves[columns[-1]], 1, generator=generator).squeeze(-1))
        return torch.stack(columns, 1)

    def log_prob(self, ids: torch.Tensor) -> np.ndarray:
        x = ids.numpy()
        return np.log(self.start[x[:, 0]]) + np.log(self.moves[x[:, :-1], x[:, 1:]]).sum(1)


@pytest.fixture(scope="module")
def chain() -> Chain:
    return Chain()


@pytest.fixture(scope="module")
def scorer(chain) -> DiffusionScorer:
    """Trained on fresh sequences, with the default masks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        changes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": STATES + 1}
        ends = {"pad_token_id": None, "eos_token_id": None, "num_key_value_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(**SMALL | changes | ends))
    scorer = DiffusionScorer(to_diffusion(model, mask_token_id=MASK)).train()
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=RATE, weight_decay=0.0, betas=(0.9, 0.98))
    generator = step_generator(0)
    for step in range(STEPS):
        rate = min(1.0, (step + 1) / 50) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate
        plan = make_plan(examples(chain.sample(BATCH, generator)), generator, mask_token_id=MASK)
        elbos, _ = masked_elbo(scorer, pack_plan(plan, 1 << 20), BATCH)
        (-elbos.mean() / LENGTH).backward()
        torch.nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return scorer.eval()


def examples(ids: torch.Tensor) -> list[Example]:
    return [Example(row, torch.ones(LENGTH, dtype=torch.bool)) for row in ids]


def test_the_bound_is_above_the_entropy_and_within_three_percent(chain, scorer):
    """Against the chain's own log-prob of the same sequences, so that their luck cancels."""
    ids = chain.sample(2000, step_generator(9))
    plan = make_plan(examples(ids), step_generator(1), mask_token_id=MASK, num_draws=2)
    with torch.no_grad():
        elbos, _ = masked_elbo(scorer, pack_plan(plan, 1 << 16), len(ids))
    gaps = chain.log_prob(ids) - elbos.double().numpy()
    error = gaps.std() / len(gaps) ** 0.5
    print(f"entropy {chain.entropy:.4f}, bound above it by {gaps.mean():.4f} +- {error:.4f} nats")
    assert gaps.mean() >= -3 * error
    assert gaps.mean() <= 0.03 * chain.entropy
    blind = -math.log(STATES) * LENGTH
    assert blind < -1.2 * chain.entropy  # a model that learns nothing is far from the bar


def test_samples_have_the_chains_marginals(chain, scorer):
    """One token a step in random order, 4,000 sequences: states and pairs of neighbours."""
    params = DenoisingParams(LENGTH, block_length=LENGTH, temperature=1.0, remasking="random")
    n = 4000
    rows = denoise(
        TransformersDenoiser(scorer.model), [[MASK] * LENGTH] * n, params, seeds=range(n), max_rows=1000
    )
    ids = torch.tensor([row.token_ids for row in rows if row is not None])
    states = torch.bincount(ids.flatten(), minlength=STATES).numpy() / ids.numel()
    assert 0.5 * abs(states - chain.start).sum() <= 0.03
    pairs = torch.bincount((ids[:, :-1] * STATES + ids[:, 1:]).flatten(), minlength=STATES**2).numpy()
    expected = (chain.start[:, None] * chain.moves).flatten()
    assert 0.5 * abs(pairs / pairs.sum() - expected).sum() <= 0.05
    independent = np.outer(chain.start, chain.start).flatten()
    assert 0.5 * abs(independent - expected).sum() > 0.2  # samples of lone states would fail
