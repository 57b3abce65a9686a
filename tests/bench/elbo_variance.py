"""Variance of estimators of the bound at equal numbers of forward passes.

    python -m tests.bench.elbo_variance [--repeats 2000] [--gradients MODEL]

Values: an analytic toy whose log-probs depend on the masked share, with a known bound. Gradients: a real
model on short generated texts; total variance (trace of the covariance) of the gradient of the loss, per
forward pass, with texts held fixed and with texts drawn anew, where a complementary mask takes the place of
a second text. "bernoulli" has tails that no affordable number of draws covers, so all moments are sums over
mask sizes: gradients are measured for every size.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import reasoning_gym
import torch
from torch import Tensor
from transformers import AutoConfig

from recipes.models import resolve_model
from rl.config import ModelConfig
from rl.diffusion.elbo import masked_elbo, pack_plan
from rl.diffusion.model import DiffusionScorer, find_mask_token, load_diffusion_model
from rl.diffusion.objectives import MIN_RATE, Example, Noised, make_plan, step_generator
from rl.model.loading import load_tokenizer

NUM_FORWARDS, MASK, SKETCH = 16, 0, 1 << 18


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--gradients", metavar="MODEL", help="folder, hub name or smollm2-135m-instruct")
    parser.add_argument("--mask-token", default="<empty_output>")
    parser.add_argument("--tokens", type=int, default=33, help="length of a text (odd), all of it maskable")
    parser.add_argument("--texts", type=int, default=4)
    arguments = parser.parse_args()
    values(arguments.repeats)
    if arguments.gradients:
        gradients(arguments)


def rao_blackwell(plan: Sequence[Noised], m: int) -> list[Noised]:
    """The masks of "bernoulli" with (m + 1) / k in place of 1 / p."""
    return [
        Noised(
            c.example,
            c.token_ids_T,
            c.columns_K,
            c.targets_K,
            torch.full_like(c.weights_K, (m + 1) / len(c.columns_K)),
        )
        for c in plan
    ]


ESTIMATORS: dict[str, tuple[str, bool]] = {
    "Algorithm 2 (bernoulli)": ("bernoulli", False),
    "bernoulli, systematic": ("bernoulli", True),
    "bernoulli's masks, (m+1)/k": ("rao-blackwell", False),
    "count, systematic": ("count", True),
    "Algorithm 3 (subset)": ("subset", False),
    "subset, systematic": ("subset", True),
    "coupled": ("coupled", False),
    "coupled, systematic": ("coupled", True),
}


def plan_of(
    name: str, examples: Sequence[Example], generator: torch.Generator, mask_token_id: int
) -> list[Noised]:
    scheme, systematic = ESTIMATORS[name]
    kind = "bernoulli" if scheme == "rao-blackwell" else scheme
    plan = make_plan(
        examples,
        generator,
        mask_token_id=mask_token_id,
        scheme=kind,
        systematic=systematic,  # type: ignore[arg-type]
    )
    return rao_blackwell(plan, examples[0].num_maskable) if scheme == "rao-blackwell" else plan


def toy_scorer(length: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """log p(x_i | x without S) = -c_i (0.2 + 3 (|S| / L)^2): context helps, and tokens differ."""
    costs = torch.from_numpy(np.random.default_rng(0).uniform(0.5, 1.5, length))

    def score(token_ids_N: Tensor, documents: object, columns_L: Tensor, targets_L: Tensor):
        share = (token_ids_N.view(-1, length) == MASK).double().mean(1)
        found = -costs[columns_L % length] * (0.2 + 3 * share[columns_L // length] ** 2)
        return found, torch.zeros_like(found)

    score.costs = costs  # type: ignore[attr-defined]
    return score


def values(repeats: int) -> None:
    print(f"{NUM_FORWARDS} forward passes, {repeats} repeats: variance of Algorithm 2 over the estimator's")
    print(f"{'':30s}" + "".join(f"{f'L = {n}':>22s}" for n in (8, 64, 256)))
    table: dict[str, list[str]] = {name: [] for name in ESTIMATORS}
    for length in (8, 64, 256):
        example = Example(torch.arange(1, length + 1), torch.ones(length, dtype=torch.bool))
        scorer = toy_scorer(length)
        sizes = torch.arange(1, length + 1).double()
        exact = -(scorer.costs.mean() * (0.2 + 3 * (sizes / length) ** 2)).sum().item()  # type: ignore[attr-defined]
        baseline = 0.0
        for name in ESTIMATORS:
            coupled = name.startswith("coupled")
            copies = [example] * (NUM_FORWARDS // (2 if coupled else 1))
            found = []
            for repeat in range(repeats):
                plan = plan_of(name, copies, step_generator(length, repeat), MASK)
                found.append(masked_elbo(scorer, pack_plan(plan, 1 << 30), len(copies))[0].mean().item())
            error = (np.mean(found) - exact) / (np.std(found) / repeats**0.5)
            baseline = baseline or np.var(found)
            table[name].append(f"{baseline / np.var(found):8.1f}x  (z {error:+.1f})")
    for name, cells in table.items():
        print(f"{name:30s}" + "".join(f"{cell:>22s}" for cell in cells))


def gradients(arguments: argparse.Namespace) -> None:
    """Gradients of sum over S of log p / m, for random S of every size with its complement, twice a text."""
    m, num_texts = arguments.tokens | 1, arguments.texts  # odd: no mask is as large as its complement
    folder = resolve_model(arguments.gradients)
    tokenizer = load_tokenizer(ModelConfig(name=folder))
    config = AutoConfig.from_pretrained(folder)
    wanted = None if hasattr(config, "mask_token_id") else arguments.mask_token
    mask = find_mask_token(tokenizer, config, wanted)
    scorer = DiffusionScorer(load_diffusion_model(folder, mask_token_id=mask)).train()
    # s[x, r, k]: text x, repeat r, mask of size k; those of sizes k and m - k are complements.
    s = torch.zeros(num_texts, 2, m + 1, SKETCH)
    signs: list[Tensor] = []
    for x, ids in enumerate(texts(tokenizer, m, num_texts)):
        for r in range(2):
            for k in range(m // 2 + 1):
                order = torch.randperm(m, generator=step_generator(x, r, k))
                for hidden in filter(len, (order[:k], order[k:])):
                    s[x, r, len(hidden)] = sketch(scorer, ids, hidden.sort().values, mask, signs)
    show(s, m, f"{Path(folder).name}, {num_texts} texts of {m} tokens")


def sketch(scorer: DiffusionScorer, ids: Tensor, hidden: Tensor, mask: int, signs: list[Tensor]) -> Tensor:
    """The gradient, hashed into SKETCH sums with random signs: inner products keep to 1 / sqrt(SKETCH)."""
    scorer.zero_grad()
    copy = Noised(0, ids.index_fill(0, hidden, mask), hidden, ids[hidden], torch.ones(len(hidden)))
    elbos, _ = masked_elbo(scorer, pack_plan([copy], 1 << 20), 1)
    (elbos.sum() / len(ids)).backward()
    total = torch.zeros(SKETCH)
    for i, p in enumerate(p for p in scorer.parameters() if p.grad is not None):
        assert p.grad is not None
        flat = torch.nn.functional.pad(p.grad.flatten(), (0, -p.grad.numel() % SKETCH))
        if len(signs) == i:
            bits = torch.randint(0, 2, flat.shape, generator=step_generator(99, i), dtype=torch.int8)
            signs.append(2 * bits - 1)
        total += (flat * signs[i]).view(-1, SKETCH).sum(0)
    return total


def show(s: Tensor, m: int, title: str) -> None:
    """Per-forward variances: mean squares by mask size, weighted as each scheme weighs sizes, less the square
    of the mean; of independent levels the mean over all sizes, of even levels the mean at each size.
    """
    weights = torch.cat([torch.zeros(1), (m + 1) / torch.arange(1, m + 1)])  # (m + 1) / k
    counted = s * weights[:, None]
    pairs = (counted + counted.flip(2)) / 2
    square = moments(s)[0]
    single, paired = (moments(x) for x in (counted, pairs))
    whole = [x.item() for x in moments(counted.mean(2, keepdim=True))[1:]]
    sizes = torch.arange(1, m + 1).double()
    bernoulli = (bernoulli_weights(m) * square[1:]).sum()
    subset = ((m / sizes).square() * square[1:]).mean()
    rows = {
        "Algorithm 2 (bernoulli)": [bernoulli - mean for mean in whole],
        "Algorithm 3 (subset)": [subset - mean for mean in whole],
        "count": [single[0].mean() - mean for mean in whole],
        "count, systematic": [(single[0] - mean).mean() for mean in single[1:]],
        # A draw is two forward passes.
        "coupled": [2 * (paired[0].mean() - mean) for mean in whole],
        "coupled, systematic": [2 * (paired[0] - mean).mean() for mean in paired[1:]],
    }
    print(f"gradient of {title}; |mean|^2 over texts {whole[1]:.3g}")
    print(f"{'variance per forward pass':30s}{'texts held fixed':>24s}{'texts drawn anew':>24s}")
    base = rows["Algorithm 2 (bernoulli)"]
    for name, found in rows.items():
        cells = [f"{v:12.4g} {b / v:9.2f}x" for v, b in zip(found, base, strict=True)]
        print(f"{name:30s}" + "".join(f"{cell:>24s}" for cell in cells))


def bernoulli_weights(m: int) -> Tensor:
    """E over the rate p of P(k of m masked) / p^2, for k = 1..m: Algorithm 2's mean square is their sum with
    the mean squares of gradients by size.
    """
    sizes, rates = torch.arange(1, m + 1).double(), torch.linspace(MIN_RATE, 1, 200_001).double()[:, None]
    ways = torch.lgamma(torch.tensor(m + 1.0)) - torch.lgamma(sizes + 1) - torch.lgamma(m - sizes + 1)
    chance = torch.exp(ways + torch.xlogy(sizes, rates) + torch.xlogy(m - sizes, 1 - rates))
    return torch.trapezoid(chance / rates**2, rates, dim=0) / (1 - MIN_RATE)


def moments(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By mask size: mean square, and unbiased squares of the mean of one text's gradients (from its two
    repeats) and of the mean over texts (from pairs of different texts).
    """
    square = s.square().sum(-1).double().mean((0, 1))
    one = (s[:, 0] * s[:, 1]).sum(-1).double().mean(0)
    per_text, n = s.mean(1), len(s)
    total, own = per_text.sum(0).square().sum(-1).double(), per_text.square().sum(-1).double().sum(0)
    return square, one, (total - own) / (n * (n - 1))


def texts(tokenizer: Any, length: int, number: int) -> list[Tensor]:
    """Beginnings of reasoning-gym's word problems, `length` tokens each."""
    found = []
    for entry in reasoning_gym.create_dataset("gsm_symbolic", size=20 * number, seed=0):
        ids = tokenizer(entry["question"])["input_ids"]
        if len(ids) >= length and len(found) < number:
            found.append(torch.tensor(ids[:length]))
    return found


if __name__ == "__main__":
    main()
