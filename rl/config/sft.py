"""The typed configuration of `recipes/sft.py`: supervised fine-tuning, mixtures of experts too."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from rl.config import CheckpointConfig, OptimizerConfig, Section
from rl.config.config import check_bias
from rl.config.data import OverlapConfig, check_source
from rl.config.diffusion import TextConfig
from rl.config.moe import MoeConfig
from rl.config.sections import RunDir, Trackers, TunedModelConfig


class SftTrainConfig(Section):
    steps: int = Field(default=100, ge=1, description="optimizer steps of the whole run")
    examples_per_step: int = Field(
        default=32, ge=1, description="over all processes; packed: rows of data.max_length tokens"
    )
    micro_batch: int = Field(default=4, ge=1, description="examples of one forward pass, per process")
    packing: bool = Field(default=False, description="short examples share a row; none attends to another")
    seed: int = Field(default=0, ge=0, description="seed of the data order and new weights")


class SftModelConfig(TunedModelConfig):
    gradient_checkpointing: bool = Field(
        default=False, description="recomputes activations: less memory, more time"
    )


# Defaults are set by key: a section's own default would be lost once a user sets one of its keys.
class SftOptimizerConfig(OptimizerConfig):
    lr: float = Field(default=1e-5, gt=0, description="learning rate")


class SftMoeConfig(MoeConfig):
    balance: Literal["none", "switch", "sequence", "entropy"] = Field(
        default="switch", description="loss that spreads tokens over experts, per layer over the whole batch"
    )


class SftConfig(Section):
    """A whole run of supervised fine-tuning."""

    run_dir: RunDir = Path("runs/sft")
    trackers: Trackers = Field(default=[])
    train: SftTrainConfig = SftTrainConfig()
    model: SftModelConfig = SftModelConfig()
    data: TextConfig
    overlap: OverlapConfig | None = Field(
        default=None, description="rows that an evaluation asks too; default: not looked for"
    )
    optimizer: SftOptimizerConfig = SftOptimizerConfig()
    moe: SftMoeConfig = SftMoeConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def check_sources(self) -> SftConfig:
        check_source(self.data, "data")
        if self.moe.replay == "engine":
            raise ValueError("moe.replay=engine needs an engine, which fine-tuning does not have; remove it")
        check_bias(self)
        if self.moe.router_fp32 and self.model.dtype != "fp32":
            raise ValueError("moe.router_fp32=true needs model.dtype=fp32; use it, or moe.router_fp32=false")
        if self.moe.trained_experts is not None:
            raise ValueError("moe.trained_experts is for `cohort train`; here use model.lora, or all weights")
        return self
