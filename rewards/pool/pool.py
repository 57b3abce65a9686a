"""Grades groups in killable processes: `RewardPool` is the `Scorer` of a run.

Answers come in any order. If a grader hangs, crashes, raises or returns nonsense, only the completion that
caused it is affected: it abstains, and the fault is counted. `rewards` says what one call covers.
"""

from __future__ import annotations

import difflib
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewards.answers import Fault
from rewards.compose import RewardSpec, check_specs
from rewards.plugins import RewardFunction, import_path
from rewards.pool.graders import START_S, Graders
from rewards.pool.ticket import Grading, Ticket, is_json
from rl.types import Group, Prompt, ScoredGroup

NUM_EXAMPLES = 5


@dataclass
class Faults:
    """The faults of graders since the last `take_faults`.

    Attributes:
        num_graded: completions graded, without aborted ones.
        num_faulty: those of them for which at least one reward failed.
        counts: calls by kind: timeout, crash, memory, raised, bad_value, infra_error (the reward's own).
        examples: the last few, one line each.
    """

    num_graded: int = 0
    num_faulty: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: deque[str] = field(default_factory=lambda: deque(maxlen=NUM_EXAMPLES))

    @property
    def share(self) -> float:
        return self.num_faulty / self.num_graded if self.num_graded else 0.0

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.counts.most_common()) or "none"
        head = f"graders failed on {self.num_faulty} of {self.num_graded} completions ({kinds})"
        return "\n  ".join([head, *self.examples])


class RewardPool:
    """Grades with several rewards and composes them (`rewards.compose.compose`).

    Start it before loading a model. It raises for wrong names and options, `check_columns` for columns.
    """

    def __init__(
        self,
        specs: Sequence[RewardSpec | str | Callable[..., Any]],
        *,
        workers: int = 1,
        deadline_s: float = 10.0,
        memory_bytes: int = 2 << 30,
        num_steps: int = -1,
        log: Path | None = None,
    ) -> None:
        """
        Args:
            specs: specs, names, or functions that another process can import.
            workers: grader processes.
            deadline_s: wall-clock seconds per completion of a call; then the grader is killed. A reward with
                a longer deadline of its own (`code`) gets that one.
            memory_bytes: address space that a grader may use beyond what loading the rewards used.
            num_steps: steps of the run; -1: unknown. Functions see it as TRL's `trainer_state.max_steps`.
            log: file for the output of rewards, of at most 8 MiB.

        Raises:
            ValueError: a reward cannot be found, imported or configured, or the gates are wrong.
            RuntimeError: the grader processes do not start.
        """
        self.specs = [_spec(spec) for spec in specs]
        check_specs(self.specs)
        if workers < 1 or not deadline_s > 0 or memory_bytes < 1:
            raise ValueError(
                f"workers={workers}, deadline_s={deadline_s}, memory_bytes={memory_bytes} must be positive; "
                "1, 10.0 and 2 << 30 are usual"
            )
        self.deadline_s = deadline_s
        self.faults = Faults()
        self._lock = threading.Lock()
        hello = {
            "specs": [
                {"name": spec.name, "options": dict(spec.options), "origin": spec.origin}
                for spec in self.specs
            ],
            "memory_bytes": memory_bytes,
            "num_steps": num_steps,
        }
        self._graders = Graders(hello, workers, log)
        try:
            self.asks = [RewardFunction(**asks) for asks in self._graders.loaded()]
        except BaseException:
            self.close()
            raise
        self._grading = Grading(self.specs, self.asks, self._graders, deadline_s, self._count)

    def required_columns(self) -> set[str]:
        """Columns without which at least one reward cannot be called."""
        return {column for asks in self.asks for column in asks.required}

    def check_columns(self, available: Collection[str], row: Mapping[str, Any] | None = None) -> None:
        """Checks a dataset before anything is sampled from it; `row` is one example.

        Raises:
            ValueError: a column that a reward needs is missing, or holds something that is not a JSON value.
        """
        for asks in self.asks:
            for column in asks.required:
                if column not in available:
                    near = difflib.get_close_matches(column, available, n=1, cutoff=0.5)
                    hint = f"; did you mean to rename {near[0]!r}?" if near else ""
                    have = ", ".join(sorted(available)) or "none"
                    lacks = f"reward {asks.name!r} needs the column {column!r}"
                    raise ValueError(f"{lacks}; the dataset has: {have}{hint}")
            for column, value in asks.pick(row or {}).items():
                if not is_json(value) and not (asks.takes_any and column not in asks.required):
                    raise ValueError(
                        f"reward {asks.name!r}: column {column!r} holds {type(value).__name__}, and graders "
                        "get JSON values only (text, numbers, booleans, lists, dicts); convert it"
                    )

    def submit(self, group: Group) -> Future[ScoredGroup]:
        """Starts grading a group; the future ends when every reward has answered or abstained."""
        return Ticket(self._grading, group).start()

    def score(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        """Rewards for every completion, in order. A bad sample abstains; deadlines bound the wait.

        Raises:
            TimeoutError: no answer came within four times the sum of all deadlines, which is a bug.
        """
        futures = [self.submit(group) for group in groups]
        num_calls = len(self.specs) * sum(len(group.completions) for group in groups)
        longest_s = max(self.deadline_s, *(asks.time_limit_s for asks in self.asks))
        limit_s = 4 * (longest_s + START_S) * (num_calls + 1)
        return [future.result(timeout=limit_s) for future in futures]

    def take_faults(self) -> Faults:
        """The faults since the last call, for the metrics of a step; resets the counters."""
        with self._lock:
            taken, self.faults = self.faults, Faults()
        return taken

    def pids(self) -> list[int]:
        """Process ids of the living graders."""
        return self._graders.pids()

    def close(self) -> None:
        """Ends all graders; safe to call twice."""
        self._graders.close()

    def _count(self, prompt: Prompt, faults: Mapping[str, Fault]) -> None:
        """Counts one graded completion; `faults` maps each reward that failed on it to kind and detail."""
        with self._lock:
            self.faults.num_graded += 1
            self.faults.num_faulty += bool(faults)
            for name, (kind, detail) in faults.items():
                self.faults.counts[kind] += 1
                self.faults.examples.append(f"{name} on {prompt.id}: {kind}: {detail}")


def _spec(spec: RewardSpec | str | Callable[..., Any]) -> RewardSpec:
    if isinstance(spec, RewardSpec):
        return spec
    return RewardSpec(spec if isinstance(spec, str) else import_path(spec))
