"""Exact sampling from explicit seeds: the next token's distribution, and one uniform number per token."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from rl.types import SamplingParams

NEVER = 1 << 30


def completion_seed(seed: int, index: int = 0) -> int:
    """A 62-bit seed for completion `index` of a prompt with `seed`; close seeds share no completion."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def sampling_logprobs(logits_BV: Tensor, sampling: SamplingParams) -> Tensor:
    """log softmax(logits / temperature) after min-p, top-k and top-p, vLLM's order; -inf where cut; float32.

    Temperature 0 has a degenerate distribution: the result is then the whole distribution at temperature 1,
    uncut.
    """
    scores = logits_BV.float()
    if sampling.temperature == 0:
        return scores.log_softmax(-1)
    logprobs = (scores / sampling.temperature).log_softmax(-1)
    if sampling.min_p > 0:
        floor = logprobs.amax(-1, keepdim=True) + torch.tensor(sampling.min_p).log().item()
        logprobs = logprobs.masked_fill(logprobs < floor, -torch.inf).log_softmax(-1)
    if 0 < sampling.top_k < logprobs.shape[-1]:
        kth = logprobs.topk(sampling.top_k, -1).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < kth, -torch.inf).log_softmax(-1)
    if sampling.top_p < 1:
        ordered, tokens = logprobs.sort(-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()
        cut = torch.zeros_like(before, dtype=torch.bool).scatter(-1, tokens, before >= sampling.top_p)
        logprobs = logprobs.masked_fill(cut, -torch.inf).log_softmax(-1)
    return logprobs


def draw(logprobs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Token t with P(t) = exp(logprobs[t]), by inverting the cumulative distribution in float64; int64 [B].

    A cut token (-inf) is never drawn: `uniform` in [0, 1) stays below the total, and a flat step of the sum
    is skipped.
    """
    cumulative = logprobs_BV.double().exp().cumsum(-1)
    target = uniform_B[:, None] * (1 - 2**-50) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=logprobs_BV.shape[-1] - 1)


class SeededSampler:
    """A logits processor for `generate(do_sample=False)`: leaves each row one token, drawn from its seed.

    The uniform numbers of a row come from its seed and the step alone, so a row draws the same beside any
    other rows.

    Attributes:
        failed_at_B: first step at which a row's logits were not finite; NEVER for a healthy row.
    """

    def __init__(
        self, seeds: Sequence[int], sampling: SamplingParams, *, device: torch.device, with_logprobs: bool
    ) -> None:
        self.sampling, self.with_logprobs = sampling, with_logprobs
        self.failed_at_B = torch.full((len(seeds),), NEVER, device=device)
        self._chosen_logprobs: list[Tensor] = []
        self._step = 0
        generators, count = (torch.Generator().manual_seed(s) for s in seeds), sampling.max_completion_length
        uniforms = [torch.rand(count, generator=g, dtype=torch.float64) for g in generators]
        self._uniform_BT = torch.stack(uniforms).to(device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logprobs = sampling_logprobs(scores, self.sampling)
        failed = ~logprobs.amax(-1).isfinite()
        self.failed_at_B = self.failed_at_B.where(~failed, self.failed_at_B.clamp(max=self._step))
        if self.sampling.temperature == 0:
            tokens = logprobs.argmax(-1)
        else:
            tokens = draw(logprobs, self._uniform_BT[:, min(self._step, self._uniform_BT.shape[1] - 1)])
        if self.with_logprobs:
            self._chosen_logprobs.append(logprobs.gather(-1, tokens[:, None]).squeeze(-1))
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens[:, None], 0.0)

    def chosen_logprobs(self) -> list[list[float]]:
        """Per row, the log-prob of each step's token, also after the row's end; empty without log-probs."""
        if not self._chosen_logprobs:
            return [[] for _ in range(len(self.failed_at_B))]
        return torch.stack(self._chosen_logprobs, dim=1).tolist()
