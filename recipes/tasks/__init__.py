"""Rows from a `DataConfig`: of a named task, a reasoning-gym generator, anything `datasets` reads, or a
callable of yours.
"""

from __future__ import annotations

import difflib
import itertools
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from recipes.tasks.named import TASKS, task_rows
from recipes.tasks.tables import read_table, refuse_missing
from rewards.imports import import_fault, import_module
from rl.config import DataConfig
from rl.config.data import SourceConfig, check_source
from rollout.chat import check_column

Row = dict[str, Any]


def load_rows(config: DataConfig) -> list[Row]:
    """The rows of `config.source`, at most `config.size`, with JSON values and renamed columns.

    Raises:
        ValueError: an unknown generator (with near names), an unreadable file, a missing split, a callable
            that cannot be imported or does not return mappings, or a key that the source cannot use.
    """
    source = config.source
    check_source(config, "data")
    kind, _, name = source.partition(":")
    if kind == "task" and name in TASKS:
        rows = task_rows(name, config)
    elif kind in ("task", "reasoning_gym"):
        rows = _reasoning_gym(name, config)
    elif "://" in source:
        raise ValueError(f"data.source={source!r} is an address; download the file and give its path")
    elif ":" in source and not Path(source).exists():
        rows = _from_callable(source, config)
    else:
        rows = read_table(config)
    return _renamed(rows, config.rename)


def _renamed(rows: list[Row], names: Mapping[str, str]) -> list[Row]:
    """The rows with columns renamed old -> new, all at once, so that two may swap their names.

    Raises:
        ValueError: no row has an old name, or a row has the new one already.
    """
    if not names or not rows:
        return rows
    for old, new in names.items():
        check_column(old, known := dict.fromkeys(name for row in rows for name in row), "data.rename")
        if new in known and new not in names:
            raise ValueError(
                f"data.rename={{{old}: {new}}}: the dataset has a column {new!r} already; rename that one as "
                f"well, such as {new}: old_{new}"
            )
    return [{names.get(name, name): value for name, value in row.items()} for row in rows]


def check_local(config: SourceConfig) -> None:
    """Raises ValueError if the source is a file or folder that does not exist; reads no rows."""
    source = config.source
    if source.startswith("task:"):
        source = str(config.options.get("source", source))
    if ":" not in source and not Path(source).exists():
        refuse_missing(source)


def find_modules_beside(config_file: str | Path) -> None:
    """Lets `import` find modules in the working directory and beside the config file, after installed ones,
    here and in grader processes.
    """
    for folder in (Path.cwd(), Path(config_file).resolve().parent):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


def _reasoning_gym(name: str, config: DataConfig) -> list[Row]:
    """Rows with `prompt`, `answer` and `entry` (what reasoning-gym's own scorer needs), generated from
    `config.options` and its seed.

    The option `levels` is a curriculum: equally many rows of each of these reasoning-gym levels, in that
    order, with their level as `difficulty`.
    """
    from reasoning_gym.factory import DATASETS, create_curriculum, create_dataset

    if name not in DATASETS:
        near = ", ".join(difflib.get_close_matches(name, [*DATASETS, *TASKS], n=3)) or "none"
        tasks = f"; tasks of other data: {', '.join(TASKS)}" if config.source.startswith("task:") else ""
        raise ValueError(f"data.source: reasoning-gym has no generator {name!r}; near names: {near}{tasks}")
    options, size = {"seed": 0, **config.options}, config.size or 1000
    levels = options.pop("levels", None)
    rows = []
    try:
        for i, level in enumerate([None] if levels is None else levels):
            given = options | {"size": size if levels is None else len(range(i, size, len(levels)))}
            more = {} if level is None else {"difficulty": level}
            if level is not None:
                (curriculum := create_curriculum(name)).set_global_level(level)
                given = vars(curriculum.generate_configuration()) | given
            rows += [_entry_row(e, config.prompt_column) | more for e in create_dataset(name, **given)]
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"data.options={config.options} do not fit reasoning-gym's {name}: {error}"
        ) from None
    return rows


def _entry_row(entry: Any, prompt_column: str) -> Row:
    entry = json.loads(json.dumps(entry, default=str))
    return {prompt_column: entry["question"], "answer": entry["answer"], "entry": entry}


def _from_callable(path: str, config: DataConfig) -> list[Row]:
    module_name, _, attribute = path.partition(":")
    find_modules_beside(Path.cwd() / "config")
    try:
        function = getattr(import_module(module_name), attribute)
    except Exception as error:  # the user's module may raise anything
        said = import_fault(module_name, error)
        raise ValueError(
            f"data.source={path!r} is neither a file, a hub name nor an importable module:callable: {said}"
        ) from None
    try:
        made = function(**config.options)
        rows = list(itertools.islice(made, config.size)) if isinstance(made, Iterable) else [made]
    except Exception as error:  # the user's function may raise anything
        raise ValueError(
            f"data.source={path!r} with data.options={config.options} raised {type(error).__name__}: {error}"
        ) from error
    if wrong := next((type(row).__name__ for row in rows if not isinstance(row, Mapping)), None):
        raise ValueError(
            f"data.source={path!r} must return a list of mappings, one per prompt, such as "
            f"[{{'prompt': ..., 'answer': ...}}], not {wrong}"
        )
    return [dict(row) for row in rows]
