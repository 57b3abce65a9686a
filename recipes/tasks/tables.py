"""Reads rows, most of them with `datasets`: from a file, a folder, a saved dataset, or a name on the hub."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from recipes.tasks.files import read_file
from rl.config import DataConfig
from rl.config.data import DATA_SUFFIXES, check_source
from rl.model.hub import hub_fault

ROWS_READ = 10_000  # at once: reading them one by one takes ten times as long
EXACT = (".json", ".jsonl", ".csv")
FILES = (*EXACT, ".parquet")


def read_table(config: DataConfig) -> list[dict[str, Any]]:
    """The rows of `config.split`, at most `config.size`.

    Raises:
        ValueError: the file or split does not exist, or cannot be read.
    """
    source, path = config.source, Path(config.source)
    if not path.exists():
        refuse_missing(source)
        hub_fault()
    elif path.is_file():
        _check_file(path)
    if files := _exact_files(path, config):
        return _of_files(files, config)
    if is_saved := path.is_dir() and any((path / n).exists() for n in ("dataset_dict.json", "state.json")):
        check_source(config, "data", is_local=True)
    try:
        loaded = _saved(source, config.split) if is_saved else _loaded(path, config)
    except Exception as error:  # builders, readers and the hub raise whatever they like
        raise ValueError(_reading_fault(error, config)) from error
    size = len(loaded) if config.size is None else min(config.size, len(loaded))
    try:
        parts = (loaded[first : min(first + ROWS_READ, size)] for first in range(0, size, ROWS_READ))
        return [
            dict(zip(part, row, strict=True)) for part in parts for row in zip(*part.values(), strict=True)
        ]
    except UnicodeDecodeError as error:  # text is decoded here
        raise ValueError(_reading_fault(error, config)) from error


def _exact_files(path: Path, config: DataConfig) -> dict[str, list[Path]] | None:
    """The files of each split, if all are JSON or CSV. `datasets` tells a folder's splits by the `configs` of
    its README.md or by the names of its files.
    """
    if path.is_file():
        return {"train": [path]} if path.suffix in EXACT else None
    page = path / "README.md"
    if not path.is_dir():
        return None
    if config.options or (page.is_file() and "configs:" in page.read_text("utf-8", "replace")):
        found = _named_files(path, config)
    else:
        found = _found_files(path)
    files = {
        str(split): [Path(f) for f in some if Path(f).suffix in DATA_SUFFIXES]
        for split, some in found.items()
    }
    suffixes = {file.suffix for some in files.values() for file in some}
    return files if suffixes and suffixes <= set(EXACT) else None


def _found_files(path: Path) -> Mapping[Any, Sequence[str]]:
    _quiet_datasets()
    from datasets.data_files import DataFilesDict, get_data_patterns

    try:
        return DataFilesDict.from_patterns(get_data_patterns(str(path)), base_path=str(path))
    except FileNotFoundError:
        return {}


def _named_files(path: Path, config: DataConfig) -> Mapping[Any, Sequence[str]]:
    """Those of the page's `configs`; none if page or options say how to read them (`features`, `sep`)."""
    try:
        with TemporaryDirectory() as empty:  # a used cache gives the features that it holds for the page's
            options = {**config.options, "cache_dir": empty}
            builder = _quiet_datasets().load_dataset_builder(str(path), **options)
    except Exception:  # loading them raises it again
        return {}
    said, usual = vars(builder.config), vars(type(builder.config)())
    ways = said.keys() - {"name", "data_dir", "data_files"}  # the others say which rows, not how to read them
    is_plain = all(said[key] == usual.get(key) for key in ways)
    return builder.config.data_files if is_plain and not builder.info.features else {}


def _of_files(files: Mapping[str, Sequence[Path]], config: DataConfig) -> list[dict[str, Any]]:
    """Every row has all columns of its split, in one order; what a row lacks is None."""
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in files}
    for split, path in ((split, path) for split, some in files.items() for path in some):
        if config.split == "all" or split in config.split:
            try:
                rows[split] += read_file(path)
            except ValueError as error:
                raise ValueError(f"data.source={str(path)!r}, {error}") from None
    for split, some in rows.items():
        names = dict.fromkeys(name for row in some for name in row)
        rows[split] = [{name: row.get(name) for name in names} for row in some]
    try:
        ranges = _ranges({split: len(some) for split, some in rows.items()}, config.split)
    except ValueError as error:
        raise ValueError(_reading_fault(error, config)) from error
    return [rows[split][i] for split, part in ranges for i in part][: config.size]


def _quiet_datasets() -> Any:
    """The package, whose progress bars would break up the display."""
    import datasets

    datasets.disable_progress_bars()
    return datasets


def _loaded(path: Path, config: DataConfig) -> Any:
    datasets = _quiet_datasets()
    if path.is_file():
        return datasets.load_dataset("parquet", data_files=glob.escape(config.source), split=config.split)
    return datasets.load_dataset(
        config.source, revision=config.revision, split=config.split, **config.options
    )


def _saved(source: str, split: str) -> Any:
    """A split, or slices such as "train[:10%]", of a dataset saved to disk; without splits it is "train"."""
    datasets = _quiet_datasets()
    loaded = datasets.load_from_disk(source)
    splits: Mapping[Any, Any] = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    ranges = _ranges({name: len(rows) for name, rows in splits.items()}, split)
    return datasets.concatenate_datasets([splits[name].select(part) for name, part in ranges])


def _ranges(sizes: Mapping[Any, int], split: str) -> list[tuple[str, range]]:
    """The rows that a split or slices such as "train[:10%]+test" stand for: (split, range of rows)."""
    split = "+".join(map(str, sizes)) if split == "all" else split
    parts = _quiet_datasets().ReadInstruction.from_spec(split).to_absolute(sizes)
    ranges = [(part.splitname, range(part.from_, part.to)) for part in parts]
    if not any(part for _, part in ranges):
        raise ValueError(f"{split} corresponds to no data")  # what `datasets` says of other sources
    return ranges


def refuse_missing(source: str) -> None:
    """Raises ValueError for a name that only a file or folder can have, without asking the hub."""
    path = Path(source)
    is_path = (
        path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1 or source.endswith("/")
    )
    in_folder = path.parent != Path(".") and path.parent.is_dir()
    if not (is_path or in_folder or path.suffix in DATA_SUFFIXES):
        return
    beside = [str(p) for p in path.parent.glob("*")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(str(path), beside, n=1)
    raise ValueError(
        f"data.source={source!r}: there is no such file or folder"
        + ("" if path.is_absolute() else f" in {Path.cwd()}")
        + (f"; did you mean {near[0]!r}?" if near else "")
    )


def _check_file(path: Path) -> None:
    if path.suffix not in FILES:
        raise ValueError(f"data.source={path}: cannot read {path.suffix!r} files; use {', '.join(FILES)}")
    if not path.stat().st_size:
        raise ValueError(f"data.source={path} is an empty file")


def _reading_fault(error: BaseException, config: DataConfig) -> str:
    """The error and its root cause: the message of `datasets` alone often says only that it failed."""
    said = str(error)
    if "corresponds to no data" in said:
        part = "" if config.split == "train" else f" in data.split={config.split!r}"
        return f"data.source={config.source!r} has no rows{part}"
    if said.startswith(("Unknown split", "Unrecognized instruction format")):
        has = said.partition("Should be one of ")[2].rstrip(".")
        return (
            f"data.split={config.split!r} is not in {config.source}"
            + (f"; it has {has}" if has else "; a split is named as data.split=train")
            + "; for a part of it write train[:90%] or train[1000:]"
        )
    root = error
    while (deeper := root.__cause__ or root.__context__) is not None:
        root = deeper
    lines = [f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0]}" for e in (error, root)]
    asked = "" if Path(config.source).exists() else f" (revision {config.revision}, split {config.split!r})"
    said = "; ".join(dict.fromkeys(lines))
    if asked and (fault := hub_fault()):
        said += f"; {fault}: check the network and the spelling, or give a file"
    return f"data.source={config.source!r}{asked} could not be read: {said}"
