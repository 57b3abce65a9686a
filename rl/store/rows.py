"""JSON-lines files with a row per step: appended to, cut back at a restart, checked not to disappear."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Generic, TextIO, TypeVar

from rl.store.durable import gone, is_at, written_whole
from rl.store.safe_read import open_regular

R = TypeVar("R")


class RowLog:
    """A file of rows {"step": 3, ...}, steps rising, which one process writes.

    A step costs the same however many there were: the file is read once, when it is opened.

    Args:
        durable: `append` fsyncs each row before it returns.
    """

    def __init__(self, path: str | Path, *, durable: bool = False) -> None:
        self.path = Path(path)
        self._durable = durable
        self._file: TextIO | None = None
        self._last_step: int | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        """Appends one row and flushes it.

        Raises:
            RuntimeError: the file was removed, moved or replaced since this process opened it.
        """
        file, step = self._open(), row["step"]
        assert step > self._last(), f"rows of step {step} come after those of step {self._last()}"
        file.write(json.dumps(row, allow_nan=False) + "\n")
        file.flush()
        if self._durable:
            os.fsync(file.fileno())
        self._last_step = int(step)

    def replace(self, row: Mapping[str, Any]) -> None:
        """Appends one row, replacing earlier rows of its step and all later ones."""
        if self._last() >= row["step"]:
            self.truncate_after(row["step"] - 1)
        self.append(row)

    def find(self, step: int) -> dict[str, Any] | None:
        """The row of a step; the file is read only if it may hold it."""
        if step > self._last():
            return None
        return next((row for row in iter_rows(self.path) if row["step"] == step), None)

    def truncate_after(self, step: int) -> int:
        """Keeps the rows up to and including `step`, atomically; returns how many were dropped."""
        self.close()
        dropped = sum(row["step"] > step for row in iter_rows(self.path))
        self._replace(row for row in iter_rows(self.path) if row["step"] <= step)
        return dropped

    def read(self) -> list[dict[str, Any]]:
        """All rows, in order; a half-written line, as a killed run leaves it, is left out."""
        return read_rows(self.path)

    def close(self) -> None:
        """Closes the file; safe to call twice. A later `append` opens it again."""
        if self._file is not None:
            self._file.close()
        self._file = self._last_step = None

    def _last(self) -> int:
        last = self._last_step
        if last is None:
            last = self._last_step = max((row["step"] for row in iter_rows(self.path)), default=-1)
        return last

    def _open(self) -> TextIO:
        if self._file is not None:
            if not is_at(self.path, os.fstat(self._file.fileno()), follow=True):
                raise gone(self.path)
            return self._file
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = False
        if self.path.is_file() and self.path.stat().st_size:
            with open_regular(self.path) as file:
                file.seek(-1, os.SEEK_END)
                torn = file.read() != b"\n"
        if torn:
            self._replace(iter_rows(self.path))  # else the first new row would be glued to a torn one
        self._file = self.path.open("a", encoding="utf-8")
        return self._file

    def _replace(self, rows: Iterable[Mapping[str, Any]]) -> None:
        if not self.path.is_file():
            return
        with written_whole(self.path) as file:
            for row in rows:
                file.write(json.dumps(row, allow_nan=False).encode() + b"\n")


class RecordLog(Generic[R]):
    """A file of a run folder with a dataclass of numbers for some steps, at most one for a step."""

    def __init__(self, path: Path, kind: type[R]) -> None:
        self._rows, self._kind = RowLog(path, durable=True), kind
        self.truncate_after, self.close = self._rows.truncate_after, self._rows.close

    def read(self) -> dict[int, R]:
        found = {row["step"]: record_of(self._kind, row) for row in self._rows.read()}
        return {step: record for step, record in found.items() if record is not None}

    def at(self, step: int) -> R | None:
        row = self._rows.find(step)
        return None if row is None else record_of(self._kind, row)

    def write(self, step: int, record: R) -> None:
        """Records what was found at a step, replacing an earlier record of it and all later ones."""
        self._rows.replace({"step": step, **asdict(record)})  # type: ignore[call-overload]


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file that have an integer "step"; torn lines are left out."""
    return list(iter_rows(path))


def iter_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of `read_rows`, one at a time."""
    with suppress(FileNotFoundError), open_regular(path) as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and type(row.get("step")) is int:
                yield row


def record_of(kind: type[R], row: Mapping[str, Any]) -> R | None:
    """A row as a dataclass of numbers; None where a field is missing or not a finite number."""
    values = {f.name: row.get(f.name, f.default) for f in fields(kind)}  # type: ignore[arg-type]
    whole = all(type(v) in (int, float) and math.isfinite(v) for v in values.values())  # type: ignore[arg-type]
    return kind(**values) if whole else None
