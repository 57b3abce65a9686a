"""The typed, validated configuration of a run: its sections, and the rules between their keys.

`rl.config.read.load_config` reads it from YAML and overrides before any model is loaded. The resolved
config is written to the run folder, so a run can be repeated from its folder alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from rl.config.rules import check_rules
from rl.config.sections import (
    AdvantageConfig,
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RewardsConfig,
    SamplingConfig,
    Section,
    TrainConfig,
)


class Config(Section):
    """A whole run."""

    run_dir: Path = Path("runs/default")
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default=[])
    train: TrainConfig = TrainConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    sampling: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()
    rewards: RewardsConfig = RewardsConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    def in_flight(self) -> int:
        """Most completions that a process has started and not finished, if it is the only one."""
        t = self.train
        allowed = t.prompts_per_step * t.group_size * (1 + t.max_staleness)
        return min(allowed, t.in_flight or allowed)

    @property
    def heldout_data(self) -> DataConfig | None:
        """How held-out prompts are read and rendered; None: there is no evaluation."""
        held = self.evaluation.data
        return self.data if held is not None and held.share is not None else held

    @property
    def is_coarse(self) -> bool:
        """Whether policy or engine compute in bf16; an engine whose dtype is auto may too, on a GPU."""
        return self.model.dtype != "fp32" or self.engine.dtype == "bfloat16"

    @property
    def canary_tolerance(self) -> float | None:
        """Of a weight sync, nats; None: `rollout.weight_sync.publish` decides by the engine's dtype."""
        return self.engine.canary_tolerance or (0.2 if self.is_coarse else None)

    @property
    def max_num_seqs(self) -> int:
        """Completions that an engine samples together; with several processes it may have slots to spare."""
        return self.engine.max_num_seqs or max(256, min(self.in_flight, 512))

    @model_validator(mode="after")
    def check_rules(self) -> Config:
        check_rules(self)
        return self


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
