"""The record of every completion: one file per step and process, there whole or not at all.

`RUN/ledger/step-000012-rank0.jsonl.gz` holds a header line and one line per group, in UTF-8 JSON (a lone
surrogate is written as its three bytes, so that any Python string comes back). Behavior log-probs are base64
of little-endian float32, or float64 where one is no float32: exact, at half the time and size of decimals.

A run that was killed replays the steps recorded after its newest checkpoint instead of sampling them again.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rl.durable import fsync_path, written_whole
from rl.types import Completion, Group, Prompt, Reason, Reward, ScoredGroup, Trace, VersionSpan

SCHEMA = 1
_NAME = re.compile(r"step-(\d+)-rank(\d+)\.jsonl\.gz")
_DAMAGE = (gzip.BadGzipFile, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True, slots=True)
class LedgerStep:
    """What one process consumed in one step.

    Attributes:
        cursor_before, cursor_after: the source's cursor around the step, as it was given.
        policy_version: of the weights the step began with; a completion's own versions are in its spans.
        groups: what was trained on.
        rejected: what the source sampled and threw away.
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
    advantages: list[list[float]] | None = None
    counts: dict[str, float] = field(default_factory=dict)


class Ledger:
    """The records of one run as process `rank` of `world_size` sees them: it writes its own and may read all.

    `damaged` collects one sentence per file that could not be read; such a file counts as absent.
    """

    def __init__(self, run_dir: str | Path, rank: int = 0, world_size: int = 1) -> None:
        self.folder = Path(run_dir) / "ledger"
        self.rank, self.world_size = rank, world_size
        self.damaged: list[str] = []

    def write(
        self,
        step: int,
        groups: Sequence[ScoredGroup],
        *,
        cursor_before: Any,
        cursor_after: Any,
        policy_version: int,
        rejected: Sequence[ScoredGroup] = (),
        advantages: Sequence[Sequence[float]] | None = None,
        counts: Mapping[str, float] | None = None,
    ) -> Path:
        """Records a step, in place of an earlier record of it. On disk when this returns.

        Rank 0 also removes the shares in this step of ranks that the run no longer has.

        Raises:
            ValueError: a number is not finite, a value is not JSON, or lengths disagree; nothing is written.
            OSError: the disk is full or fails; nothing is written.
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
        with written_whole(path) as file, gzip.GzipFile("", "wb", 1, file, mtime=0) as lines:
            lines.write(_line(header, f"step {step}"))
            for group, row in zip(groups, per_group, strict=True):
                lines.write(_group_line(group, step, {"kept": True, "advantages": row}))
            for group in rejected:
                lines.write(_group_line(group, step, {"kept": False, "advantages": None}))
        if self.rank == 0:
            for rank in [r for s, r in self._present() if s == step and r >= self.world_size]:
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

    def sample(self, max_steps: int) -> Iterator[LedgerStep]:
        """Records of all processes for up to `max_steps` steps, evenly spread, first and last included.

        Damaged ones are left out. One step is in memory at a time.
        """
        present = sorted(self._present())
        steps = sorted({step for step, _ in present})
        if len(steps) > max_steps:
            gaps = max(max_steps - 1, 1)
            steps = [steps[-1 - (len(steps) - 1) * i // gaps] for i in reversed(range(max_steps))]
        for step in steps:
            for rank in [rank for present_step, rank in present if present_step == step]:
                if (record := self._read(step, rank)) is not None:
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

    def _present(self) -> list[tuple[int, int]]:
        matches = (_NAME.fullmatch(path.name) for path in self.folder.glob("step-*"))
        return [(int(match[1]), int(match[2])) for match in matches if match]

    def _read(self, step: int, rank: int) -> LedgerStep | None:
        path = self._path(step, rank)
        try:
            with gzip.open(path) as file:
                header, *rows = file.read().removesuffix(b"\n").split(b"\n")
            return _parse(json.loads(header), [json.loads(row) for row in rows])
        except FileNotFoundError:
            return None
        except _DAMAGE as error:
            self._report(f"{path.name}: damaged ({type(error).__name__}: {error})")
            return None

    def _report(self, sentence: str) -> None:
        if sentence not in self.damaged:
            self.damaged.append(sentence)


def _line(value: Any, where: str) -> bytes:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"ledger, {where}: {error}; prompts, columns and cursors hold JSON values only: finite numbers, "
            "strings, lists, dicts, None (convert arrays with .tolist(), dates with .isoformat())"
        ) from None
    return text.encode("utf-8", "surrogatepass") + b"\n"


def _group_line(scored: ScoredGroup, step: int, extra: dict[str, Any]) -> bytes:
    prompt, completions, rewards = scored.prompt, scored.completions, scored.rewards
    where = f"step {step}, prompt {prompt.id!r}"
    if len(rewards) != len(completions):
        raise ValueError(f"ledger, {where}: {len(rewards)} rewards for {len(completions)} completions")
    for number in extra["advantages"] or ():
        _require_finite(number, f"{where}: advantages")
    row = {
        **extra,
        "prompt": {
            "id": prompt.id,
            "text": prompt.text,
            "token_ids": prompt.token_ids,
            "messages": [dict(message) for message in prompt.messages],
            "columns": dict(prompt.columns),
        },
        "completions": [
            _completion_row(completion, reward, f"{where}, completion {i}")
            for i, (completion, reward) in enumerate(zip(completions, rewards, strict=True))
        ],
    }
    return _line(row, where)


def _completion_row(completion: Completion, reward: Reward, where: str) -> dict[str, Any]:
    for name, number in (("score", reward.score), *reward.parts.items()):
        _require_finite(number, f"{where}: reward {name}")
    # Masks are all true but where a tool answered; a string of 0 and 1 packs well in that case.
    chosen = all(completion.loss_mask) and len(completion.loss_mask) == len(completion.token_ids)
    return {
        "token_ids": completion.token_ids,
        "behavior_logprobs": _pack_floats(completion.behavior_logprobs, where),
        "loss_mask": chosen or "".join("01"[bool(flag)] for flag in completion.loss_mask),
        "finish_reason": completion.finish_reason,
        "version_spans": [[span.policy_version, span.num_tokens] for span in completion.version_spans],
        "text": completion.text,
        "routes": _pack_routes(completion.routes),
        **({} if completion.trace is None else {"trace": asdict(completion.trace)}),
        "reward": {
            "score": reward.score,
            "reason": str(reward.reason),
            "detail": reward.detail,
            "extracted": reward.extracted,
            "elapsed_ms": reward.elapsed_ms,
            "parts": dict(reward.parts),
        },
    }


def _require_finite(number: float | None, where: str) -> None:
    if number is not None and not math.isfinite(number):
        raise ValueError(
            f"ledger, {where} is {number}; graders and advantages give finite numbers or abstain"
        )


def _pack_floats(values: Sequence[float], where: str) -> dict[str, str]:
    exact = np.asarray(values, dtype="<f8")
    if not np.isfinite(exact).all():
        at = int(np.flatnonzero(~np.isfinite(exact))[0])
        raise ValueError(
            f"ledger, {where}: behavior_logprobs[{at}] is {values[at]}; a sampled token has a finite one, "
            "so the engine's weights or its sampling parameters are broken"
        )
    with np.errstate(over="ignore"):
        single = exact.astype("<f4")
    dtype, array = ("<f4", single) if (single == exact).all() else ("<f8", exact)
    return {"dtype": dtype, "base64": base64.b64encode(array.tobytes()).decode()}


def _pack_routes(routes: Any) -> Any:
    if routes is None or isinstance(routes, list):
        return routes
    array = np.ascontiguousarray(routes)
    return {
        "dtype": array.dtype.newbyteorder("<").str,
        "shape": array.shape,
        "base64": base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode(),
    }


def _unpack(packed: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed["base64"], validate=True), dtype=packed["dtype"])


def _parse(header: dict[str, Any], rows: list[dict[str, Any]]) -> LedgerStep:
    """Raises one of `_DAMAGE` if this is no whole record."""
    if header["schema"] != SCHEMA:
        raise ValueError(f"schema {header['schema']!r}, this version of cohort reads {SCHEMA}")
    if header["rows"] != len(rows):
        raise ValueError(f"{len(rows)} rows, the header says {header['rows']}")
    return LedgerStep(
        step=header["step"],
        rank=header["rank"],
        world_size=header["world_size"],
        policy_version=header["policy_version"],
        cursor_before=header["cursor_before"],
        cursor_after=header["cursor_after"],
        groups=[_parse_group(row) for row in rows if row["kept"]],
        rejected=[_parse_group(row) for row in rows if not row["kept"]],
        advantages=[row["advantages"] for row in rows if row["kept"]] if header["has_advantages"] else None,
        counts=header["counts"],
    )


def _parse_group(row: dict[str, Any]) -> ScoredGroup:
    prompt = Prompt(
        id=row["prompt"]["id"],
        text=row["prompt"]["text"],
        token_ids=tuple(row["prompt"]["token_ids"]),
        messages=tuple(row["prompt"]["messages"]),
        columns=row["prompt"]["columns"],
    )
    completions = [_parse_completion(entry) for entry in row["completions"]]
    rewards = [Reward(**{**e["reward"], "reason": Reason(e["reward"]["reason"])}) for e in row["completions"]]
    return ScoredGroup(Group(prompt, completions), rewards)


def _parse_completion(entry: dict[str, Any]) -> Completion:
    mask, routes = entry["loss_mask"], entry["routes"]
    return Completion(
        token_ids=entry["token_ids"],
        behavior_logprobs=_unpack(entry["behavior_logprobs"]).astype(np.float64).tolist(),
        loss_mask=[True] * len(entry["token_ids"]) if mask is True else [flag == "1" for flag in mask],
        finish_reason=entry["finish_reason"],
        version_spans=[VersionSpan(version, count) for version, count in entry["version_spans"]],
        text=entry["text"],
        routes=_unpack(routes).reshape(routes["shape"]) if isinstance(routes, dict) else routes,
        trace=Trace(**entry["trace"]) if "trace" in entry else None,
    )
