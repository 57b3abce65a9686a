"""Which source of groups a config asks for, and how it samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rl.advantages import group_outcome
from rl.config import Config, SamplingConfig
from rl.phases import Phases
from rl.types import SamplingParams, Scorer
from rl.world import World
from rollout.continuous import ContinuousSource
from rollout.engine import Engine
from rollout.source import OnPolicySource, PromptStream, Source


def make_source(
    config: Config,
    world: World,
    engine: Engine,
    scorer: Scorer,
    stream: PromptStream,
    ends: Sequence[int],
    phases: Phases,
) -> Source:
    """On-policy, or sampling ahead by `train.max_staleness` steps."""
    if config.train.max_staleness:
        return continuous_source(config, world, engine, scorer, stream, ends, phases)
    options = _options(config, world, phases)
    sampling = sampling_params(config.sampling, ends)
    return OnPolicySource(engine, scorer, stream, sampling, gather_ints=world.gather_ints, **options)


def continuous_source(
    config: Config,
    world: World,
    engine: Engine,
    scorer: Scorer,
    stream: PromptStream,
    ends: Sequence[int],
    phases: Phases,
) -> ContinuousSource:
    t = config.train
    return ContinuousSource(
        engine,
        scorer,
        stream,
        sampling_params(config.sampling, ends),
        max_staleness=t.max_staleness,
        in_flight=t.in_flight,
        num_steps=t.steps,
        gather=world.gather_objects,
        timeout_s=config.engine.timeout_s,
        **_options(config, world, phases),
    )


def _options(config: Config, world: World, phases: Phases) -> dict[str, Any]:
    dynamic = config.advantage.dynamic_sampling
    return {
        "group_size": config.train.group_size,
        "seed": config.train.seed,
        "with_logprobs": config.loss.sampler_correction is not None,
        "keep_fn": _keep_fn(config),
        "max_rounds": dynamic.max_rounds if dynamic else 1,
        "process": (world.rank, world.size),
        "phase": phases,
        "sync_tolerance": config.canary_tolerance,
        "verify_sync": config.engine.verify_sync,
    }


def sampling_params(sampling: SamplingConfig, ends: Sequence[int]) -> SamplingParams:
    return SamplingParams(
        max_completion_length=sampling.max_completion_length,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        stop_token_ids=tuple(sorted({*ends, *sampling.stop_token_ids})),
        stop=tuple(sampling.stop),
    )


def _keep_fn(config: Config) -> Any:
    if config.advantage.dynamic_sampling is None:
        return None
    weights = {spec.name: spec.weight for spec in config.rewards.functions}
    return lambda group: group_outcome(group, config=config.advantage, weights=weights) == "mixed"
