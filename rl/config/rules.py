"""The rules between keys of a config: each names the key, the value, the rule, and values that would work."""

from __future__ import annotations

from typing import Protocol

from rl.config.data_rules import check_data, check_heldout
from rl.config.sections import (
    DataConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    RewardsConfig,
    SamplingConfig,
    TrainConfig,
)


class Sections(Protocol):
    """The sections of a config that rules are about."""

    train: TrainConfig
    model: ModelConfig
    data: DataConfig
    sampling: SamplingConfig
    rewards: RewardsConfig
    loss: LossConfig
    evaluation: EvaluationConfig


def check_rules(config: Sections) -> None:
    """Raises ValueError for keys that are fine alone and not together."""
    check_data(config.data, "data")
    check_heldout(config.evaluation.data)
    check_staleness(config)
    t, s, loss = config.train, config.sampling, config.loss
    if s.temperature == 0:
        raise ValueError(
            "sampling.temperature=0 draws the same completion G times, so no group has spread and "
            "nothing is learnt; use sampling.temperature=1.0 (evaluation.sampling.temperature=0 is fine)"
        )
    if s.top_p < 1 or s.top_k > 0 or s.min_p > 0:
        raise ValueError(
            f"sampling.top_p={s.top_p}, top_k={s.top_k}, min_p={s.min_p} cut the sampled distribution, "
            "and the importance ratio of a cut distribution against the full softmax is biased; use "
            "top_p=1.0, top_k=0, min_p=0.0 for training (evaluation.sampling may cut)"
        )
    if config.model.lora and config.model.lora.dropout > 0:
        raise ValueError(
            f"model.lora.dropout={config.model.lora.dropout} makes log-probs random: the ratio of an "
            "unchanged policy is not 1, and the engine samples without dropout; use model.lora.dropout=0 "
            "(fine-tuning a diffusion model without rewards may have it)"
        )
    if t.group_size < 2:
        raise ValueError(
            f"train.group_size={t.group_size} leaves no other completion to compare with; "
            "use train.group_size >= 2 (8 is usual)"
        )
    if t.prompts_per_step % t.num_minibatches:
        divisors = [d for d in range(1, t.prompts_per_step + 1) if t.prompts_per_step % d == 0]
        raise ValueError(
            f"train.prompts_per_step={t.prompts_per_step} does not split into num_minibatches="
            f"{t.num_minibatches} equal parts; use num_minibatches in {divisors}"
        )
    if loss.name == "cispo" and loss.clip_high < 1:
        raise ValueError(
            f"loss.clip_high={loss.clip_high} with loss.name=cispo caps every weight at "
            f"{1 + loss.clip_high}; CISPO clips far above 1: use loss.clip_high=4.0 (weights up to "
            "5.0) and loss.clip_low=1.0"
        )
    if (correction := loss.sampler_correction) and correction.low >= correction.high:
        raise ValueError(
            f"loss.sampler_correction: low={correction.low} must be below high={correction.high}; "
            "for example low=0.5, high=2.0"
        )
    names = [r.name for r in config.rewards.functions]
    for spec in config.rewards.functions:
        if spec.requires is not None and spec.requires not in names:
            raise ValueError(f"reward {spec.name} requires {spec.requires!r}, which is not among {names}")
    if config.evaluation.data and config.evaluation.metric not in names:
        raise ValueError(
            f"evaluation.metric={config.evaluation.metric!r} is not a reward of this run; use one of {names}"
        )


def check_staleness(config: Sections) -> None:
    """Raises ValueError for sampling ahead in a way that cannot be trained on, or that does nothing."""
    t = config.train
    if t.max_staleness and config.loss.sampler_correction is None:
        raise ValueError(
            f"train.max_staleness={t.max_staleness} trains on samples of older policies, and with "
            "loss.sampler_correction=null they would count as the current policy's own; leave "
            "loss.sampler_correction at its default (level=token, high=2.0), or use train.max_staleness=0"
        )
    if t.in_flight is not None and not t.max_staleness:
        raise ValueError(
            f"train.in_flight={t.in_flight} does nothing under train.max_staleness=0, where a step waits "
            "for all its completions; use train.max_staleness=1, or a lower engine.max_num_seqs"
        )
    if t.in_flight is not None and t.in_flight < t.group_size:
        raise ValueError(
            f"train.in_flight={t.in_flight} completions is less than one group of train.group_size="
            f"{t.group_size}; use train.in_flight={t.group_size} or more, or leave it out"
        )
