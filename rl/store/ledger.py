"""The record of every completion: one file per step and process, there whole or not at all.

`RUN/ledger/step-000012-rank0.jsonl.gz` holds a header line and one line per group, in UTF-8 JSON (a lone
surrogate is written as its three bytes, so that any Python string comes back). Behavior log-probs are base64
of little-endian float32, or float64 where one is no float32: exact, at half the time and size of decimals.

A run that was killed replays the steps recorded after its newest checkpoint instead of sampling them again.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rl.store.durable import fsync_path, gone, written_whole
from rl.store.ledger_lines import encode_group, encode_line
from rl.store.ledger_parse import DAMAGE, SCHEMA, LedgerStep, brief, glance, read_record
from rl.types import Advantage, ScoredGroup

_NAME = re.compile(r"step-(\d+)-rank(\d+)\.jsonl\.gz")
MAX_RANKS = 16


class Ledger:
    """The records of one run as process `rank` of `world_size` sees them: it writes its own and may read all.

    The folder is listed once, and a step costs the same however many there were.

    Attributes:
        damaged: one sentence per file that could not be read; such a file counts as absent.
        num_expected: steps of which an earlier process of this run left a record (`expect`).
    """

    def __init__(self, run_dir: str | Path, rank: int = 0, world_size: int = 1) -> None:
        self.folder = Path(run_dir) / "ledger"
        self.rank, self.world_size = rank, world_size
        self.damaged: list[str] = []
        self.num_expected = 0
        self._shares_gone: dict[int, list[int]] | None = None

    def expect(self, num_done: int = 0) -> int:
        """Finds out how many steps are recorded: by the files, and at least `num_done`, known otherwise."""
        self.num_expected = max([num_done, *(step + 1 for step in self.steps())])
        return self.num_expected

    def fault(self, step: int) -> str:
        """Why `read` found no record of a step that an earlier process left; empty if it left none."""
        if step >= self.num_expected:
            return ""
        name = self._path(step, self.rank).name
        return next((text for text in self.damaged if text.startswith(name)), f"{name}: missing")

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
    ) -> Path:
        """Records a step, in place of an earlier record of it. On disk when this returns.

        Rank 0 also removes the shares in this step of ranks that the run no longer has.

        Raises:
            ValueError: a number is not finite, a value is not JSON, or lengths disagree; nothing is written.
            OSError: the disk is full or fails; nothing is written.
            RuntimeError: the folder was taken away since the first write.
        """
        if advantages is not None and len(advantages) != len(groups):
            raise ValueError(f"step {step}: {len(advantages)} lists of advantages for {len(groups)} groups")
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
        path = self._path(step, self.rank)
        if self._shares_gone is None:
            self._shares_gone = self._shares_of_ranks_gone()
        elif not self.folder.is_dir():
            raise gone(self.folder)
        with written_whole(path) as file, gzip.GzipFile("", "wb", 1, file, mtime=0) as lines:
            lines.write(encode_line(header, f"step {step}"))
            for group, row in zip(groups, per_group, strict=True):
                lines.write(encode_group(group, step, {"kept": True, "advantages": row}))
            for group in rejected:
                lines.write(encode_group(group, step, {"kept": False, "advantages": None}))
        for rank in self._shares_gone.pop(step, ()):
            self._path(step, rank).unlink(missing_ok=True)
        return path

    def read(self, step: int) -> LedgerStep | None:
        """This process's record of `step`; None where there is none or it is damaged (see `damaged`).

        A record made by another number of processes counts as damaged, as it holds another share of the step:
        `read_all` gives all shares.
        """
        record = self._read(step, self.rank)
        if record is not None and record.world_size != self.world_size:
            name = self._path(step, self.rank).name
            self._report(f"{name}: recorded by {record.world_size} processes, this run has {self.world_size}")
            return None
        return record

    def read_all(self, step: int) -> list[LedgerStep] | None:
        """The records of all processes that took part in `step`, by rank; None unless all are whole."""
        records = [self._read(step, 0)]
        if records[0] is not None:
            records += [self._read(step, rank) for rank in range(1, records[0].world_size)]
        whole = [record for record in records if record is not None]
        return whole if len(whole) == len(records) else None

    def steps(self) -> list[int]:
        """Steps that this process has a record of, ascending; the files are not opened."""
        return sorted(step for step, rank in self._present() if rank == self.rank)

    def sampled_steps(self, max_steps: int) -> list[int]:
        """Up to `max_steps` of the recorded steps, of any process; evenly spread, first and last included."""
        steps = sorted({step for step, _ in self._present()})
        if len(steps) <= max_steps:
            return steps
        gaps = max(max_steps - 1, 1)
        return [steps[-1 - (len(steps) - 1) * i // gaps] for i in reversed(range(max_steps))]

    def sample(self, max_steps: int, max_groups: int | None = None) -> Iterator[LedgerStep]:
        """Records of all processes for the `sampled_steps`, one in memory at a time.

        Args:
            max_groups: of each step, for a reader of a run that may be somebody else's: no more than these
                are read, of at most `MAX_RANKS` processes, and one that is damaged or larger than
                `rl.store.ledger_parse` takes is left out by itself. Default: whole records only.
        """
        present, chosen = self._present(), self.sampled_steps(max_steps)
        ranks = {step: sorted(rank for s, rank in present if s == step) for step in chosen}
        for step in chosen:
            some = ranks[step] if max_groups is None else ranks[step][:MAX_RANKS]
            each = None if max_groups is None else -(-max_groups // len(some))
            for rank in some:
                if (record := self._read(step, rank, each)) is not None:
                    yield record

    def truncate_after(self, step: int) -> list[int]:
        """Removes this process's records of later steps and returns those steps.

        Rank 0 also removes those of ranks that this run no longer has.
        """
        doomed = [
            (later, rank)
            for later, rank in self._present()
            if later > step and (rank == self.rank or (self.rank == 0 and rank >= self.world_size))
        ]
        for later, rank in doomed:
            self._path(later, rank).unlink(missing_ok=True)
        if doomed:
            fsync_path(self.folder)
        return sorted({later for later, _ in doomed})

    def _path(self, step: int, rank: int) -> Path:
        return self.folder / f"step-{step:06d}-rank{rank}.jsonl.gz"

    def _shares_of_ranks_gone(self) -> dict[int, list[int]]:
        """Step -> ranks that this run no longer has; rank 0 alone removes what they left."""
        found: dict[int, list[int]] = {}
        for step, rank in self._present() if self.rank == 0 else ():
            if rank >= self.world_size:
                found.setdefault(step, []).append(rank)
        return found

    def _present(self) -> list[tuple[int, int]]:
        matches = (_NAME.fullmatch(path.name) for path in self.folder.glob("step-*"))
        return [(int(match[1]), int(match[2])) for match in matches if match]

    def _read(self, step: int, rank: int, max_groups: int | None = None) -> LedgerStep | None:
        path = self._path(step, rank)
        try:
            record, faults = read_record(path) if max_groups is None else glance(path, max_groups)
            if record.step != step or record.rank != rank:
                raise ValueError(f"it says step {record.step!r} and rank {record.rank!r}")
        except FileNotFoundError:
            return None
        except (*DAMAGE, OSError) as error:
            if max_groups is None and not isinstance(error, DAMAGE):
                raise
            self._report(f"{path.name}: damaged ({type(error).__name__}: {brief(error)})")
            return None
        for fault in faults:
            self._report(f"{path.name}: {fault}")
        return record

    def _report(self, sentence: str) -> None:
        if sentence not in self.damaged:
            self.damaged.append(sentence)
