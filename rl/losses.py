"""Policy losses, KL estimators and the correction for the sampler's log-probs: one dict `LOSSES`, all pure.

A micro-batch holds whole sequences; N counts its loss tokens. The loss of an optimizer step is the plain sum
of `policy_loss` over micro-batches and processes, because every normaliser is global and sits in `weights_N`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from rl.config import LossConfig, SamplerCorrectionConfig

Aggregation = Literal["sequence", "constant", "step_tokens", "batch_tokens"]
Level = Literal["token", "sequence", "geometric"]


@dataclass(frozen=True)
class LossInputs:
    """The loss tokens of one micro-batch. Log-probs are nats at the sampling temperature.

    Attributes:
        logprobs_N: of the policy being trained; differentiable.
        advantages_N: of the completion that a token belongs to, or of the token.
        mask_N: False keeps a token out of loss, gradient and metrics, even where its numbers are NaN.
        sequence_ids_N: 0..num_sequences-1.
        weights_N: share of a token in the loss of the whole step (`aggregation_weight`).
        token_mean_weight: 1 / loss tokens of the step over all processes; scales the entropy bonus.
        old_logprobs_N: of the policy before the first update on this batch; None before it (ratio 1).
        behavior_logprobs_N: of the engine; NaN where it gave none, and the token is not corrected.
        reference_logprobs_N: of the reference in the KL term.
        entropy_N: nats; must be differentiable where `entropy_coef` is not 0.
    """

    logprobs_N: Float[Tensor, " N"]
    advantages_N: Float[Tensor, " N"]
    mask_N: Bool[Tensor, " N"]
    sequence_ids_N: Int[Tensor, " N"]
    num_sequences: int
    weights_N: Float[Tensor, " N"]
    token_mean_weight: float | Tensor
    old_logprobs_N: Float[Tensor, " N"] | None = None
    behavior_logprobs_N: Float[Tensor, " N"] | None = None
    reference_logprobs_N: Float[Tensor, " N"] | None = None
    entropy_N: Float[Tensor, " N"] | None = None


@dataclass(frozen=True)
class LossOutput:
    """A micro-batch's share of the loss of the step, and detached numbers for `rl/store/metrics.py`.

    Attributes:
        metrics: name -> (sum, count): add both over micro-batches and processes, then divide.
        maxima, minima: name -> value; -inf and inf if no token is in the loss.
    """

    loss: Float[Tensor, ""]
    metrics: dict[str, tuple[Tensor, Tensor]]
    maxima: dict[str, Tensor]
    minima: dict[str, Tensor]


@dataclass(frozen=True)
class Terms:
    """What a per-token loss sees. `ratio_N` is policy / old policy, of the token or its sequence (GSPO)."""

    logprobs_N: Float[Tensor, " N"]
    ratio_N: Float[Tensor, " N"]
    advantages_N: Float[Tensor, " N"]


# KL(policy || reference) from samples of the policy, d = log reference - log policy (Schulman, "Approximating
# KL divergence", joschu.net/blog/kl-approx.html). The gradient of an estimator need not be that of the KL.


def kl_k1(logprobs_N: Float[Tensor, " N"], reference_logprobs_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """-d: unbiased, may be negative.

    As a loss its gradient is not that of the KL: grad log p has mean 0, so it is pure noise.
    Times the ratio (`loss.kl_bias_correction`), its mean gradient is KL(policy || reference)'s.
    """
    return logprobs_N - reference_logprobs_N


def kl_k2(logprobs_N: Float[Tensor, " N"], reference_logprobs_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """d^2 / 2: biased, never negative. On-policy, its mean gradient is that of KL(policy || reference)."""
    return (logprobs_N - reference_logprobs_N).square() / 2


def kl_k3(logprobs_N: Float[Tensor, " N"], reference_logprobs_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """exp(d) - d - 1: unbiased, never negative (DeepSeek-R1, arXiv:2501.12948 equation (2)).

    On-policy, its mean gradient is that of KL(reference || policy). Times the ratio
    (`loss.kl_bias_correction`), it is that of KL(policy || reference).
    """
    d_N = reference_logprobs_N - logprobs_N
    return torch.expm1(d_N) - d_N


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


# Losses of a token with advantage A and ratio r, before its weight.


def clipped_loss(terms: Terms, config: LossConfig) -> Float[Tensor, " N"]:
    """-min(r A, clamp(r, 1 - clip_low, 1 + clip_high) A) (PPO, arXiv:1707.06347 equation (7)).

    `dual_clip` c caps r in the first product, as TRL's `delta` does. Because c > 1 + clip_high, that is the
    dual clip of arXiv:1912.09729 equation (5), -max(min(...), c A) for A < 0.
    """
    clipped_N = terms.ratio_N.clamp(1 - config.clip_low, 1 + config.clip_high)
    capped_N = terms.ratio_N if config.dual_clip is None else terms.ratio_N.clamp(max=config.dual_clip)
    return -torch.minimum(capped_N * terms.advantages_N, clipped_N * terms.advantages_N)


def cispo_loss(terms: Terms, config: LossConfig) -> Float[Tensor, " N"]:
    """-stop_gradient(clamp(r, 1 - clip_low, 1 + clip_high)) A log p (MiniMax-M1, arXiv:2506.13585 (4), (5)).

    It clips the weight of a token, never its gradient. TRL's cap is `epsilon_high`; ours is 1 + clip_high.
    """
    weights_N = terms.ratio_N.detach().clamp(1 - config.clip_low, 1 + config.clip_high)
    return -weights_N * terms.advantages_N * terms.logprobs_N


def sapo_loss(terms: Terms, config: LossConfig) -> Float[Tensor, " N"]:
    """-4 / tau sigmoid(tau (r - 1)) A: a soft gate for the clip, tau by the sign of A (arXiv:2511.20347)."""
    positive, negative = config.sapo_temperatures
    tau_N = torch.where(terms.advantages_N > 0, torch.full_like(terms.ratio_N, positive), negative)
    return -4 / tau_N * torch.sigmoid(tau_N * (terms.ratio_N - 1)) * terms.advantages_N


def reinforce_loss(terms: Terms, config: LossConfig) -> Float[Tensor, " N"]:
    """-A log p: no ratio, so right only on-policy (Williams 1992)."""
    return -terms.advantages_N * terms.logprobs_N


def clipped_tokens(terms: Terms, config: LossConfig) -> tuple[Bool[Tensor, " N"], Bool[Tensor, " N"]]:
    """Tokens to which `clipped_loss` gives no gradient: by the lower bound; by the upper one or dual_clip."""
    low_N = (terms.ratio_N < 1 - config.clip_low) & (terms.advantages_N < 0)
    high_N = (terms.ratio_N > 1 + config.clip_high) & (terms.advantages_N > 0)
    if config.dual_clip is not None:
        high_N = high_N | ((terms.ratio_N > config.dual_clip) & (terms.advantages_N < 0))
    return low_N, high_N


def clipped_weights(terms: Terms, config: LossConfig) -> tuple[Bool[Tensor, " N"], Bool[Tensor, " N"]]:
    """Tokens whose weight `cispo_loss` raises to 1 - clip_low, and lowers to 1 + clip_high."""
    return terms.ratio_N < 1 - config.clip_low, terms.ratio_N > 1 + config.clip_high


@dataclass(frozen=True)
class Loss:
    """A per-token loss, how tokens are averaged (`aggregation_weight`), and what the ratio is taken over."""

    token_loss_fn: Callable[[Terms, LossConfig], Tensor]
    aggregation: Aggregation
    clipped_fn: Callable[[Terms, LossConfig], tuple[Tensor, Tensor]] | None = None
    ratio_level: Literal["token", "sequence"] = "token"


LOSSES: dict[str, Loss] = {
    "grpo": Loss(clipped_loss, "sequence", clipped_tokens),  # arXiv:2501.12948 equation (1)
    "dr_grpo": Loss(clipped_loss, "constant", clipped_tokens),  # arXiv:2503.20783
    "bnpo": Loss(clipped_loss, "step_tokens", clipped_tokens),
    "dapo": Loss(clipped_loss, "batch_tokens", clipped_tokens),  # arXiv:2503.14476
    "gspo": Loss(clipped_loss, "sequence", clipped_tokens, ratio_level="sequence"),  # arXiv:2507.18071
    "cispo": Loss(cispo_loss, "batch_tokens", clipped_weights),
    "sapo": Loss(sapo_loss, "sequence"),
    "reinforce": Loss(reinforce_loss, "step_tokens"),
}


def aggregation_weight(
    num_loss_tokens: float,
    num_sequences: float,
    num_step_tokens: float,
    mean_step_tokens: float,
    *,
    aggregation: Aggregation,
    max_completion_length: int,
) -> float:
    """Weight in the step's loss of each loss token of a sequence with `num_loss_tokens` of them.

    "sequence": mean over sequences of their token means; a sequence without loss tokens counts as 0.
    "constant": sum / (sequences * max_completion_length). "step_tokens": token mean of the optimizer step.
    "batch_tokens": sum / tokens of an average step, so a minibatch of longer completions weighs more.

    Args:
        num_sequences, num_step_tokens: of the optimizer step, over all processes.
        mean_step_tokens: loss tokens of the whole sampled batch / optimizer steps of one pass over it.
    """
    denominators: dict[Aggregation, float] = {
        "sequence": num_sequences * num_loss_tokens,
        "constant": num_sequences * max_completion_length,
        "step_tokens": num_step_tokens,
        "batch_tokens": mean_step_tokens,
    }
    return 1.0 / denominators[aggregation] if num_loss_tokens else 0.0


def log_ratio_at(level: Level, log_ratio_N: Float[Tensor, " N"], x: LossInputs) -> Float[Tensor, " N"]:
    """Per token: its own log-ratio, or the sum or mean over the loss tokens of its sequence.

    exp of the sum ("sequence") is the unbiased importance weight, but its variance grows with length. That
    of exp of the mean ("geometric") does not.
    """
    if level == "token":
        return log_ratio_N
    zeros_S = log_ratio_N.new_zeros(x.num_sequences)
    totals_S = zeros_S.index_add(0, x.sequence_ids_N, torch.where(x.mask_N, log_ratio_N, 0.0))
    if level == "geometric":
        counts_S = zeros_S.index_add(0, x.sequence_ids_N, x.mask_N.to(log_ratio_N.dtype))
        totals_S = totals_S / counts_S.clamp(min=1)
    return totals_S[x.sequence_ids_N]


def sampler_weights(ratio_N: Float[Tensor, " N"], correction: SamplerCorrectionConfig) -> Float[Tensor, " N"]:
    """truncate: clamp(ratio, low, high) (TIS); mask: the ratio inside [low, high], else 0 (IcePop, MIS)."""
    if correction.mode == "truncate":
        return ratio_N.clamp(correction.low, correction.high)
    return torch.where(_beyond(ratio_N, correction), 0.0, ratio_N)


def policy_loss(inputs: LossInputs, *, config: LossConfig) -> LossOutput:
    """sum_N weight * (sampler weight * token loss + kl_coef * KL) - entropy_coef * token mean of the entropy.

    The sampler correction does not weight the KL term. Computed in fp32, or in fp64 if `logprobs_N` is.

    Raises:
        ValueError: a term of `config` lacks its input.
    """
    _check(inputs, config)
    loss, correction, x = LOSSES[config.name], config.sampler_correction, _masked(inputs)
    old_N = x.logprobs_N.detach() if x.old_logprobs_N is None else x.old_logprobs_N.detach()
    level = "geometric" if loss.ratio_level == "sequence" else "token"
    ratio_N = log_ratio_at(level, x.logprobs_N - old_N, x).exp()
    terms = Terms(x.logprobs_N, ratio_N, x.advantages_N)
    token_loss_N = loss.token_loss_fn(terms, config)

    behavior_N = old_N if x.behavior_logprobs_N is None else x.behavior_logprobs_N.detach()
    gap_N = torch.where(behavior_N.isnan(), 0.0, old_N - behavior_N)
    sampler_ratio_N = log_ratio_at(correction.level if correction else "token", gap_N, x).exp()
    if correction:
        token_loss_N = token_loss_N * sampler_weights(sampler_ratio_N, correction)

    reference_N = old_N if x.reference_logprobs_N is None else x.reference_logprobs_N.detach()
    kl_N = KL_ESTIMATORS[config.kl_estimator](x.logprobs_N, reference_N)
    if config.kl_coef:
        kl_weight_N = terms.ratio_N if config.kl_bias_correction else 1.0
        token_loss_N = token_loss_N + config.kl_coef * kl_weight_N * kl_N

    total = (token_loss_N * x.weights_N).sum()
    if config.entropy_coef and x.entropy_N is not None:
        total = total - config.entropy_coef * x.token_mean_weight * x.entropy_N.sum()
    return LossOutput(
        total, *_metrics(x, terms, kl_N=kl_N, gap_N=gap_N, sampler_ratio_N=sampler_ratio_N, config=config)
    )


def _metrics(
    x: LossInputs, terms: Terms, *, kl_N: Tensor, gap_N: Tensor, sampler_ratio_N: Tensor, config: LossConfig
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
    """Means, maxima and minima over the loss tokens; a term whose input is absent is left out."""
    means, maxima, minima = {"policy/ratio_mean": terms.ratio_N}, {"policy/ratio_max": terms.ratio_N}, {}
    if (clipped_fn := LOSSES[config.name].clipped_fn) is not None:
        low_N, high_N = clipped_fn(terms, config)
        means |= {
            "policy/clip_low": low_N,
            "policy/clip_high": high_N,
            "policy/clip_fraction": low_N | high_N,
        }
    if x.entropy_N is not None:
        means["policy/entropy"] = x.entropy_N
    if x.reference_logprobs_N is not None:
        means["policy/kl"] = kl_N
    if x.behavior_logprobs_N is not None:
        means["sampler/ratio_mean"] = sampler_ratio_N
        means["sampler/logprob_gap_mean"] = gap_N.abs()
        means["sampler/mismatch_kl"] = torch.expm1(gap_N) - gap_N  # k3 of KL(sampler || policy)
        if config.sampler_correction:
            means["sampler/share_beyond"] = _beyond(sampler_ratio_N, config.sampler_correction)
        maxima |= {"sampler/ratio_max": sampler_ratio_N, "sampler/logprob_gap_max": gap_N.abs()}
        minima = {"sampler/ratio_min": sampler_ratio_N}
    count = x.mask_N.sum()
    return (
        {name: (_where(x.mask_N, values_N, 0.0).sum(), count) for name, values_N in means.items()},
        {name: _where(x.mask_N, values_N, -torch.inf).amax() for name, values_N in maxima.items()},
        {name: _where(x.mask_N, values_N, torch.inf).amin() for name, values_N in minima.items()},
    )


def _where(mask_N: Bool[Tensor, " N"], values_N: Shaped[Tensor, " N"], fill: float) -> Float[Tensor, " N+1"]:
    """Detached values, `fill` where masked, and one `fill` more, so that a maximum exists without tokens."""
    values_N = values_N.detach().to(torch.promote_types(values_N.dtype, torch.float32))
    return torch.cat([torch.where(mask_N, values_N, fill), values_N.new_full((1,), fill)])


def _beyond(ratio_N: Tensor, correction: SamplerCorrectionConfig) -> Bool[Tensor, " N"]:
    return (ratio_N < correction.low) | (ratio_N > correction.high)


def _masked(inputs: LossInputs) -> LossInputs:
    """Every float in one dtype of at least 32 bits, and 0 where masked, so that no masked NaN spreads."""
    dtype = torch.promote_types(inputs.logprobs_N.dtype, torch.float32)
    columns = {
        name: torch.where(inputs.mask_N, column.to(dtype), 0.0)
        for name, column in vars(inputs).items()
        if name.endswith("_N") and isinstance(column, Tensor) and column.is_floating_point()
    }
    return replace(inputs, **columns)


def _check(x: LossInputs, config: LossConfig) -> None:
    needs = (
        ("kl_coef", 0, x.reference_logprobs_N, "the log-probs of a reference model"),
        ("entropy_coef", 0, x.entropy_N, "the policy's entropies"),
        ("sampler_correction", "null", x.behavior_logprobs_N, "the log-probs that the engine sampled with"),
    )
    for key, off, column, what in needs:
        if getattr(config, key) and column is None:
            raise ValueError(f"loss.{key} is on but lacks {what}; give them, or set loss.{key}={off}")
