"""The configuration of a run: `Config`, its sections, and reading it from YAML (`rl.config.read`)."""

# ruff: noqa: F401  these names are handed on
from rl.config.config import Config, check_processes
from rl.config.data import DataConfig, EvaluationConfig
from rl.config.engine import EngineConfig
from rl.config.moe import MoeConfig
from rl.config.rewards import RewardsConfig, RewardSpec
from rl.config.sections import (
    AdvantageConfig,
    CheckpointConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    SamplerCorrectionConfig,
    SamplingConfig,
    Section,
    TrainConfig,
)
