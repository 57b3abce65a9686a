"""Fingerprints of what a run began with, by content: model, tokenizer, chat template and rows.

`RUN/inputs.json` keeps them. They show when a run is resumed with other weights, ids or prompts under the
same names, which would silently mix two runs.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash
from huggingface_hub import try_to_load_from_cache

from rl.store.manifest import hash_file

MAY_DIFFER = {"rewards"}
"""What users fix in the middle of a run: a change is reported, never refused."""
Fingerprints = dict[str, dict[str, str]]
"""Kind of input -> its parts (files) -> size and hash of each."""

MODEL_FILES = re.compile(
    r"(config|generation_config|adapter_config|diffusion)\.json|.*\.safetensors(\.index\.json)?|pytorch_model.*\.bin"
)
TOKENIZER_FILES = re.compile(
    r"tokenizer.*|vocab\..*|merges\.txt|special_tokens_map\.json|added_tokens\.json|.*\.(tiktoken|model)"
)
WHOLE_BYTES = 1 << 30  # of larger files, blocks are hashed: training changes every part of a model
BLOCKS, BLOCK_BYTES = 256, 1 << 16
_WRITERS = ("transformers_version", "_name_or_path")  # who saved a config.json and where, not what it is


def fingerprints(
    name: str,
    tokenizer: Any,
    rows: Mapping[str, Iterable[Mapping[str, Any]] | None],
    *,
    revision: str | None = None,
    rewards: Iterable[str] = (),
) -> Fingerprints:
    """Fingerprints of a model folder or hub name, its chat template, the rows of each data section, and files
    of reward functions (module:callable).

    A hub model is identified by its commit, which stands for its content.
    """
    found: Fingerprints = {}
    folder = Path(name)
    if folder.is_dir():
        found["model"] = _files(folder, MODEL_FILES)
        found["tokenizer"] = _files(folder, TOKENIZER_FILES)
    elif (commit := _hub_commit(name, revision)) is not None:
        found["model"] = {"commit": commit}
    template = getattr(tokenizer, "chat_template", None)
    found["chat template"] = {"text": _digest([json.dumps(template, sort_keys=True)])}
    for section, some in rows.items():
        if some is not None:
            texts = (json.dumps(dict(row), default=_plain, ensure_ascii=False) for row in some)
            found[section] = {"rows": _digest(texts)}
    files = {name: _source_file(name) for name in rewards if ":" in name}
    found["rewards"] = {name: _file(path) for name, path in files.items() if path is not None}
    return found


def file_fingerprints(paths: Mapping[str, str | Path | None]) -> Fingerprints:
    """Fingerprints of files that a config names; None: it does not name one."""
    return {what: {"file": _file(Path(path))} for what, path in paths.items() if path is not None}


def changes(before: Fingerprints, now: Fingerprints) -> dict[str, str]:
    """Kind of input -> a sentence, for each that changed; a kind that only one side has is not a change."""
    said = {}
    for what in sorted(before.keys() & now.keys()):
        old, new = before[what], now[what]
        names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        if parts := [f"{n} ({_how(old.get(n), new.get(n))})" for n in names]:
            said[what] = f"{what}: {', '.join(parts)}"
    return said


def _how(old: str | None, new: str | None) -> str:
    if old is None or new is None:
        return "new" if old is None else "gone"
    sizes = [text.partition(" ")[0] for text in (old, new)]
    return "changed" if sizes[0] == sizes[1] else f"{sizes[0]} then, {sizes[1]} now"


def _files(folder: Path, names: re.Pattern[str]) -> dict[str, str]:
    paths = sorted(p for p in folder.iterdir() if p.is_file() and names.fullmatch(p.name))
    return {path.name: _file(path) for path in paths}


def _file(path: Path) -> str:
    """Size and hash: of a `config.json` without who saved it, of a very large file by spread blocks."""
    size = path.stat().st_size
    if path.name == "config.json":
        with suppress(ValueError, AttributeError):
            tree = json.loads(path.read_bytes())
            kept = {key: value for key, value in tree.items() if key not in _WRITERS}
            return f"config {_digest([json.dumps(kept, sort_keys=True)])}"
    if size <= WHOLE_BYTES:
        return f"{size:,}-bytes {hash_file(path)}"
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        digest.update(file.read(1 << 20))  # the header of safetensors: names, shapes, dtypes
        for block in range(BLOCKS):
            file.seek((size - BLOCK_BYTES) * block // (BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return f"{size:,}-bytes {digest.hexdigest()}"


def _hub_commit(name: str, revision: str | None) -> str | None:
    """The commit that a hub name stands for in the cache, once one of its files was loaded."""
    for file in ("tokenizer_config.json", "tokenizer.json", "config.json"):
        path = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(path, str) and (match := re.search(r"/snapshots/([^/]+)/", path)):
            return match[1]
    return None


def _source_file(name: str) -> Path | None:
    """The file of `module:callable`, found without importing anything."""
    parts = name.partition(":")[0].split(".")
    paths = [Path(folder, *parts).with_suffix(".py") for folder in (os.getcwd(), *sys.path)]
    return next((path for path in paths if path.is_file()), None)


def _digest(texts: Iterable[str]) -> str:
    digest, count = xxhash.xxh3_128(), 0
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
        count += 1
    return f"{count:,} {digest.hexdigest()}"


def _plain(value: Any) -> Any:
    """A stand-in for a value that is not JSON, equal in every process: no addresses, no order of sets."""
    if isinstance(value, bytes | bytearray):
        return xxhash.xxh3_128_hexdigest(bytes(value))
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, Mapping):
        return dict(value)
    for name in ("isoformat", "tolist", "tobytes"):
        if callable(method := getattr(value, name, None)):
            return method()
    return type(value).__name__
