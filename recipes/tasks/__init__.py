"""Rows of a task from a `DataConfig`: a reasoning-gym generator, anything `datasets` reads, or a callable of
yours.
"""

from __future__ import annotations

import difflib
import importlib
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rl.config import DataConfig

FILE_LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
Row = dict[str, Any]


def load_rows(config: DataConfig) -> list[Row]:
    """The rows of `config.source`, at most `config.size`, with JSON values.

    Raises:
        ValueError: an unknown generator (with near names), an unreadable file, a missing split, or a callable
            that cannot be imported or returns no list of mappings.
    """
    source = config.source
    if source.startswith("reasoning_gym:"):
        return _reasoning_gym(source.partition(":")[2], config)
    if ":" in source and not Path(source).exists():
        return _from_callable(source, config)
    return _from_datasets(source, config)


def _reasoning_gym(name: str, config: DataConfig) -> list[Row]:
    """`prompt`, `answer`, and `entry` (what reasoning-gym's own scorer needs), from `config.options` and its
    seed.
    """
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        near = difflib.get_close_matches(name, list(DATASETS), n=3)
        raise ValueError(
            f"data.source: reasoning-gym has no generator {name!r}; near names: {', '.join(near) or 'none'}"
        )
    options = {"seed": 0, **config.options}
    try:
        dataset = reasoning_gym.create_dataset(name, size=config.size or 1000, **options)
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"data.options={config.options} do not fit reasoning-gym's {name}: {error}"
        ) from None
    rows = []
    for entry in dataset:
        entry = json.loads(json.dumps(entry, default=str))
        rows.append({config.prompt_column: entry["question"], "answer": entry["answer"], "entry": entry})
    return rows


def _from_callable(path: str, config: DataConfig) -> list[Row]:
    module_name, _, attribute = path.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"data.source={path!r} is neither a file, a hub name nor an importable module:callable ({error})"
        ) from None
    try:
        made = function(**config.options)
        rows = list(itertools.islice(made, config.size)) if isinstance(made, Iterable) else [made]
    except Exception as error:  # a function of the user's may raise anything
        raise ValueError(
            f"data.source={path!r} with data.options={config.options} raised {type(error).__name__}: {error}"
        ) from error
    if wrong := next((type(row).__name__ for row in rows if not isinstance(row, Mapping)), None):
        raise ValueError(
            f"data.source={path!r} must return a list of mappings, one per prompt, such as "
            f"[{{'prompt': ..., 'answer': ...}}], not {wrong}"
        )
    return [dict(row) for row in rows]


def _from_datasets(source: str, config: DataConfig) -> list[Row]:
    import datasets

    path = Path(source)
    if path.is_file() and path.suffix not in FILE_LOADERS:
        raise ValueError(
            f"data.source={source}: cannot read {path.suffix!r} files; use {', '.join(FILE_LOADERS)}"
        )
    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"data.source={source} is an empty file")
    try:
        if path.is_dir() and (path / "dataset_dict.json").exists() | (path / "state.json").exists():
            loaded = datasets.load_from_disk(source)
            if isinstance(loaded, datasets.DatasetDict):
                loaded = _split_of(loaded, config)
        elif path.is_file():
            loaded = datasets.load_dataset(FILE_LOADERS[path.suffix], data_files=source, split="train")
        else:
            loaded = datasets.load_dataset(
                source, revision=config.revision, split=config.split, **config.options
            )
    except Exception as error:  # builders, readers and the hub raise whatever they like
        raise ValueError(_reading_fault(error, config)) from error
    size = len(loaded) if config.size is None else min(config.size, len(loaded))
    return [dict(row) for row in loaded.select(range(size))]


def _reading_fault(error: BaseException, config: DataConfig) -> str:
    """What went wrong, and at its root: `datasets` often says no more than that something did."""
    if "corresponds to no data" in str(error):
        return f"data.source={config.source!r} has no rows"
    root = error
    while (deeper := root.__cause__ or root.__context__) is not None:
        root = deeper
    said = [f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0]}" for e in (error, root)]
    asked = "" if Path(config.source).exists() else f" (revision {config.revision}, split {config.split!r})"
    return f"data.source={config.source!r}{asked} could not be read: {'; '.join(dict.fromkeys(said))}"


def _split_of(splits: Any, config: DataConfig) -> Any:
    if config.split not in splits:
        raise ValueError(f"data.split={config.split!r} is not in {config.source}; it has {list(splits)}")
    return splits[config.split]
