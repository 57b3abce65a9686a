"""What differs between kinds of models in a GRPO run, by the type of their config."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator

from recipes import diffusion_rl
from recipes.engines import make_engine
from rl.causal import CausalPolicy
from rl.config import Config, ModelConfig
from rl.config.diffusion_rl import MaskedRunConfig
from rl.diffusion.saved_config import load_diffusion_tokenizer, model_config, refuse_masked
from rl.model.loading import base_of, check_config, load_tokenizer, read_config
from rl.plan.probe import probe
from rl.plan.sizes import ModelSize
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
        try_out: (config, policy, reference); bytes that a pass of the largest size held, so that what does
            not fit fails before the engine starts; None where it is not tried.
        size: (config, model); what the planner counts with.
        metrics: what its policy reports besides `rl.store.metrics.METRICS`.
    """

    check: Callable[[Any], None]
    tokenizer: Callable[[Any, ModelConfig], Any]
    policy: Callable[[Any, ModelConfig, Accelerator, Any, int, Say], Any]
    engine: Callable[[Any, ModelConfig, Any, int, Say], Engine]
    try_out: Callable[[Any, Any, Reference | None], int | None]
    size: Callable[[Any, ModelConfig], ModelSize]
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
    base = base_of(model)  # the engine begins with it, and the policy's weights follow
    return make_engine(
        config.engine,
        base.name,
        tokenizer=policy.tokenizer,
        dtype=engine_dtype(config),
        device=policy.device,
        max_model_length=max(longest, len(policy.canary_ids) + 1),
        max_num_seqs=config.max_num_seqs,
        revision=base.revision,
        note=note,
        trained=policy.model,
        sample_while_training=config.train.sample_while_training,
        attention=policy.own_attention,
        long_factors=policy.long_factors,
    )


def try_out_causal(config: Config, policy: CausalPolicy, reference: Reference | None) -> int | None:
    if policy.device.type != "cuda":
        return None
    return probe(policy, config, pack_rules(config, share_prompts=policy.shares_prompts), reference)


def has_fused_layers(model: ModelConfig) -> bool:
    """As on this machine, or, where it has no GPU, as on one with all that is recommended."""
    installed = importlib.util.find_spec("liger_kernel") is not None
    return model.fused_layers and (installed or not torch.cuda.is_available())


def causal_size(config: Config, model: ModelConfig) -> ModelSize:
    refuse_masked(model.name, model.revision)
    return ModelSize.of(read_config(model), fused_layers=has_fused_layers(model))


def masked_engine(
    config: MaskedRunConfig, model: ModelConfig, policy: Any, longest: int, note: Say
) -> Engine:
    return diffusion_rl.make_masked_engine(config, model, policy, dtype=engine_dtype(config))


def masked_size(config: MaskedRunConfig, model: ModelConfig) -> ModelSize:
    """Its sampler holds a layer's activations of every canvas, and the logits of a block twice."""
    found = model_config(model.name, model.revision)
    size = ModelSize.of(found, fused_layers=has_fused_layers(model))
    kept = 0 if config.diffusion.cache == "none" else size.cache_per_token
    return replace(
        size,
        sampled_per_token=size.saved_per_token + kept,
        sampled_per_sequence=2 * 2 * config.diffusion.block_length * size.head // size.hidden,
        has_own_sampler=True,
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
        size=causal_size,
    ),
    MaskedRunConfig: Kind(
        check=diffusion_rl.check_canvas,
        tokenizer=lambda config, model: load_diffusion_tokenizer(model),
        policy=diffusion_rl.make_masked_policy,
        engine=masked_engine,
        try_out=lambda config, policy, reference: None,
        size=masked_size,
    ),
}
