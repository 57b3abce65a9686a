"""Turns and answers of episodes on disk, so that a run resumed after a kill need not repeat them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rl.store.durable import fsync_path

NAME = re.compile(r"v(\d+)-rank(\d+)\.jsonl")


class FileJournal:
    """`FOLDER/v000012-rank0.jsonl` holds turns and answers under the weights of version 12.

    The ledger has a step on disk before new weights are published. Entries of versions that no episode in
    flight can have started with are then removed.

    Args:
        max_staleness: of the run.
    """

    def __init__(self, folder: Path, rank: int = 0, *, max_staleness: int = 0) -> None:
        self.folder, self.rank, self.max_staleness = folder, rank, max_staleness
        self._file: Any = None
        self._entries: dict[str, dict[str, Any]] = {}

    def begin(self, version: int) -> None:
        """Opens the file of this version for appending, and reads what an earlier process left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.close()
        self._entries = {}
        for path in sorted(self.folder.glob("v*.jsonl")):
            match = NAME.fullmatch(path.name)
            if match and int(match[1]) < version - self.max_staleness:
                path.unlink(missing_ok=True)
            elif match:
                self._entries |= read_entries(path)
        path = self.folder / f"v{version:06d}-rank{self.rank}.jsonl"
        self._file = open(path, "ab")  # noqa: SIM115  closed by `close`
        if self._file.tell():
            self._file.write(b"\n")  # ends a line that a kill cut short
        fsync_path(self.folder)

    def find(self, key: str) -> Mapping[str, Any] | None:
        return self._entries.get(key)

    def append(self, entries: Sequence[Mapping[str, Any]]) -> None:
        lines = [json.dumps(dict(entry), separators=(",", ":")).encode() + b"\n" for entry in entries]
        self._file.write(b"".join(lines))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._entries |= {entry["key"]: dict(entry) for entry in entries}

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_entries(path: Path) -> dict[str, dict[str, Any]]:
    """The newest entry of each key; a line that a kill cut short is skipped."""
    found = {}
    with suppress(FileNotFoundError):
        for line in path.read_bytes().splitlines():
            with suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                found[entry["key"]] = entry
    return found
