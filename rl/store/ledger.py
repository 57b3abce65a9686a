"""The record of every completion: one file per step and process, which is whole or absent.

`RUN/ledger/step-000012-rank0.jsonl.gz` holds a header line and one line per group (`rl.store.ledger_lines`).
A run that was killed replays the steps recorded after its newest checkpoint instead of sampling them again.

A file may come from somebody else, so reading is bounded before anything is decompressed: a kilobyte of gzip
can hold a megabyte.
"""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from gzip import BadGzipFile, GzipFile
from pathlib import Path
from typing import Any

from rl.store.durable import gone, written_whole
from rl.store.ledger_lines import checked, decode_advantages, decode_group, encode_group, encode_line
from rl.store.safe_read import bounded_lines, open_regular
from rl.types import Advantage, ScoredGroup

SCHEMA = 2  # 1, which is read too, has neither segments, facts, continuations nor rewards per turn
MAX_RECORD_BYTES = 4 << 30  # of a decompressed record that is read whole
MAX_GLANCE_BYTES = 16 << 20  # of a decompressed record, if only some of its groups are shown
MAX_GROUP_BYTES = 16 << 20  # of a group that is shown: a million tokens
MAX_PARTS = 1_000_000  # lists and dicts of a group that is shown: the smallest takes 72 bytes, 2 in JSON
MAX_BAD = 24  # damaged groups of a file, after which the rest is left out
DAMAGE = (BadGzipFile, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError, RecursionError)
_NAME = re.compile(r"step-(\d+)-rank(\d+)\.jsonl\.gz")
_HEADER = dict.fromkeys(("step", "rank", "world_size", "policy_version"), int) | {"counts": dict}


@dataclass(frozen=True, slots=True)
class LedgerStep:
    """What one process consumed in one step.

    Attributes:
        cursor_before, cursor_after: the source's cursor before and after the step.
        policy_version: of the weights the step began with; a completion's own versions are in its spans.
        groups: groups that were trained on.
        rejected: groups that the source sampled and threw away.
        advantages: per group of `groups`, one per completion; None if they were not recorded.
        counts: what the source counted while it sampled.
    """

    step: int
    rank: int
    world_size: int
    policy_version: int
    cursor_before: Any
    cursor_after: Any
    groups: list[ScoredGroup]
    rejected: list[ScoredGroup] = field(default_factory=list)
    advantages: list[list[Advantage]] | None = None
    counts: dict[str, float] = field(default_factory=dict)


class Ledger:
    """The records of one run for process `rank` of `world_size`, which writes its own and may read all.

    Attributes:
        damaged: one sentence per file that could not be read; such a file counts as absent.
        num_expected: steps that an earlier process of this run recorded (`expect`).
    """

    def __init__(
        self, run_dir: str | Path, rank: int = 0, world_size: int = 1, *, folder: str = "ledger"
    ) -> None:
        self.folder = Path(run_dir) / folder
        self.rank, self.world_size = rank, world_size
        self.damaged: list[str] = []
        self.num_expected = 0
        self._ranks_gone: set[int] | None = None
        self._thread, self._begun = ThreadPoolExecutor(1, "ledger"), list[Future[Path]]()

    def expect(self, num_done: int = 0) -> int:
        """Sets and returns `num_expected`: steps recorded by the files, and at least `num_done`."""
        self.num_expected = max([num_done, *(step + 1 for step in self.steps())])
        return self.num_expected

    def fault(self, step: int) -> str:
        """Why `read` found no record of a step that an earlier process left; empty if it left none."""
        if step >= self.num_expected:
            return ""
        name = self._path(step, self.rank).name
        return next((text for text in self.damaged if text.startswith(name)), f"{name}: missing")

    def begin(self, step: int, groups: Sequence[ScoredGroup], **more: Any) -> None:
        """Does as `write`, beside the caller, who changes no group until `settle`."""
        self._begun.append(self._thread.submit(self.write, step, groups, **more))

    def settle(self) -> None:
        """Waits until what was begun is on disk; raises what `write` raised."""
        while self._begun:
            self._begun.pop(0).result()

    def write(
        self,
        step: int,
        groups: Sequence[ScoredGroup],
        *,
        cursor_before: Any,
        cursor_after: Any,
        policy_version: int,
        rejected: Sequence[ScoredGroup] = (),
        advantages: Sequence[Sequence[Advantage]] | None = None,
        counts: Mapping[str, float] | None = None,
        trained_by: Sequence[int] | None = None,
    ) -> Path:
        """Records a step, replacing an earlier record of it. The record is on disk when this returns.

        Rank 0 also removes this step's records of ranks that the run no longer has.

        Raises:
            ValueError: a number is not finite, or a value is not JSON; nothing is written.
            OSError: the disk is full or fails; nothing is written.
            RuntimeError: the folder was removed since the first write.
        """
        assert advantages is None or len(advantages) == len(groups), "each group has a list of advantages"
        header = {
            "schema": SCHEMA,
            "step": step,
            "rank": self.rank,
            "world_size": self.world_size,
            "policy_version": policy_version,
            "cursor_before": cursor_before,
            "cursor_after": cursor_after,
            "rows": len(groups) + len(rejected),
            "has_advantages": advantages is not None,
            "counts": dict(counts or {}),
        }
        per_group = [None] * len(groups) if advantages is None else [list(row) for row in advantages]
        owners = [{} if trained_by is None else {"trained_by": rank} for rank in trained_by or groups]
        path = self._path(step, self.rank)
        if self._ranks_gone is None:
            known = {rank for ranks in self.recorded().values() for rank in ranks}
            self._ranks_gone = {rank for rank in known if rank >= self.world_size}
        elif not self.folder.is_dir():
            raise gone(self.folder)
        with written_whole(path) as file, GzipFile("", "wb", 1, file, mtime=0) as lines:
            lines.write(encode_line(header, f"step {step}"))
            for group, row, owner in zip(groups, per_group, owners, strict=True):
                lines.write(encode_group(group, step, {"kept": True, "advantages": row, **owner}))
            for group in rejected:
                lines.write(encode_group(group, step, {"kept": False, "advantages": None}))
        for rank in self._ranks_gone if self.rank == 0 else ():
            self._path(step, rank).unlink(missing_ok=True)
        return path

    def read(self, step: int) -> LedgerStep | None:
        """This process's record of `step`; None if there is none or it is damaged (see `damaged`).

        Records of another number of processes are dealt out again; `world_size` stays the recorded one.
        """
        own = self._read(step, self.rank)
        if own is not None and own.world_size == self.world_size:
            return own
        first = own if self.rank == 0 else self._read(step, 0)
        if first is None or first.world_size == self.world_size:
            return None
        if (records := self.read_all(step)) is not None:
            return _dealt(records, self.rank, self.world_size)
        name = self._path(step, self.rank).name
        self._report(f"{name}: not all {first.world_size} processes' records of that step are whole")

    def read_all(self, step: int) -> list[LedgerStep] | None:
        """The records of all processes that took part in `step`, by rank; None unless all are whole."""
        records = [self._read(step, 0)]
        if records[0] is not None:
            records += [self._read(step, rank) for rank in range(1, records[0].world_size)]
        whole = [record for record in records if record is not None]
        return whole if len(whole) == len(records) else None

    def steps(self) -> list[int]:
        """Steps that this process has a record of, ascending; the files are not opened."""
        return [step for step, ranks in self.recorded().items() if self.rank in ranks]

    def sample(self, max_steps: int) -> Iterator[LedgerStep]:
        """Yields whole records of all processes for `max_steps` recorded steps: first, last, and between."""
        recorded = self.recorded()
        steps, gaps = [*recorded], max(max_steps - 1, 1)
        if len(steps) > max_steps:
            steps = [steps[-1 - (len(steps) - 1) * i // gaps] for i in reversed(range(max_steps))]
        records = (self._read(step, rank) for step in steps for rank in recorded[step])
        yield from (record for record in records if record is not None)

    def glance(self, step: int, rank: int) -> Iterator[ScoredGroup]:
        """The groups of a record that were trained on, without expert routes, one at a time, for a reader of
        a run that may be somebody else's. A group that is damaged or too large is left out by itself.
        """
        path, faults = self._path(step, rank), list[str]()
        try:
            for part in each_group(path, faults, max_bytes=MAX_GLANCE_BYTES):
                if (part.step, part.rank) != (step, rank):
                    raise ValueError(f"it says step {part.step!r} and rank {part.rank!r}")
                yield from part.groups
        except FileNotFoundError:
            return
        except (*DAMAGE, OSError) as error:
            faults.append(f"damaged ({brief(error)})")
        for fault in faults:
            self._report(f"{path.name}: {fault}")

    def recorded(self) -> dict[int, list[int]]:
        """Step -> the processes that have a record of it, both ascending; the files are not opened."""
        found: dict[int, list[int]] = {}
        matches = (_NAME.fullmatch(path.name) for path in self.folder.glob("step-*"))
        for step, rank in sorted((int(match[1]), int(match[2])) for match in matches if match):
            found.setdefault(step, []).append(rank)
        return found

    def _path(self, step: int, rank: int) -> Path:
        return self.folder / f"step-{step:06d}-rank{rank}.jsonl.gz"

    def _read(self, step: int, rank: int) -> LedgerStep | None:
        path = self._path(step, rank)
        try:
            record = _whole(path)
            if record.step != step or record.rank != rank:
                raise ValueError(f"it says step {record.step!r} and rank {record.rank!r}")
            return record
        except FileNotFoundError:
            return None
        except DAMAGE as error:
            self._report(f"{path.name}: damaged ({brief(error)})")
            return None

    def _report(self, sentence: str) -> None:
        if sentence not in self.damaged:
            self.damaged.append(sentence)


def _whole(path: Path) -> LedgerStep:
    """The whole record.

    Raises:
        one of DAMAGE: a part of it is missing, has another type or is too large.
    """
    with open_regular(path) as raw, GzipFile(fileobj=raw) as file:
        data = file.read(MAX_RECORD_BYTES + 1)
    if len(data) > MAX_RECORD_BYTES:
        raise ValueError(f"more than {MAX_RECORD_BYTES >> 30} GiB when decompressed")
    first, *lines = data.removesuffix(b"\n").split(b"\n")
    record, num_rows = _header(first)
    if num_rows != len(lines):
        raise ValueError(f"{len(lines)} rows, the header says {num_rows}")
    for row in map(json.loads, lines):
        if _is_kept(row):
            _add(record, row)
        else:
            record.rejected.append(decode_group(row))
    return record


def each_group(path: Path, faults: list[str], *, max_bytes: int) -> Iterator[LedgerStep]:
    """Yields the record without groups, then with one trained group at a time, without its expert routes.
    `faults` receives what was left out. No more than about `max_bytes` are decompressed.

    Raises:
        one of DAMAGE: not even the header can be read.
    """
    bad: Counter[str] = Counter()
    room, num = max_bytes, 0
    with open_regular(path) as raw, GzipFile(fileobj=raw) as file:
        lines = bounded_lines(file, MAX_GROUP_BYTES)
        record, num_rows = _header(_bounded(next(lines, b"")))
        yield record
        try:
            while room > 0 and bad.total() < MAX_BAD and (line := _bounded(next(lines, b""))):
                room -= len(line)
                part = replace(record, groups=[], advantages=None if record.advantages is None else [])
                try:
                    if line.count(b"[") + line.count(b"{") > MAX_PARTS:
                        raise ValueError(f"more than {MAX_PARTS:,} lists and objects")
                    if not _is_kept(row := json.loads(line)):
                        break  # groups that the source threw away come last
                    _add(part, row, with_routes=False)
                except DAMAGE as error:
                    bad[brief(error)] += 1
                    continue
                num += 1
                yield part
        except DAMAGE as error:
            faults.append(f"damaged after {num} groups ({brief(error)})")
    faults += [f"{n} of its groups left out ({why})" for why, n in bad.most_common(3)]
    if room <= 0 and num + bad.total() < num_rows:
        faults.append(f"groups after the first {num} left out (more than {max_bytes >> 20} MiB)")


def _dealt(records: Sequence[LedgerStep], rank: int, size: int) -> LedgerStep | None:
    """The share of one of `size` processes in the records of others; None if these are of different tries.

    Groups are dealt round-robin, as prompts are: a minibatch then holds the same ones, whoever trains them.
    """
    first, own = records[0], slice(rank, None, size)
    if any((r.cursor_before, r.world_size) != (first.cursor_before, len(records)) for r in records):
        return None
    totals = {name: sum(r.counts[name] for r in records) for name in first.counts}
    return replace(
        first,
        rank=rank,
        groups=_round([r.groups for r in records])[own],
        rejected=_round([r.rejected for r in records])[own],
        advantages=None if first.advantages is None else _round([r.advantages or [] for r in records])[own],
        counts=totals if rank == 0 else dict.fromkeys(totals, 0.0),  # they are summed over processes
    )


def _round(hands: Sequence[Sequence[Any]]) -> list[Any]:
    """The first of each hand, then the second of each, and so on."""
    return [hand[i] for i in range(max(map(len, hands))) for hand in hands if i < len(hand)]


def brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


def _bounded(line: bytes | None) -> bytes:
    if line is None:
        raise ValueError(f"a line of more than {MAX_GROUP_BYTES >> 20} MiB")
    return line


def _header(line: bytes) -> tuple[LedgerStep, int]:
    """A record without its groups, and how many rows it has."""
    header = json.loads(line)
    if header["schema"] not in (1, SCHEMA):
        raise ValueError(f"schema {header['schema']!r}, this version of cohort reads 1 and {SCHEMA}")
    advantages = [] if header["has_advantages"] else None
    cursors = {name: header[name] for name in ("cursor_before", "cursor_after")}
    record = LedgerStep(**checked(header, _HEADER), **cursors, groups=[], advantages=advantages)
    return record, checked(header, {"rows": int})["rows"]


def _is_kept(row: dict[str, Any]) -> bool:
    return checked(row, {"kept": bool})["kept"]


def _add(record: LedgerStep, row: dict[str, Any], *, with_routes: bool = True) -> None:
    group = decode_group(row, with_routes=with_routes)
    if record.advantages is not None:
        record.advantages.append(decode_advantages(row))
    record.groups.append(group)
