"""Sampling without a cache, one sequence at a time: for models whose cache does not give their logits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rl.types import Completion, SamplingParams
from rollout.sampler import SeededSampler


@torch.no_grad()
def sample_uncached(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    sampler: SeededSampler,
    sampling: SamplingParams,
    deadline: float,
) -> list[list[int]]:
    """New tokens of each row, by a whole forward pass for every token. At the deadline all rows end."""
    rows = [list(prompt) for prompt in prompts]
    going = set(range(len(rows)))
    scores: Any = None
    for _ in range(sampling.max_completion_length):
        if not going or time.monotonic() > deadline:
            break
        for i in going:
            last = model(input_ids=torch.tensor([rows[i]], device=model.device), use_cache=False).logits[
                0, -1
            ]
            scores = last.new_zeros(len(rows), len(last), dtype=torch.float32) if scores is None else scores
            scores[i] = last
        tokens = sampler(torch.empty(0), scores).argmax(-1).tolist()
        for i in going:
            rows[i].append(tokens[i])
        going = {i for i in going if tokens[i] not in sampling.stop_token_ids}
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def cache_fault(
    sample: Callable[[list[tuple[int, ...]], list[int], SamplingParams], list[Completion]],
    logprobs: Callable[[list[int]], list[float]],
    *,
    vocab_size: int,
    window: int,
    coarse: bool,
) -> str | None:
    """Why sampling with a cache may not be used: it raises, or does not give whole sequences' log-probs.

    Args:
        sample: with a cache; a completion for each prompt and seed.
        logprobs: of a whole sequence, without one.
        window: tokens after which the model forgets; the longest prompt exceeds it.
        coarse: the model computes in 16 bits, where single tokens are off by much and the mean by 0.1 nats.
    """
    draw = torch.Generator().manual_seed(0)
    long, short = (
        tuple(torch.randint(0, vocab_size, (n,), generator=draw).tolist()) for n in (9 + window, 3)
    )
    prompts = [short, long, short]
    gaps: list[float] = []
    try:
        sampled = sample(prompts, [0, 1, 2], SamplingParams(temperature=1.0, max_completion_length=4))
        for prompt, completion in zip(prompts, sampled, strict=True):
            whole = logprobs([*prompt, *completion.token_ids])[len(prompt) - 1 :]
            gaps += [abs(a - b) for a, b in zip(whole, completion.behavior_logprobs, strict=True)]
    except Exception as error:  # each family has a cache of its own, and its own ways to fail
        return f"it raises {type(error).__name__} ({(str(error).splitlines() or [''])[0]})"
    gap, allowed = (sum(gaps) / len(gaps), 0.3) if coarse else (max(gaps), 0.0025)
    return None if gap <= allowed else f"log-probs with it differ by {gap:.2g} nats from those without"
