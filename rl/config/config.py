"""The typed, validated configuration of a run: its sections, and the rules between their keys.

`rl.config.read.load_config` reads it from YAML and overrides before any model is loaded. The resolved
config is written to the run folder, so a run can be repeated from its folder alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from rl.config.data import DataConfig, EvaluationConfig, check_data, check_heldout
from rl.config.engine import EngineConfig
from rl.config.environment import EnvironmentConfig, check_environment
from rl.config.moe import MoeConfig
from rl.config.rewards import RewardsConfig, RewardSpec
from rl.config.sections import (
    AdvantageConfig,
    CheckpointConfig,
    LossConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    RunDir,
    SamplingConfig,
    Section,
    Trackers,
    TrainConfig,
    tokens_of,
)
from rl.config.teacher import TeacherConfig, check_teacher


def check_bias(config: Any) -> None:
    """Raises ValueError if router biases move beside adapters, whose checkpoints do not hold them."""
    if config.moe.bias_rate and config.model.lora:
        raise ValueError(
            f"moe.bias_rate={config.moe.bias_rate} moves biases of the base model, but checkpoints with "
            "model.lora hold adapters only; use moe.bias_rate=0, or train all weights"
        )


def _check_experts(config: Config) -> None:
    if config.moe.trained_experts and (config.model.lora or config.optimizer.weight_decay):
        raise ValueError(
            "moe.trained_experts trains weights of some experts without adapters, and weight decay would "
            "shrink the others; leave out model.lora, and use optimizer.weight_decay=0"
        )
    check_bias(config)
    if config.moe.router_fp32 and config.is_coarse:
        raise ValueError(
            "moe.router_fp32=true needs routers in fp32 in policy and engine, but engines compute them in "
            "the model's dtype; use model.dtype=fp32 with engine.dtype=auto, or moe.router_fp32=false"
        )


class Config(Section):
    """A whole run."""

    run_dir: RunDir = Path("runs/default")
    trackers: Trackers = Field(default=[])
    train: TrainConfig = TrainConfig()
    memory: MemoryConfig = MemoryConfig()
    model: ModelConfig = ModelConfig()
    teacher: TeacherConfig | None = Field(default=None, description="a model to distil from; default: none")
    data: DataConfig = DataConfig()
    sampling: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()
    environment: EnvironmentConfig | None = Field(
        default=None, description="completions of several turns; default: of one"
    )
    rewards: RewardsConfig = RewardsConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    moe: MoeConfig = MoeConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    def in_flight(self) -> int:
        """The most unfinished completions that the process of a single-process run may have."""
        t = self.train
        allowed = t.prompts_per_step * t.group_size * (1 + t.max_staleness)
        return min(allowed, t.in_flight or allowed)

    @property
    def heldout_data(self) -> DataConfig | None:
        """How held-out prompts are read and rendered; None: there is no evaluation."""
        held = self.evaluation.data
        return self.data if held is not None and held.share is not None else held

    @property
    def paid_rewards(self) -> list[RewardSpec]:
        """The rewards to pay: `rewards.functions`; of a control arm its own, and the functions with weight 0.
        A run without functions gets a reward that never applies.
        """
        given, arm = self.rewards.functions, self.rewards.control
        given = given or [RewardSpec(name="none", weight=0.0)]
        if arm == "none":
            return given
        main = next((spec for spec in given if spec.name == self.evaluation.metric), given[0])
        of_format = {"reward": main.name, "options": main.options}
        options = {"seed": self.train.seed} if arm == "random" else of_format
        logged = [spec.model_copy(update={"weight": 0.0, "requires": None}) for spec in given]
        return [RewardSpec(name=f"{arm}_control", options=options), *logged]

    @property
    def trains_all_rows(self) -> bool:
        """Whether completions without an advantage are trained on too: for a teacher, or a router loss."""
        moe, taught = self.moe, self.teacher is not None
        return taught or moe.balance != "none" or moe.z_loss_coef > 0 or moe.bias_rate > 0

    @property
    def is_coarse(self) -> bool:
        """Whether policy or engine compute in bf16; an engine of dtype auto may do so too, on a GPU."""
        return self.model.dtype != "fp32" or self.engine.dtype == "bfloat16"

    @property
    def canary_tolerance(self) -> float | None:
        """Tolerance of a weight sync, nats; None: `rollout.weight_sync` decides by the engine's dtype."""
        return self.engine.canary_tolerance or (0.2 if self.is_coarse else None)

    @property
    def max_num_seqs(self) -> int:
        """Completions that an engine samples together; with several processes some slots may stay empty."""
        given = self.engine.max_num_seqs
        return given if isinstance(given, int) else max(256, min(self.in_flight, 512))

    @property
    def token_budget(self) -> int:
        """Tokens of a forward pass."""
        return tokens_of(self.train.token_budget)

    @property
    def copies_weights(self) -> bool:
        """Whether the reference of the KL term is a copy of the model."""
        return self.loss.kl_coef > 0 and self.model.lora is None

    @property
    def whole_because(self) -> str | None:
        """Why no model's weights can be split over processes in this run; None: they can be."""
        if self.memory.keeps_whole:
            return (
                "moments and reference would be split over the GPUs, but memory.optimizer_on_host and "
                "memory.reference_on_host keep whole ones in host memory; leave one of the two out"
            )
        if self.teacher and self.teacher.is_policy and self.teacher.divergence != "sampled":
            return (
                "a split policy teaches itself by sampled tokens only; use teacher.divergence=sampled, "
                "train.sharding=none, or teacher.name"
            )
        return None

    @property
    def longest_row(self) -> int:
        """Tokens of the longest prompt with one completion; a micro-batch holds at least that."""
        return self.data.max_prompt_length + self.sampling.max_completion_length

    @property
    def rows_of_episode(self) -> int:
        """The most rows of an episode; each may have as many tokens as the longest completion."""
        several = self.environment if self.environment and self.environment.history == "template" else None
        return several.max_turns if several else 1

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt with the longest completion, of training and evaluation."""
        held = self.heldout_data
        heldout = held.max_prompt_length + self.evaluation.sampling.max_completion_length if held else 0
        return max(self.longest_row, heldout)

    @model_validator(mode="after")
    def check_rules(self) -> Config:
        check_rules(self)
        return self


def check_rules(config: Config) -> None:
    """Raises ValueError for keys that are valid alone but not together."""
    check_data(config.data, "data")
    check_heldout(config.evaluation.data)
    check_staleness(config)
    check_memory(config)
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
    _check_experts(config)
    check_teacher(config)
    check_credit(config)
    check_environment(config)
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
            f"evaluation.metric={config.evaluation.metric!r} is not a reward of this run; "
            + (f"use one of {names}" if names else "add it: rewards.functions=[{name: math, weight: 0.0}]")
        )


def check_credit(config: Config) -> None:
    """Raises ValueError for advantages that ignore a key of a reward, or differ within a sequence's ratio."""
    a, taught = config.advantage, config.teacher is not None and config.teacher.divergence == "sampled"
    how = "credit=turns" if a.credit == "turns" else "aggregate=gdpo" if a.aggregate == "gdpo" else None
    if how and (shaped := [r.name for r in config.paid_rewards if r.weight and (r.clip or r.requires)]):
        raise ValueError(
            f"advantage.{how} compares scores before clip and requires, and would ignore those of reward "
            f"{shaped[0]}; leave them out, or use aggregate=sum and credit=episode"
        )
    if config.loss.name == "gspo" and (taught or a.credit == "turns"):
        raise ValueError(
            "loss.name=gspo has one ratio per sequence, but a teacher's advantages, and those by turn, "
            "differ in it; use loss.name=grpo, or advantage.credit=episode and teacher.divergence=reverse"
        )


def check_memory(config: Config) -> None:
    """Raises ValueError for ways to save memory that exclude each other, or that have nothing to save."""
    memory, t = config.memory, config.train
    if memory.engine_sleeps is True and t.sample_while_training:
        raise ValueError(
            "memory.engine_sleeps=true drops the engine's weights while the trainer computes, but "
            "train.sample_while_training=true samples with them; leave one of the two out"
        )
    if memory.reference_on_host is True and not config.copies_weights:
        raise ValueError(
            "memory.reference_on_host=true, but this run has no copy of the model as reference: loss.kl_coef "
            "is 0, or the base below model.lora takes its place; leave it out"
        )
    if t.sharding in ("full", "hybrid") and (reason := config.whole_because):
        raise ValueError(f"train.sharding={t.sharding}: {reason}")


def check_staleness(config: Config) -> None:
    """Raises ValueError for sampling ahead that could not be trained on, or that would do nothing."""
    t = config.train
    if t.max_staleness and config.loss.sampler_correction is None:
        raise ValueError(
            f"train.max_staleness={t.max_staleness} trains on samples of older policies, but with "
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


def check_processes(config: Config, num_processes: int) -> None:
    """Raises ValueError, with values that would work, if the groups of a step do not split over the
    processes.
    """
    p = config.train.prompts_per_step // config.train.num_minibatches
    if p % num_processes == 0:
        return
    nearest = -(-p // num_processes) * num_processes * config.train.num_minibatches
    below = p // num_processes * num_processes * config.train.num_minibatches
    choices = [str(n) for n in (below, nearest) if n > 0]
    raise ValueError(
        f"train.prompts_per_step={config.train.prompts_per_step} / "
        f"num_minibatches={config.train.num_minibatches} = {p} groups "
        f"per optimizer step do not split over {num_processes} processes; use "
        f"prompts_per_step={' or '.join(choices)}"
    )
