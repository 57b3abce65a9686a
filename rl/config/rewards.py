"""The section `rewards` of a run: which functions pay, and in which processes."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from rl.config.sections import Section


class RewardSpec(Section):
    name: str = Field(description="built-in name, entry point of group cohort.rewards, or module:callable")
    weight: float = Field(default=1.0, description="weight in the sum of rewards")
    requires: str | None = Field(default=None, description="a reward that must be > 0 for this one to count")
    options: dict[str, Any] = Field(default={}, description="arguments of the reward")
    clip: tuple[float, float] | None = Field(default=None, description="(low, high) to clip the score to")

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str, info: ValidationInfo) -> str:
        known = (info.context or {}).get("rewards")
        if known and name not in known and not {":", "."} & {*name}:
            near = get_close_matches(name, known, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(known)}"
            raise ValueError(f"no such reward; {hint} (a function of your own is named module:function)")
        return name


class RewardsConfig(Section):
    functions: list[RewardSpec] = Field(
        default=[RewardSpec(name="math")], description="rewards to pay; []: only a teacher teaches"
    )
    workers: int = Field(default=1, ge=1, description="grader processes")
    deadline_s: float = Field(
        default=10.0, gt=0, description="per completion; then the grader is killed and the sample abstains"
    )
    memory_gib: float = Field(default=2.0, gt=0, description="address space of one grader")
    max_fault_share: float = Field(
        default=0.05, ge=0, le=1, description="share of grader faults in a step that stops the run"
    )
    control: Literal["none", "random", "format"] = Field(
        default="none",
        description="a control arm. random: pays 0 or 1 at random; format: pays any answer that the reward "
        "of evaluation.metric finds, right or wrong. functions are then only logged, with weight 0",
    )
