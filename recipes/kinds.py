"""What differs between kinds of models in a GRPO run, by the type of their config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from recipes import diffusion_rl
from recipes.engines import make_engine
from rl.causal import CausalPolicy
from rl.config import Config, ModelConfig
from rl.config.diffusion_rl import MaskedRunConfig
from rl.diffusion.saved_config import refuse_masked
from rl.diffusion.tokenizer import load_diffusion_tokenizer
from rl.model.loading import check_config, load_tokenizer, read_config
from rl.plan.memory import GIB, MemoryPlan, plan_memory, probe
from rl.policy import Reference
from rl.store.metrics import Metric
from rl.update import pack_rules
from rollout.engine import Engine

Say = Callable[[str], None]


@dataclass(frozen=True)
class Kind:
    """What a run needs of its kind of model. `model` is the config's, with built-in names resolved.

    Attributes:
        check: (config); refuses what does not fit together, before anything is loaded.
        tokenizer: (config, model).
        policy: (config, model, accelerator, tokenizer, tokens of the longest sequence, note); ready to train.
        engine: (config, model, policy, tokens of the longest sequence, note), with the model's weights.
        try_out: (config, policy, reference, note); a pass of the largest size, so that what does not fit
            fails at once.
        plan: (config, model, bytes of the GPU, tokens of the longest sequence); refuses what it cannot
            predict.
        metrics: what its policy reports besides `rl.store.metrics.METRICS`.
    """

    check: Callable[[Any], None]
    tokenizer: Callable[[Any, ModelConfig], Any]
    policy: Callable[[Any, ModelConfig, Accelerator, Any, int, Say], Any]
    engine: Callable[[Any, ModelConfig, Any, int, Say], Engine]
    try_out: Callable[[Any, Any, Reference | None, Say], None]
    plan: Callable[[Any, ModelConfig, int, int], MemoryPlan]
    metrics: tuple[Metric, ...] = ()


def kind_of(config: Config) -> Kind:
    return KINDS[type(config)]


def causal_tokenizer(config: Config, model: ModelConfig) -> Any:
    refuse_masked(model.name, model.revision)
    return load_tokenizer(model)


def causal_policy(
    config: Config, model: ModelConfig, accelerator: Accelerator, tokenizer: Any, longest: int, note: Say
) -> CausalPolicy:
    check_config(model, tokenizer, longest)
    policy = CausalPolicy(model, accelerator, temperature=config.sampling.temperature)
    if (reason := policy.settle_attention(longest)) is not None:
        note(f"packed attention is off: {reason}; sequences are trained one at a time, with the same result")
    return policy


def causal_engine(
    config: Config, model: ModelConfig, policy: CausalPolicy, longest: int, note: Say
) -> Engine:
    return make_engine(
        config.engine,
        model.name,
        tokenizer=policy.tokenizer,
        dtype=engine_dtype(config),
        device=policy.device,
        max_model_length=max(longest, len(policy.canary_ids) + 1),
        max_num_seqs=config.max_num_seqs,
        revision=model.revision,
        note=note,
        trained=policy.model,
        sample_while_training=config.train.sample_while_training,
        attention=policy.own_attention,
        long_factors=policy.long_factors,
    )


def try_out_causal(config: Config, policy: CausalPolicy, reference: Reference | None, note: Say) -> None:
    if policy.device.type == "cuda":
        rules = pack_rules(config, share_prompts=policy.shares_prompts)
        peak = probe(policy, config, rules, reference)
        note(f"a full micro-batch of the longest completions holds {peak / GIB:.1f} GiB")


def plan_causal(config: Config, model: ModelConfig, capacity: int, longest: int) -> MemoryPlan:
    refuse_masked(model.name, model.revision)
    return plan_memory(read_config(model), config, capacity=capacity, max_length=longest)


def masked_engine(
    config: MaskedRunConfig, model: ModelConfig, policy: Any, longest: int, note: Say
) -> Engine:
    return diffusion_rl.make_masked_engine(config, model, policy, dtype=engine_dtype(config))


def plan_masked(config: MaskedRunConfig, model: ModelConfig, capacity: int, longest: int) -> MemoryPlan:
    raise ValueError(
        "this config trains a diffusion model, whose memory is not predicted; memory/peak in a run's "
        "metrics.jsonl says what its training process took, after one step already"
    )


def engine_dtype(config: Config) -> torch.dtype:
    if config.engine.dtype != "auto":
        return getattr(torch, config.engine.dtype)
    return torch.float32 if config.model.dtype == "fp32" else torch.bfloat16


KINDS: dict[type[Config], Kind] = {
    Config: Kind(
        check=lambda config: None,
        tokenizer=causal_tokenizer,
        policy=causal_policy,
        engine=causal_engine,
        try_out=try_out_causal,
        plan=plan_causal,
    ),
    MaskedRunConfig: Kind(
        check=diffusion_rl.check_canvas,
        tokenizer=lambda config, model: load_diffusion_tokenizer(model),
        policy=diffusion_rl.make_masked_policy,
        engine=masked_engine,
        try_out=lambda config, policy, reference, note: None,
        plan=plan_masked,
    ),
}
