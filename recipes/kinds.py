"""What differs between kinds of models in a GRPO run, by the type of their config."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState

from recipes import diffusion_rl
from recipes.engines import make_engine, served_engine
from recipes.models import teacher_model, teacher_server
from rl.causal import CausalPolicy
from rl.config import Config, ModelConfig
from rl.config.diffusion import DiffusionConfig
from rl.config.diffusion_rl import MaskedRunConfig
from rl.config.moe import MoeConfig
from rl.diffusion.model import changed_config
from rl.diffusion.rl_policy import MaskedPolicy
from rl.diffusion.saved_config import load_diffusion_tokenizer, model_config, refuse_masked
from rl.model.adapters import add_lora
from rl.model.hollow import hollow_model, is_hollow
from rl.model.loading import base_of, check_config, load_tokenizer, read_config
from rl.model.units import check_shardable
from rl.moe.adapters import check_trained, expert_stacks, lora_plan, split_experts
from rl.moe.esft import load_experts, train_only
from rl.moe.health import Health
from rl.moe.kernels import choose_experts
from rl.moe.policy import METRICS as MOE_METRICS
from rl.moe.policy import MoePolicy, with_experts
from rl.plan.measured import layer_bytes, measured_size
from rl.plan.memory import num_shares
from rl.plan.probe import probe
from rl.plan.sizes import ModelSize, NoPrediction, count_parameters
from rl.policy import Reference
from rl.references import make_reference
from rl.report.display import Display
from rl.sharded import ShardedPolicy, load_split
from rl.store.folder import write_atomically
from rl.store.metrics import Metric
from rl.teacher import Teacher
from rl.update import pack_rules
from rl.world import World
from rollout.engine import Engine

Say = Callable[[str], None]
EXPERTS_WAY = "experts_implementation.txt"  # of a run folder


@dataclass(frozen=True)
class Kind:
    """What a run needs of its kind of model. `model` is the config's, with built-in names resolved.

    Attributes:
        check: (config); refuses what does not fit together, before anything is loaded.
        tokenizer: (config, model).
        policy: (config, model, accelerator, tokenizer, tokens of the longest sequence, note); ready to train.
        engine: (config, model, policy, tokens of the longest sequence, note), with the model's weights.
        try_out: (config, policy, reference, teacher); bytes that a pass of the largest size held. What does
            not fit thus fails before the engine starts. None where it is not tried.
        metrics: what its policy reports besides `rl.store.metrics.METRICS`.
        each_step: (policy); a function that gets the number of each finished step, on the main process.
    """

    check: Callable[[Any], None]
    tokenizer: Callable[[Any, ModelConfig], Any]
    policy: Callable[[Any, ModelConfig, Accelerator, Any, int, Say], Any]
    engine: Callable[[Any, ModelConfig, Any, int, Say], Engine]
    try_out: Callable[[Any, Any, Reference | None, Teacher | None], int | None]
    metrics: tuple[Metric, ...] = ()
    each_step: Callable[[Any], Callable[[int], object]] = lambda policy: int


def kind_of(config: Config) -> Kind:
    return KINDS[type(config)]


def make_models(
    config: Config,
    model: ModelConfig,
    *,
    world: World,
    tokenizer: Any,
    longest: tuple[int, int],
    display: Display,
) -> tuple[Any, Reference | None, Teacher | None]:
    """The policy, the reference of the KL term and the teacher. `train.sharding` splits the weights of the
    first two; every process has a whole teacher.

    Args:
        longest: most tokens of a sequence that the policy reads, and that the teacher reads (0: the same).
    """
    sharding, is_split = config.train.sharding, config.train.sharding in ("full", "hybrid") and world.size > 1
    with display.phase("the model to load"):
        policy = kind_of(config).policy(config, model, world.accelerator, tokenizer, longest[0], display.note)
    world.share(parameter.data for _, parameter in policy.trainable() if not is_hollow(parameter))
    reference, teacher = _frozen(config, policy, max(longest), display, is_split=is_split)
    if sharding in ("full", "hybrid") and world.size == 1:
        display.note(f"train.sharding={sharding}: one process holds all weights")
    elif is_split:
        split = partial(ShardedPolicy, reference=reference, sharding=sharding, sent=engine_dtype(config))
        policy = policy.split(split) if isinstance(policy, MoePolicy | MaskedPolicy) else split(policy)
    return policy, reference, teacher


def _frozen(
    config: Config, policy: Any, longest: int, display: Display, *, is_split: bool
) -> tuple[Reference | None, Teacher | None]:
    """(reference of the KL term, None if loss.kl_coef is 0; teacher, None if the config has none)."""
    moves = config.model.reference.update_every > 0
    hosted = config.memory.reference_on_host is True
    how: dict[str, bool] = {"moves": moves, "hosted": hosted, "is_split": is_split}
    reference = make_reference(policy, **how) if config.loss.kl_coef > 0 else None
    if config.teacher is None:
        return reference, None
    with display.phase("the teacher to load"):
        server = teacher_server(config.teacher, config.run_dir)
        model = teacher_model(config.teacher) if server is None else server.score
        return reference, Teacher(config.teacher, model, policy, longest=longest, note=display.note)


def causal_tokenizer(config: Config, model: ModelConfig) -> Any:
    refuse_masked(model.name, model.revision)
    return load_tokenizer(model)


def causal_policy(
    config: Config, model: ModelConfig, accelerator: Accelerator, tokenizer: Any, longest: int, note: Say
) -> CausalPolicy | MoePolicy:
    """Loads the policy, settles how its attention and experts are computed, and notes what it settled."""
    check_config(model, tokenizer, longest)
    given: dict[str, Any] = {"temperature": config.sampling.temperature, "plan": lora_plan}
    is_split = config.train.sharding in ("full", "hybrid") and accelerator.num_processes > 1
    own: dict[str, Any] = {"run_dir": config.run_dir, "world": World(accelerator), "note": note}
    settle = lambda p: settle_experts(p.model, config.moe, autocast=p.autocast, **own)  # noqa: E731
    if is_split:  # before anything is loaded
        hollow = hollow_model(base_of(model))
        if model.lora is not None:
            adapt(hollow, model)
        shares = num_shares(config, accelerator.num_processes)
        check_shardable(hollow, shares, freezes=config.moe.freezes)
    found = load_split(model, accelerator, longest=longest, settle=settle, **given) if is_split else None
    if is_split and found is None:
        note("every process loads all weights before they are split: the files hold other tensors")
    if found is not None:
        policy, reason = found
    else:
        policy = CausalPolicy(model, accelerator, **given)
        settle(policy)
        reason = policy.settle_attention(longest)
    if reason is not None:
        how = "in padded batches" if policy.scorer.padded else "one at a time"
        note(f"packed attention is off: {reason}; sequences are trained {how}, with the same result")
    if config.moe.trained_experts is not None:
        train_only(policy.model, load_experts(config.moe.trained_experts))
    trained = with_experts(policy, config.moe, note)
    if expert_stacks(policy.model):
        note(check_trained(policy.model, model.lora))
    if isinstance(trained, MoePolicy):
        folder = config.run_dir if accelerator.is_main_process else None
        trained.health = Health(folder, top_k=trained.sites[0].top_k, num_steps=config.train.steps)
    return trained


def settle_experts(
    model: Any, moe: MoeConfig, *, run_dir: Path, world: World, autocast: Callable[[], Any], note: Say
) -> None:
    """Settles the adapters of experts, and the way in which experts are computed.

    Raises:
        ValueError: experts with adapters cannot be computed in the way that `moe` asks for.
    """
    split = split_experts(model)
    if not any(hasattr(model.get_submodule(name), "base_layer") for name in split):
        file = run_dir / EXPERTS_WAY
        settle_way(model, moe.experts_implementation, file, world=world, autocast=autocast, note=note)
    elif moe.experts_implementation not in ("auto", "grouped_mm"):
        raise ValueError(
            f"moe.experts_implementation={moe.experts_implementation}: experts with adapters are "
            "computed by grouped_mm; use moe.experts_implementation=auto, or adapt other layers"
        )


def settle_way(
    model: Any, asked: str, file: Path, *, world: World, autocast: Callable[[], Any], note: Say
) -> None:
    """Sets the way in which experts are computed, on every process the main one's.

    One that was measured is kept in `file`: another one after a restart would round differently.
    """
    if asked == "auto":
        asked = world.gather(file.read_text().strip() if file.is_file() else asked)[0]
    seconds = choose_experts(model, asked, autocast=autocast)
    if not seconds:
        return
    chosen = world.gather(model.config._experts_implementation)[0]
    model.set_experts_implementation(chosen)
    if asked == "auto":
        measured = ", ".join(f"{way} {1e3 * s:.3g} ms" for way, s in seconds.items())
        note(f"experts are computed by {chosen} ({measured} a layer)")
        if world.is_main:
            write_atomically(file, chosen + "\n")


def causal_engine(config: Config, model: ModelConfig, policy: Any, longest: int, note: Say) -> Engine:
    base = base_of(model)  # the engine begins with it, and the policy's weights follow
    routed = policy if isinstance(policy, MoePolicy) else None
    shared: dict[str, Any] = {
        "tokenizer": policy.tokenizer,
        "dtype": engine_dtype(config),
        "max_model_length": max(longest, len(policy.canary_ids) + 1),
        "trained": policy.model,
        "routed": routed if routed and routed.replays else None,
        "note": note,
    }
    if config.engine.name == "server":
        engine = served_engine(config, sends=PartialState().is_main_process, **shared)
    else:
        engine = make_engine(
            config.engine,
            base.name,
            device=policy.device,
            max_num_seqs=config.max_num_seqs,
            revision=base.revision,
            sample_while_training=config.train.sample_while_training,
            sleeps=config.memory.engine_sleeps is True,
            attention=policy.own_attention,
            long_factors=policy.long_factors,
            **shared,
        )
    for sentence in routed.said() if routed else ():
        note(sentence)
    return engine


def try_out_causal(
    config: Config, policy: CausalPolicy, reference: Reference | None, teacher: Teacher | None
) -> int | None:
    if policy.device.type != "cuda":
        return None
    return probe(
        policy,
        config,
        rules=pack_rules(config, share_prompts=policy.shares_prompts),
        reference=reference,
        teacher=teacher,
    )


def has_fused_layers(model: ModelConfig) -> bool:
    """Whether layers are fused on this machine; if it has no GPU, on one with all recommended packages."""
    installed = importlib.util.find_spec("liger_kernel") is not None
    return model.fused_layers and model.dtype != "fp32" and (installed or not torch.cuda.is_available())


def counted(config: Config | DiffusionConfig, found: Any, *, fused: bool) -> ModelSize:
    own = config.model
    dtype = "bf16" if own.dtype == "bf16-mixed" and own.lora else own.dtype  # adapters go onto bf16 weights
    return replace(ModelSize.of(found, fused_layers=fused, dtype=dtype), adapt=adapt)


def adapt(model: Any, config: ModelConfig) -> None:
    """Adds the adapters of a run to a model."""
    add_lora(model, config, lora_plan)
    split_experts(model)


def causal_size(config: Config, model: ModelConfig) -> ModelSize:
    refuse_masked(model.name, model.revision)
    found = read_config(model)
    try:
        size = counted(config, found, fused=has_fused_layers(model))
    except NoPrediction:
        size = replace(measured_size(found), adapt=adapt)
        layer_bytes(size, config.model)  # raises NoPrediction, too
    if (teacher := teacher_model(config.teacher)) is None:
        return size
    return replace(size, teacher=count_parameters(read_config(teacher)))


def text_size(config: DiffusionConfig, model: ModelConfig) -> ModelSize:
    """The size of a diffusion model that is trained without rewards."""
    if config.train.shard:
        raise NoPrediction("train.shard splits the weights, and no plan counts that")
    own = config.model
    found = model_config(model.name, model.revision)
    if own.from_scratch is not None:
        found = changed_config(found, own.from_scratch, model.name)
    plain = own.plain(model.name)
    return counted(config, found, fused=own.compile or has_fused_layers(plain))


def masked_size(config: MaskedRunConfig, model: ModelConfig) -> ModelSize:
    """The size with a sampler that holds a layer's activations of each canvas, and a block's logits twice."""
    found = model_config(model.name, model.revision)
    size = counted(config, found, fused=has_fused_layers(model))
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


SIZES: dict[type, Callable[[Any, ModelConfig], ModelSize]] = {
    Config: causal_size,
    MaskedRunConfig: masked_size,
    DiffusionConfig: text_size,
}


def size_of(config: Config | DiffusionConfig, model: Any) -> ModelSize:
    """What the planner counts with; raises NoPrediction if memory cannot be predicted."""
    return SIZES[type(config)](config, model)


KINDS: dict[type[Config], Kind] = {
    Config: Kind(
        check=lambda config: None,
        tokenizer=causal_tokenizer,
        policy=causal_policy,
        engine=causal_engine,
        try_out=try_out_causal,
        metrics=MOE_METRICS,
        each_step=lambda policy: policy.health.write if isinstance(policy, MoePolicy) else int,
    ),
    MaskedRunConfig: Kind(
        check=diffusion_rl.check_canvas,
        tokenizer=lambda config, model: load_diffusion_tokenizer(model),
        policy=diffusion_rl.make_masked_policy,
        engine=lambda config, model, policy, longest, note: diffusion_rl.make_masked_engine(
            config, model, policy, dtype=engine_dtype(config)
        ),
        try_out=lambda config, policy, reference, teacher: None,
    ),
}
