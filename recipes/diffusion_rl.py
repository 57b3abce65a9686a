"""What `recipes/grpo.py` needs for a masked diffusion model: its policy, and its sampler as the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

from rl.config import ModelConfig, SamplingConfig
from rl.config.diffusion_rl import MaskedRunConfig
from rl.diffusion.model import is_shifted, load_diffusion_model, use_fused_diffusion_layers
from rl.diffusion.rl_policy import MaskedPolicy
from rl.diffusion.saved_config import raw_config
from rl.model.adapters import add_lora
from rl.model.loading import check_not_quantised
from rollout.diffusion.engine import DiffusionEngine
from rollout.diffusion.steps import DenoisingParams
from rollout.engine import Engine


def denoising_params(config: MaskedRunConfig, sampling: SamplingConfig) -> DenoisingParams:
    """How canvases of `sampling.max_completion_length` are filled.

    Raises:
        ValueError: the length is not divisible by the block.
    """
    d, length = config.diffusion, sampling.max_completion_length
    blocks = length // d.block_length if length % d.block_length == 0 else 0
    return DenoisingParams(
        gen_length=length,
        block_length=d.block_length,
        steps=d.steps_per_block * blocks if d.steps_per_block and blocks else None,
        temperature=sampling.temperature,
        remasking=d.remasking,
        threshold=d.threshold,
        cache=d.cache,
        refresh_every=d.refresh_every,
    )


def check_canvas(config: MaskedRunConfig) -> None:
    """Refuses lengths and steps that do not fit each other, before anything is loaded."""
    sections = {"sampling": config.sampling}
    if config.evaluation.data:
        sections["evaluation.sampling"] = config.evaluation.sampling
    for name, sampling in sections.items():
        if sampling.stop:
            raise ValueError(
                f"{name}.stop={sampling.stop} cuts a completion after a token, but a diffusion model writes "
                f"in any order; use {name}.stop_token_ids, which end a block"
            )
        try:
            denoising_params(config, sampling)
        except ValueError as error:
            raise ValueError(
                f"{name}.max_completion_length={sampling.max_completion_length}, diffusion.block_length="
                f"{config.diffusion.block_length}: {error}"
            ) from None


def make_masked_policy(
    config: MaskedRunConfig,
    model: ModelConfig,
    accelerator: Accelerator,
    tokenizer: Any,
    longest: int,
    note: Callable[[str], None],
) -> MaskedPolicy:
    """The policy, if its context is long enough. Loading proves that its attention is bidirectional.

    Raises:
        ValueError: a prompt and its completion may have more tokens (`longest`) than the model's positions.
    """
    raw = raw_config(model.name, model.revision)
    check_not_quantised(raw.get("quantization_config"), model.name)
    policy = MaskedPolicy(config, accelerator, name=model.name)
    room = policy.context_length
    if room is not None and longest > room:
        raise ValueError(
            f"the longest prompt and its completion may have {longest} tokens, but {config.model.name} has "
            f"{room} positions; lower sampling.max_completion_length, or leave out long prompts"
        )
    return policy


def make_masked_engine(
    config: MaskedRunConfig, model: ModelConfig, policy: MaskedPolicy, *, dtype: torch.dtype
) -> Engine:
    """The sampler, on its own copy of the model."""
    own = copy_of_model(config, model, policy, dtype)
    return DiffusionEngine(
        own,
        policy.tokenizer,
        denoising_params(config, config.sampling),
        max_num_seqs=config.max_num_seqs,
        timeout_s=config.engine.timeout_s,
        graphs=not config.engine.enforce_eager,
    )


def copy_of_model(
    config: MaskedRunConfig, model: ModelConfig, policy: MaskedPolicy, dtype: torch.dtype
) -> Any:
    """A copy of the model on the policy's device, with its own adapters if the policy has some."""
    own: Any = load_diffusion_model(
        model.name,
        revision=model.revision,
        dtype=dtype,
        mask_token_id=policy.mask_token_id,
        shift=is_shifted(policy.model),
    )
    own = own.to(policy.device)
    if policy.device.type == "cuda":
        compute = "fp32" if dtype == torch.float32 else "bf16"
        use_fused_diffusion_layers(own, model.model_copy(update={"dtype": compute}))
    if model.lora:
        add_lora(own, model)
        for parameter in own.parameters():  # not own.to(dtype), which would round rotary frequencies
            parameter.data = parameter.data.to(dtype)
    return own
