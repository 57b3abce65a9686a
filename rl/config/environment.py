"""The section `environment` of a run: completions of several turns."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rl.config.sections import Section


class EnvironmentConfig(Section):
    """An episode is one completion: sampling.max_completion_length limits all tokens that it samples, and
    the tokens of each row, those of tools and users included.
    """

    name: str = Field(description="built-in name, or module:callable that makes an environment or tools")
    options: dict[str, Any] = Field(default={}, description="its arguments")
    max_turns: int = Field(default=8, ge=1, description="turns after which an unfinished episode is cut")
    max_turn_length: int = Field(
        default=256, ge=1, description="tokens of one turn; a longer one is cut and ends its episode"
    )
    max_answer_length: int = Field(
        default=512, ge=1, description="tokens of a tool's or user's message; the rest is cut off"
    )
    history: Literal["append", "template"] = Field(
        default="append",
        description="if the chat template changes earlier turns (it drops thinking): append: they stay as "
        "they were; template: the episode continues in a new row",
    )
    calls: Literal[
        "auto", "hermes", "qwen3_coder", "glm", "deepseek", "deepseek_v31", "deepseek_v32", "gpt_oss",
        "llama3", "pythonic",
    ] = Field(
        default="auto",
        description="format in which the model calls tools; auto: the one that its chat template writes",
    )  # fmt: skip
    workers: int = Field(default=2, ge=1, description="processes that environments run in")
    deadline_s: float = Field(
        default=10.0, gt=0, description="per call; then its process is killed and the episode abstains"
    )
    memory_gib: float = Field(default=2.0, gt=0, description="address space of one process")


def check_environment(config: Any) -> None:
    """Raises ValueError for the reward 'environment' in a run without an environment."""
    if config.environment is None and any(r.name == "environment" for r in config.rewards.functions):
        raise ValueError(
            "the reward 'environment' is paid by an environment, but this run has none; set "
            "environment.name, or name another reward in rewards.functions"
        )
