"""What a run with the section `environment` has besides: its processes, its tools in the prompts, and an
engine that plays episodes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from recipes.environments.journal import FileJournal
from recipes.environments.workers import Workers
from rl.config import Config, ModelConfig
from rollout.engine import Engine
from rollout.episodes import EpisodeEngine, EpisodeRules
from rollout.turns import TurnRenderer

LOG = "environment.log"
JOURNAL = "journal"


def open_environment(config: Config, closing: ExitStack) -> Workers | None:
    """The environment of a config in its processes, which end with `closing`; None: there is none.

    Raises:
        ValueError: it cannot be found or made, or the model does not sample token after token.
    """
    asked = config.environment
    if asked is None:
        return None
    if type(config) is not Config:
        raise ValueError("environment needs a model that samples token after token; leave the section out")
    made = Workers(
        asked.name,
        asked.options,
        workers=asked.workers,
        deadline_s=asked.deadline_s,
        memory_bytes=int(asked.memory_gib * 2**30),
        log=config.run_dir / LOG,
    )
    closing.callback(made.close)
    return made


def with_tools(rows: list[dict[str, Any]], environment: Workers | None) -> list[dict[str, Any]]:
    """The rows with the environment's tools, which the chat template shows to the model."""
    if environment is None:
        return rows
    if any(row.get("tools") for row in rows):
        raise ValueError(
            "the rows have a column 'tools', and the environment brings its own, or none; give the column "
            "another name with data.rename={tools: ...}"
        )
    if not environment.tools:
        return rows
    return [{**row, "tools": environment.tools} for row in rows]


def schema_hash(tools: Sequence[Any]) -> str:
    """Of what the model is told of its tools: another docstring is another prompt."""
    return hashlib.sha256(json.dumps(list(tools), sort_keys=True).encode()).hexdigest()[:16]


def playing(
    engine: Engine,
    environment: Workers | None,
    config: Config,
    tokenizer: Any,
    model: ModelConfig,
    rank: int,
) -> Engine:
    """An engine that plays the episodes of a run with `engine`, and closes both; without any, `engine`."""
    asked, staleness = config.environment, config.train.max_staleness
    if asked is None or environment is None:
        return engine
    render = TurnRenderer(
        tokenizer,
        variables=config.data.chat_template_kwargs,
        tools=environment.tools,
        history=asked.history,
        max_answer_length=asked.max_answer_length,
        template_file=model.chat_template,
    )
    return EpisodeEngine(
        engine,
        environment,
        render,
        FileJournal(config.run_dir / JOURNAL, rank, max_staleness=staleness),
        rules=EpisodeRules(
            asked.max_turns,
            asked.max_turn_length,
            parallel=max(16, 4 * asked.workers),
            timeout_s=config.engine.timeout_s,
        ),
        facts={"tools": schema_hash(environment.tools)} if environment.tools else None,
    )
