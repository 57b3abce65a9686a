"""What the section `environment` adds to a run: processes, tools in the prompts, an engine of episodes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from recipes.environments.forms import form_of, reader_of
from recipes.environments.journal import FileJournal
from recipes.environments.workers import Workers
from rl.config import Config, ModelConfig
from rl.store.metrics import Metric
from rollout.engine import Engine
from rollout.episodes import EpisodeEngine, EpisodeRules
from rollout.turns import TurnRenderer


def open_environment(config: Config, closing: ExitStack) -> Workers | None:
    """The environment of a config in its processes, which `closing` ends; None if the config has none.

    Raises:
        ValueError: it cannot be found or made, or the model does not sample token by token.
    """
    if (asked := config.environment) is None:
        return None
    if type(config) is not Config:
        raise ValueError("environment needs a model that samples token by token; leave the section out")
    limits: Any = {"workers": asked.workers, "deadline_s": asked.deadline_s}
    limits["memory_bytes"] = int(asked.memory_gib * 2**30)
    made = Workers(asked.name, asked.options, log=config.run_dir / "environment.log", **limits)
    closing.callback(made.close)
    return made


def with_tools(rows: list[dict[str, Any]], environment: Workers | None) -> list[dict[str, Any]]:
    """The rows with the environment's tools, which the model sees; ValueError if rows have tools already."""
    if environment is None:
        return rows
    if any(row.get("tools") for row in rows):
        raise ValueError(
            "the rows have a column 'tools', but the environment alone says which tools there are; rename "
            "the column with data.rename={tools: ...}"
        )
    return [{**row, "tools": environment.tools} for row in rows] if environment.tools else rows


def tool_metrics(environment: Workers | None) -> list[Metric]:
    """The metrics of a run's tools, or of its environment as a whole."""
    if environment is None:
        return []
    names = [tool.get("function", tool)["name"] for tool in environment.tools]
    said = "spent in calls during the step"
    return [Metric(f"tools/{name}/seconds", "s", f"{name}: time {said}") for name in (*names, "environment")]


def schema_hash(tools: Sequence[Any]) -> str:
    """Hash of the tools' schemas that the model is shown: another docstring is another prompt."""
    return hashlib.sha256(json.dumps(list(tools), sort_keys=True).encode()).hexdigest()[:16]


def playing(
    engine: Engine,
    environment: Workers | None,
    *,
    config: Config,
    tokenizer: Any,
    model: ModelConfig,
    rank: int,
) -> Engine:
    """An engine that plays a run's episodes with `engine` and closes both; `engine` if it has none."""
    asked = config.environment
    if asked is None or environment is None:
        return engine
    variables, file, read_calls = config.data.chat_template_kwargs, model.chat_template, None
    if environment.tools:
        form = form_of(tokenizer, variables, file, asked.calls)
        read_calls = reader_of(form, tokenizer, environment.tools)
    render = TurnRenderer(
        tokenizer,
        variables=variables,
        tools=environment.tools,
        history=asked.history,
        max_answer_length=asked.max_answer_length,
        template_file=file,
    )
    return EpisodeEngine(
        engine,
        environment,
        render,
        FileJournal(config.run_dir / "journal", rank, max_staleness=config.train.max_staleness),
        rules=EpisodeRules(
            asked.max_turns, asked.max_turn_length, max(16, 4 * asked.workers), config.engine.timeout_s
        ),
        facts={"tools": schema_hash(environment.tools)} if environment.tools else None,
        read_calls=read_calls,
    )
