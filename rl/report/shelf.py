"""All groups of a run, for its report: a list of them, the texts of the newest, and side files for the rest.

A record of the ledger is read once, however often the report is rebuilt while the run runs. Its texts stay in
memory, and go into the page, until newer ones need the room; then they move to `report/groups-*.js`. Such a
file is one call with compressed text, which the page loads when a reader asks for one of its groups. It is a
script because a page opened from disk may load nothing else.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rl.report.groups import describe_group, describe_row, json_for_html
from rl.store.durable import written_whole
from rl.store.ledger import DAMAGE, MAX_GLANCE_BYTES, brief, each_group
from rl.store.redact import show_controls

PAGE_BYTES, SIDE_BYTES = 16 << 20, 2 << 30  # most bytes of texts in the page, and in all side files
MAX_ROWS = 200_000  # groups in the list, the newest if there are more
_PART_BYTES = 4 << 20  # of texts in one side file, before compression
_MOST_UNPACKED = 100  # times a record's size: log-probs hardly shrink, so no run writes records beyond that
_NAME = re.compile(r"step-(\d{1,15})-rank(\d{1,6})\.jsonl\.gz")
_SIDE_NAME = re.compile(r"groups-[et]\d+-\d+-\d+\.js")
_FOLDERS = {"evaluations": "e", "ledger": "t"}
Key = tuple[int, str, int]
"""(steps done, "e" for an evaluation or "t" for training, process)."""


@dataclass(slots=True)
class _Record:
    """A file of the ledger: its time and size, the rows of its groups as JSON, and where their texts are.

    Attributes:
        texts: JSON of each group, while they are in memory.
        parts: number of groups in each side file.
        sides: bytes of each side file.
    """

    stamp: tuple[int, int]
    rows: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    sides: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(map(len, self.texts))


class Shelf:
    """The groups of `run_dir`.

    Args:
        folder: where side files go; those of an earlier report are replaced.
        page_bytes, side_bytes: most bytes of texts in the page and in side files. Beyond the latter, the
            texts of the oldest groups stay in the ledger only.
    """

    def __init__(
        self, run_dir: Path, folder: Path, *, page_bytes: int = PAGE_BYTES, side_bytes: int = SIDE_BYTES
    ) -> None:
        self.run_dir, self.folder = run_dir, folder
        self.page_bytes, self.side_bytes = page_bytes, side_bytes
        self._records: dict[Key, _Record] = {}
        self.num_unread = 0

    def refresh(self, seconds: float = math.inf) -> None:
        """Reads new files of the ledger, the newest first, for about `seconds`; `num_unread` files remain."""
        found = dict(self._files())
        for key in self._records.keys() - found.keys():
            del self._records[key]
        old = {key: record.stamp for key, record in self._records.items()}
        todo = sorted((key for key, (_, stamp) in found.items() if old.get(key) != stamp), reverse=True)
        self.num_unread, begin = len(todo), time.monotonic()
        for key in todo:
            self._records[key] = _read(*found[key], key)
            self.num_unread -= 1
            self._make_room()
            if time.monotonic() - begin > seconds:
                return
        self._tidy()

    @property
    def faults(self) -> list[str]:
        """A sentence for each thing that could not be read."""
        return [show_controls(text) for _, record in sorted(self._records.items()) for text in record.faults]

    @property
    def has_side_files(self) -> bool:
        return any(record.sides for record in self._records.values())

    @property
    def num_groups(self) -> int:
        return sum(len(record.rows) for record in self._records.values())

    def records_json(self) -> str:
        """[kind, step, process, parts, rows] of the newest records, in the order of steps. `parts` counts the
        groups in each side file; it is null for texts in the page, and [] for texts that only the ledger has.
        """
        shown, room = [], MAX_ROWS
        for (step, kind, rank), record in sorted(self._records.items(), reverse=True):
            room -= len(record.rows)
            if record.rows and room >= 0:
                parts = "null" if record.texts else json.dumps(record.parts)
                shown.append(f'["{kind}",{step},{rank},{parts},[{",".join(record.rows)}]]')
        return f"[{','.join(reversed(shown))}]"

    def texts_json(self) -> str:
        """Record -> the texts of its groups, for those in the page."""
        held = ((key, record) for key, record in sorted(self._records.items()) if record.texts)
        return "{" + ",".join(f'"{_name(key)}":[{",".join(record.texts)}]' for key, record in held) + "}"

    def newest(self) -> list[Key]:
        """Files of the ledger, the newest first."""
        return sorted((key for key, _ in self._files()), reverse=True)

    def texts_of(self, keys: Collection[Key]) -> Iterator[tuple[Key, str, Any]]:
        """Each group of these files, in their order: its file, its prompt's id, and its texts."""
        files = dict(self._files())
        for key in filter(files.__contains__, keys):
            record = _read(*files[key], key)
            for row, text in zip(record.rows, record.texts, strict=True):
                yield key, json.loads(row)[0], json.loads(text)

    def _files(self) -> Iterator[tuple[Key, tuple[Path, tuple[int, int]]]]:
        for folder, kind in _FOLDERS.items():
            for path in (self.run_dir / folder).glob("step-*"):
                if match := _NAME.fullmatch(path.name):
                    with suppress(FileNotFoundError):
                        status = path.stat()
                        # The ledger counts steps from 0; curves and checks name a step by how many are done.
                        step = int(match[1]) + (kind == "t")
                        yield (step, kind, int(match[2])), (path, (status.st_mtime_ns, status.st_size))

    def _make_room(self) -> None:
        """Moves the oldest texts from memory to side files, and deletes the oldest of these."""
        held = sorted(key for key, record in self._records.items() if record.texts)
        size = sum(self._records[key].size for key in held)
        while held and size > self.page_bytes:
            size -= self._records[held[0]].size
            self._move(held.pop(0))
        kept = sum(sum(record.sides.values()) for record in self._records.values())
        for _, record in sorted(self._records.items()):
            if kept <= self.side_bytes:
                break
            kept -= sum(record.sides.values())
            record.sides, record.parts = {}, []

    def _move(self, key: Key) -> None:
        record = self._records[key]
        if self.folder.is_symlink() or self.folder.is_file():
            self.folder.unlink()  # a link made by others would lead our files elsewhere
        while record.texts:
            count, size = 0, 0
            while count < len(record.texts) and size < _PART_BYTES:
                size += len(record.texts[count])
                count += 1
            name = f"groups-{_name(key)}-{len(record.parts)}"
            texts = f"[{','.join(record.texts[:count])}]".encode("utf-8", "replace")
            packed = base64.b64encode(gzip.compress(texts, 6, mtime=0)).decode()
            with written_whole(self.folder / f"{name}.js") as file:
                file.write(f'cohortGroups("{name}","{packed}");\n'.encode())
            record.parts.append(count)
            record.sides[f"{name}.js"] = len(packed)
            del record.texts[:count]

    def _tidy(self) -> None:
        """Removes side files of earlier reports; a record whose side files are gone is read again later."""
        ours = {name for record in self._records.values() for name in record.sides}
        there = {p.name for p in self.folder.glob("groups-*") if not self.folder.is_symlink()}
        for name in there - ours:
            if _SIDE_NAME.fullmatch(name):
                (self.folder / name).unlink(missing_ok=True)
        if there and not ours:
            with suppress(OSError):
                self.folder.rmdir()
        for record in self._records.values():
            if record.sides.keys() - there:
                record.stamp = (0, 0)


def _name(key: Key) -> str:
    step, kind, rank = key
    return f"{kind}{step}-{rank}"


def _read(path: Path, stamp: tuple[int, int], key: Key) -> _Record:
    """A file's groups; `faults` says what cannot be read."""
    record, (step, kind, rank) = _Record(stamp), key
    most = max(MAX_GLANCE_BYTES, _MOST_UNPACKED * stamp[1])
    try:
        for part in each_group(path, record.faults, max_bytes=most):
            if (part.step + (kind == "t"), part.rank) != (step, rank):
                raise ValueError(f"it says step {part.step!r} and rank {part.rank!r}")
            for scored in part.groups:
                given = part.advantages[0] if part.advantages else None
                text, row = describe_group(scored, given), describe_row(scored, given)
                record.texts.append(json_for_html(text))
                record.rows.append(json_for_html(row))
    except (*DAMAGE, OSError) as error:
        record.faults.append(f"damaged ({brief(error)})")
    record.faults = [f"{path.name}: {fault}" for fault in record.faults]
    return record
