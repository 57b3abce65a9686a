"""The typed configurations of `cohort sample` (verified traces) and of `recipes/pipeline.py` (stages)."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rl.config import DataConfig, EngineConfig, RewardsConfig, RewardSpec, SamplingConfig, Section
from rl.config.data import OverlapConfig, check_data
from rl.config.sections import HOME


class TeacherModelConfig(Section):
    name: Annotated[str, HOME] = Field(
        default="smollm2-135m-instruct",
        description="hub name, folder, adapter or smollm2-135m-instruct; with an endpoint, its model's name",
    )
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub name")
    dtype: Literal["bf16", "fp32"] = Field(default="bf16", description="of the engine if its dtype is auto")
    chat_template: Annotated[str, HOME] | None = Field(
        default=None, description="path of a Jinja file; default: the tokenizer's own"
    )


# Here the engine has the GPU to itself, every draw has its own seed, and a record is one call.
class TeacherEngineConfig(EngineConfig):
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] | Literal["auto"] = Field(
        default=0.85, description="vLLM's share of the GPU"
    )
    seed_requests: bool | None = Field(default=True, description="vLLM: draws do not depend on each other")
    timeout_s: float = Field(default=7200.0, gt=0, description="longest wait for a record, or for an answer")


class SampleConfig(Section):
    """What is sampled, and which of it is kept. The keys from `verify` on choose among the samples."""

    num_samples: int = Field(default=8, ge=1, description="completions per prompt")
    prompts_per_record: int = Field(
        default=64, ge=1, description="sampled in one call and recorded together; a kill loses one record"
    )
    seed: int = Field(default=0, ge=0, description="seed of the draws, and of the choice within a band")
    completion_column: str | None = Field(
        default=None, description="traces are read from this column of data.source; nothing is sampled"
    )
    endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://",
        description="OpenAI-compatible server to ask, such as http://127.0.0.1:8000/v1; its key is read from "
        "COHORT_ENDPOINT_KEY",
    )
    verify: dict[str, float] = Field(
        default={}, description="reward: minimum score; default: the first of rewards.functions, 1.0"
    )
    max_per_prompt: int | None = Field(default=4, ge=1, description="traces kept of a prompt; null: all")
    bands: list[tuple[float, int | None]] = Field(
        default=[(1.0, None)],
        min_length=1,
        description="[highest pass rate, prompts kept] of each band, rising to 1.0; null: keep all",
    )


CHOOSING = frozenset(f"sample.{key}" for key in ("verify", "max_per_prompt", "bands")) | {
    "rewards.max_fault_share",
    "rewards.memory_gib",
}
"""Keys that may change between starts: they choose among recorded completions, or affect none."""


class TracesConfig(Section):
    """A whole run of rejection sampling."""

    run_dir: Annotated[Path, HOME] = Field(
        default=Path("runs/traces"), description="traces.parquet, the ledger of all completions, and the log"
    )
    model: TeacherModelConfig = TeacherModelConfig()
    data: DataConfig = DataConfig()
    overlap: OverlapConfig | None = Field(
        default=None, description="rows that an evaluation asks too; default: not looked for"
    )
    sampling: SamplingConfig = SamplingConfig()
    engine: TeacherEngineConfig = TeacherEngineConfig()
    rewards: RewardsConfig = RewardsConfig()
    sample: SampleConfig = SampleConfig()

    @property
    def paid_rewards(self) -> list[RewardSpec]:
        return self.rewards.functions

    @property
    def verify(self) -> dict[str, float]:
        return self.sample.verify or {self.rewards.functions[0].name: 1.0}

    @property
    def canary_tolerance(self) -> float | None:
        """Tolerance when an adapter's weights are sent to the engine; see `Config.canary_tolerance`."""
        return self.engine.canary_tolerance or (None if self.model.dtype == "fp32" else 0.2)

    @model_validator(mode="after")
    def check_rules(self) -> TracesConfig:
        check_data(self.data, "data")
        s, names = self.sample, [spec.name for spec in self.rewards.functions]
        if not names:
            raise ValueError("rewards.functions=[] verifies nothing; name a reward, such as [{name: math}]")
        if unknown := [name for name in s.verify if name not in names]:
            raise ValueError(f"sample.verify names {unknown[0]!r}, which is not a reward; use one of {names}")
        if s.endpoint and s.completion_column:
            raise ValueError(
                "sample.endpoint asks for traces and sample.completion_column reads them; use one"
            )
        edges = [0.0, *(edge for edge, _ in s.bands)]
        if edges[-1] != 1.0 or any(low >= high for low, high in pairwise(edges)):
            raise ValueError(
                f"sample.bands={s.bands} must rise from above 0 to 1.0, as [[0.5, null], [1.0, 100]]"
            )
        if s.num_samples > 1 and self.sampling.temperature == 0 and not s.completion_column:
            raise ValueError(
                f"sampling.temperature=0 draws one completion {s.num_samples} times; use "
                "sampling.temperature=1.0, or sample.num_samples=1"
            )
        if self.rewards.control != "none" or self.data.continue_final_message:
            raise ValueError(
                "rewards.control and data.continue_final_message have no meaning here; remove them"
            )
        return self


class StageConfig(Section):
    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="its folder in run_dir; ${name} refers to it")
    recipe: str = Field(description="grpo, sft, rejection, llada, eval, upcycle or prune")
    config: dict[str, Any] = Field(
        default={}, description="of the recipe, without run_dir; ${name}: what the earlier stage `name` made"
    )
    arguments: list[str] = Field(
        default=[], description="of eval, upcycle and prune; ${here} is the folder of this stage"
    )


class PipelineConfig(Section):
    """Stages of a training pipeline, in order."""

    run_dir: Annotated[Path, HOME] = Field(
        default=Path("runs/pipeline"), description="holds a folder per stage; the same folder resumes"
    )
    stages: list[StageConfig] = Field(min_length=1, description="in order, each in its own process")

    @model_validator(mode="after")
    def check_names(self) -> PipelineConfig:
        names = [stage.name for stage in self.stages]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two stages are named {twice[0]!r} and would share a folder; rename one")
        return self
