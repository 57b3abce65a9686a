"""A step of masked-diffusion decoding as pure functions: how many tokens, which, how sure, in what order."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rollout.fingerprint import GOLDEN, mixed
from rollout.sampler import draw

Remasking = Literal["low_confidence", "random", "margin", "entropy"]
Cache = Literal["none", "prefix", "dual"]
REMASKING, CACHES = get_args(Remasking), get_args(Cache)
TOKEN_STREAM, ORDER_STREAM = 0, 1


@dataclass(frozen=True, slots=True)
class DenoisingParams:
    """How a canvas of masks becomes text (LLaDA, arXiv:2502.09992 section 2.4 and Algorithms 4 and 5).

    Attributes:
        gen_length: masks after each prompt; the longest completion.
        block_length: columns that are decoded to the end before the next ones (semi-autoregressive).
        steps: model calls for a whole canvas of `gen_length`; each block gets its share. None: one per token.
        temperature: of the token draws; 0 takes the most likely token.
        remasking: keeps a step's most probable candidates, random ones, those with the largest gap between
            the two best tokens, or those of the lowest entropy.
        threshold: commits every candidate with a probability above it, and always the best one; `steps` then
            has no effect. None: the schedule alone.
        cfg_scale: w of (1 + w) conditional - w unconditional logits; the second has the given tokens masked.
        cache: keys and values that are not recomputed at every step: of the columns before the block
            ("prefix"), or of all columns outside it ("dual"). Approximate for a bidirectional model.
        refresh_every: steps of a row between full recomputations; 1 is exact; 0: only where a block begins.
        stop_token_ids: a row ends with the block that completes its text up to one of these.
        suppress_token_ids: never drawn (the mask token never is).
        stop_last: end tokens are committed after all other candidates of their step.
    """

    gen_length: int
    block_length: int = 32
    steps: int | None = None
    temperature: float = 0.0
    remasking: Remasking = "low_confidence"
    threshold: float | None = None
    cfg_scale: float = 0.0
    cache: Cache = "none"
    refresh_every: int = 0
    stop_token_ids: tuple[int, ...] = ()
    suppress_token_ids: tuple[int, ...] = ()
    stop_last: bool = False

    def __post_init__(self) -> None:
        if self.gen_length < 1 or self.block_length < 1:
            raise ValueError(
                f"gen_length={self.gen_length}, block_length={self.block_length}: both must be at least 1"
            )
        if self.gen_length % self.block_length:
            below = self.gen_length // self.block_length * self.block_length
            fits = [n for n in (below, below + self.block_length) if n]
            raise ValueError(
                f"gen_length={self.gen_length} is not divisible by block_length={self.block_length}; use "
                f"gen_length={' or '.join(map(str, fits))}, or block_length in {_divisors(self.gen_length)}"
            )
        blocks = self.gen_length // self.block_length
        if self.steps is not None and (self.steps < 1 or self.steps % blocks):
            below = self.steps // blocks * blocks
            fits = [n for n in (below, below + blocks) if n > 0]
            raise ValueError(
                f"steps={self.steps} do not divide over the {blocks} blocks of gen_length={self.gen_length} "
                f"and block_length={self.block_length}; use steps={' or '.join(map(str, fits))}"
            )
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(
                f"threshold={self.threshold} is a probability; use 0.9, or None for the schedule"
            )
        for name, value, choices in (
            ("remasking", self.remasking, REMASKING),
            ("cache", self.cache, CACHES),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(choices)}")
        for name in ("temperature", "cfg_scale", "refresh_every"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be finite and must not be negative")

    @property
    def steps_per_block(self) -> int:
        if self.steps is None:
            return self.block_length
        return self.steps // (self.gen_length // self.block_length)


assert len(fields(DenoisingParams)) <= 12


def transfer_schedule(num_masked: int, num_steps: int) -> list[int]:
    """Tokens to commit at each step of a block: m // S, one more in the first m mod S steps.

    Steps that would commit nothing (S > m) are left out: they change no canvas.
    """
    steps = min(num_masked, num_steps)
    return [num_masked // steps + (i < num_masked % steps) for i in range(steps)] if steps else []


@dataclass(frozen=True)
class Candidates:
    """The token that each wanted column would get now.

    Attributes:
        logprobs_L: log-prob of the token under the distribution it was drawn from (temperature applied; at
            temperature 0 that of temperature 1).
        probs_L: probability of the token at temperature 1, after guidance; what `threshold` is compared with.
        scores_L: larger is committed earlier.
        finite_L: False where the logits hold a NaN or only -inf.
    """

    tokens_L: Int[Tensor, " L"]
    logprobs_L: Float[Tensor, " L"]
    probs_L: Float[Tensor, " L"]
    scores_L: Float[Tensor, " L"]
    finite_L: Bool[Tensor, " L"]


def candidates(
    logits_LV: Float[Tensor, "L V"],
    params: DenoisingParams,
    *,
    seeds_L: Tensor,
    steps_L: Tensor,
    columns_L: Tensor,
) -> Candidates:
    """Draws a token per column and scores it, in float64: near 1, fp32 probabilities tie."""
    logprobs_LV = logits_LV.double().log_softmax(-1)
    drawn_from_LV = logprobs_LV
    if params.temperature == 0:
        tokens_L = logits_LV.argmax(-1)
    else:
        if params.temperature != 1:
            drawn_from_LV = (logits_LV.double() / params.temperature).log_softmax(-1)
        tokens_L = draw(drawn_from_LV, counter_uniforms(seeds_L, steps_L, columns_L, TOKEN_STREAM))
    own_L = logprobs_LV.gather(-1, tokens_L[:, None]).squeeze(-1)
    if params.remasking == "random":
        scores_L = counter_uniforms(seeds_L, steps_L, columns_L, ORDER_STREAM)
    elif params.remasking == "margin":
        best_L2 = logprobs_LV.topk(2, -1).values.exp()
        scores_L = best_L2[:, 0] - best_L2[:, 1]
    elif params.remasking == "entropy":
        scores_L = torch.special.xlogy(logprobs_LV.exp(), logprobs_LV.exp()).sum(-1)
    else:
        scores_L = own_L
    finite_L = own_L.isfinite()
    if params.stop_last and params.stop_token_ids:
        ends_L = torch.stack([tokens_L == stop for stop in params.stop_token_ids]).any(0)
        # Still above -inf, which marks columns that are not candidates.
        scores_L = scores_L.where(~ends_L, scores_L - 1e6)
    return Candidates(
        tokens_L=tokens_L,
        logprobs_L=drawn_from_LV.gather(-1, tokens_L[:, None]).squeeze(-1),
        probs_L=own_L.exp(),
        scores_L=scores_L.where(finite_L, -1e12),
        finite_L=finite_L,
    )


def chosen(
    scores_RM: Float[Tensor, "R M"],
    probs_RM: Float[Tensor, "R M"],
    counts_R: Int[Tensor, " R"],
    threshold: float | None,
) -> Bool[Tensor, "R M"]:
    """Which candidates of a row are committed: its `counts_R` best; or the best and all above the threshold.

    A column with score -inf is not a candidate. Equal scores go to the left column.
    """
    order_RM = scores_RM.sort(dim=1, descending=True, stable=True).indices
    ranks_RM = torch.empty_like(order_RM).scatter_(
        1, order_RM, torch.arange(scores_RM.shape[1], device=scores_RM.device).expand_as(order_RM)
    )
    taken_RM = ranks_RM < counts_R[:, None]
    if threshold is not None:
        taken_RM = (probs_RM > threshold) | (ranks_RM == 0)
    return taken_RM & (scores_RM > -torch.inf)


def guided(conditional_LV: Tensor, unconditional_LV: Tensor, scale: float) -> Float[Tensor, "L V"]:
    """(1 + w) conditional - w unconditional: unsupervised classifier-free guidance (LLaDA, appendix A)."""
    return unconditional_LV + (scale + 1) * (conditional_LV - unconditional_LV)


def counter_uniforms(seeds_L: Tensor, steps_L: Tensor, columns_L: Tensor, stream: int) -> Float[Tensor, " L"]:
    """Uniform numbers in [0, 1) as a function of (seed, step, column, stream) alone, in float64.

    A row draws the same whatever else is in its batch, on a CPU and a GPU alike, and nothing is stored or
    waited for. Each argument passes through the finaliser of SplitMix64.
    """
    state = seeds_L
    for number in (torch.tensor(stream), steps_L, columns_L):
        state = mixed(state + (number + 1) * GOLDEN)
    return (state & (2**53 - 1)).double() * 2.0**-53


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
