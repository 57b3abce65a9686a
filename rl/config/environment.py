"""The section `environment` of a run: completions of several turns."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rl.config.sections import Section


class EnvironmentConfig(Section):
    """An episode is a completion: sampling.max_completion_length holds for all that it samples, and, with
    what it reads, for its row.
    """

    name: str = Field(description="built-in name, or module:callable that makes an environment or tools")
    options: dict[str, Any] = Field(default={}, description="arguments of it")
    max_turns: int = Field(default=8, ge=1, description="an episode that is not over then is cut")
    max_turn_length: int = Field(
        default=256, ge=1, description="tokens of one turn; a longer one is cut and ends its episode"
    )
    max_answer_length: int = Field(
        default=512, ge=1, description="tokens of a tool's or user's message; the rest is cut off"
    )
    history: Literal["append", "template"] = Field(
        default="append",
        description="where the chat template changes earlier turns (it drops thinking): append: they stay as "
        "they were; template: the episode goes on in a new row",
    )
    calls: Literal["auto", "hermes", "qwen3_coder", "glm", "deepseek", "gpt_oss", "llama3", "pythonic"] = (
        Field(
            default="auto",
            description="form in which the model calls tools; auto: the one that its chat template writes",
        )
    )
    workers: int = Field(default=2, ge=1, description="processes that environments run in")
    deadline_s: float = Field(
        default=10.0, gt=0, description="per call; then its process is killed and the episode abstains"
    )
    memory_gib: float = Field(default=2.0, gt=0, description="address space of one process")


def check_environment(config: Any) -> None:
    """Raises ValueError for the reward of an environment where there is none."""
    if config.environment is None and any(r.name == "environment" for r in config.rewards.functions):
        raise ValueError(
            "the reward 'environment' is what an environment pays, and this run has none; set "
            "environment.name, or name another reward in rewards.functions"
        )
