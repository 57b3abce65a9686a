"""Variance of estimators of the bound at equal numbers of forward passes.

    python -m tests.bench.elbo_variance [--repeats 2000] [--gradients MODEL] [--rows 16]

Values: an analytic toy whose log-probs depend on the masked share, with a known bound. Gradients: a real
model on short generated texts; total variance (trace of the covariance) of the gradient of the training
loss, once with the texts held fixed and once with the texts drawn anew, where two copies of a text take the
place of a second text.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from rl.diffusion.elbo import masked_elbo, pack_plan
from rl.diffusion.model import DiffusionScorer, find_mask_token, load_diffusion_model
from rl.diffusion.objectives import Example, Noised, make_plan, normalisers, step_generator

NUM_FORWARDS, MASK = 16, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--gradients", metavar="MODEL", help="folder, hub name or smollm2-135m-instruct")
    parser.add_argument("--mask-token", default="<empty_output>")
    parser.add_argument("--rows", type=int, default=8, help="forward passes per gradient")
    parser.add_argument("--tokens", type=int, default=48, help="longest text")
    parser.add_argument("--draws", type=int, default=12, help="gradients per estimator")
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
    from transformers import AutoConfig

    from recipes.models import resolve_model
    from rl.config import ModelConfig
    from rl.loading import load_tokenizer

    folder = resolve_model(arguments.gradients)
    tokenizer = load_tokenizer(ModelConfig(name=folder))
    config = AutoConfig.from_pretrained(folder)
    wanted = None if hasattr(config, "mask_token_id") else arguments.mask_token
    mask = find_mask_token(tokenizer, config, wanted)
    scorer = DiffusionScorer(load_diffusion_model(folder, mask_token_id=mask)).train()
    pool = texts(tokenizer, arguments.tokens, 256)
    rows = arguments.rows
    print(f"gradient of the loss on {rows} rows of {folder.split('/')[-1]}, {arguments.draws} draws each")
    print(f"{'':30s}{'texts held fixed':>22s}{'texts drawn anew':>22s}{'|mean gradient|^2':>22s}")
    names = (
        "Algorithm 2 (bernoulli)",
        "bernoulli, systematic",
        "count, systematic",
        "subset, systematic",
        "coupled, systematic",
    )
    first: dict[str, float] = {}
    for name in names:
        num_texts = rows // 2 if name.startswith("coupled") else rows
        cells, size = [], 0.0
        for regime in ("fixed", "anew"):
            draws = np.random.default_rng(1)
            total, squares = None, 0.0
            for draw in range(arguments.draws):
                if regime == "fixed":
                    # As many copies of the same texts as the estimator's rows hold.
                    batch = [pool[i % (rows // 2)] for i in range(num_texts)]
                else:
                    batch = [pool[i] for i in draws.choice(len(pool), num_texts, replace=False)]
                gradient = flat_gradient(scorer, batch, name, step_generator(7, draw), mask)
                squares += gradient.square().sum().item()
                total = gradient if total is None else total.add_(gradient)
            assert total is not None
            n = arguments.draws
            mean_square = (total / n).square().sum().item()
            variance = (squares / n - mean_square) * n / (n - 1)
            size = mean_square - variance / n
            first.setdefault(regime, variance)
            cells.append(f"{variance:10.3g} {first[regime] / variance:6.2f}x")
        print(f"{name:30s}" + "".join(f"{cell:>22s}" for cell in cells) + f"{size:22.3g}", flush=True)


def flat_gradient(
    scorer: DiffusionScorer, examples: list[Example], name: str, generator: torch.Generator, mask: int
) -> Tensor:
    scorer.zero_grad()
    plan = plan_of(name, examples, generator, mask)
    weights = torch.tensor(normalisers(examples, "sequence"))
    for row in pack_plan(plan, 512):
        elbos, _ = masked_elbo(scorer, [row], len(examples))
        (-(elbos * weights).sum()).backward()
    return torch.cat([p.grad.flatten() for p in scorer.parameters() if p.grad is not None])


def texts(tokenizer, longest: int, number: int) -> list[Example]:
    """Word problems of reasoning-gym, cut to `longest` tokens; all tokens maskable."""
    import reasoning_gym

    found = []
    for entry in reasoning_gym.create_dataset("gsm_symbolic", size=number, seed=0):
        ids = torch.tensor(tokenizer(entry["question"])["input_ids"][:longest])
        found.append(Example(ids, torch.ones(len(ids), dtype=torch.bool)))
    return found


if __name__ == "__main__":
    main()
