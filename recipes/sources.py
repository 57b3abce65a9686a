"""Which source of groups a config asks for, and how it samples."""

from __future__ import annotations

from collections.abc import Sequence

from rewards.compose import reward_specs
from rewards.functions import Origins
from rewards.pool.pool import RewardPool
from rl.advantages import group_outcome
from rl.config import Config, SamplingConfig
from rl.config.traces import TracesConfig
from rl.phases import Phases
from rl.types import SamplingParams, Scorer, Source
from rl.world import World
from rollout.engine import Engine
from rollout.in_flight import GroupSampling
from rollout.prompts import PromptStream
from rollout.source import Admission, DynamicSampling, RolloutSource, WeightSync


def make_source(
    config: Config,
    world: World,
    *,
    engine: Engine,
    scorer: Scorer,
    stream: PromptStream,
    ends: Sequence[int],
    phases: Phases,
) -> Source:
    """A source that samples on-policy, or ahead by `train.max_staleness` steps."""
    t = config.train
    return RolloutSource(
        engine,
        scorer,
        stream,
        group_sampling(config, ends),
        admission=Admission(t.max_staleness, t.steps, t.in_flight, config.engine.timeout_s),
        dynamic=dynamic_sampling(config),
        sync=WeightSync(
            config.canary_tolerance,
            config.engine.verify_sync,
            sends=world.is_main or config.engine.name != "server",
        ),
        team=world,
        phase=phases,
    )


def group_sampling(config: Config, ends: Sequence[int]) -> GroupSampling:
    params = sampling_params(config.sampling, ends)
    with_logprobs = config.loss.sampler_correction is not None
    return GroupSampling(params, config.train.group_size, config.train.seed, with_logprobs)


def sampling_params(sampling: SamplingConfig, ends: Sequence[int]) -> SamplingParams:
    ids = tuple(sorted({*ends, *sampling.stop_token_ids}))
    given = sampling.model_dump() | {"stop_token_ids": ids, "stop": tuple(sampling.stop)}
    return SamplingParams(**given)


def make_scorer(config: Config | TracesConfig, origins: Origins | None = None) -> RewardPool:
    """The graders of a run; only training has steps that they are told of."""
    r = config.rewards
    return RewardPool(
        reward_specs(config.paid_rewards, origins),
        workers=r.workers,
        deadline_s=r.deadline_s,
        memory_bytes=int(r.memory_gib * 2**30),
        num_steps=config.train.steps if isinstance(config, Config) else -1,
        log=config.run_dir / "graders.log",
    )


def dynamic_sampling(config: Config) -> DynamicSampling:
    """Keeps only groups that can teach (`group_outcome` "mixed") if the config asks for it, else all."""
    dynamic = config.advantage.dynamic_sampling
    if dynamic is None:
        return DynamicSampling()
    weights = {spec.name: spec.weight for spec in config.paid_rewards}
    return DynamicSampling(
        lambda group: group_outcome(group, config=config.advantage, weights=weights) == "mixed",
        dynamic.max_rounds,
    )
