"""The metric rows of a run by column, read in one pass; a number takes eight bytes."""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from rl.store.metrics import METRICS, OWN_NAME
from rl.store.safe_read import bounded_lines, is_number, open_regular

MAX_ROWS = 200_000  # of a longer file, the last ones are read
MAX_BYTES = 1 << 30
MAX_ROW_BYTES = 1 << 20
MAX_POINTS = 500  # of a curve
MAX_PARTS = 64
RECENT = 20  # rows for which a non-finite number counts against a run
Curve = list[list[float]]


class History:
    """Rows of numbers by step. What is not a number, or too large for arithmetic, counts as missing.

    Attributes:
        steps: the step of each row, ascending once `finish` was called.
        columns: name -> a value for each row, NaN where the row has none.
        left_out: why lines were left out -> how many.
    """

    def __init__(self, wanted: Callable[[str, int], bool]) -> None:
        self._wanted = wanted
        self.steps: array[int] = array("q")
        self.columns: dict[str, array[float]] = {}
        self._last: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self.left_out: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, row: Any) -> None:
        """Adds a row of a file; one that is not an object with an integer step is only counted."""
        step = row.get("step") if isinstance(row, dict) else None
        if type(step) is not int or not 0 <= step < 1 << 53:
            self.left_out["without a step"] += 1
            return
        index = len(self.steps)
        self.steps.append(step)
        for name, value in row.items():
            if (column := self.columns.get(name)) is None:
                if name == "step" or not self._wanted(name, len(self.columns)):
                    continue
                column = self.columns[name] = array("d")
            if is_number(value):
                column.extend([math.nan] * (index - len(column)))
                column.append(value)
        self._last.append(row)
        if len(self.steps) >= 2 * MAX_ROWS:
            self._keep_last()

    @property
    def recent(self) -> list[dict[str, Any]]:
        """The last rows of the file as dicts; `nonfinite` names what was not a finite number in them."""
        rows = []
        for row in self._last:
            lost = row.get("nonfinite")
            names = [name for name in lost if isinstance(name, str)] if isinstance(lost, list) else []
            numbers = {name: row[name] for name in ("step", *self.columns) if is_number(row.get(name))}
            rows.append({**numbers, **({"nonfinite": names[:MAX_PARTS]} if names else {})})
        return rows

    def finish(self) -> None:
        """Makes all columns equally long and sorts the rows by step."""
        self._keep_last()
        for column in self.columns.values():
            column.extend([math.nan] * (len(self.steps) - len(column)))
        order = sorted(range(len(self.steps)), key=self.steps.__getitem__)
        if order != list(range(len(order))):
            self.steps = array("q", [self.steps[i] for i in order])
            self.columns = {n: array("d", [c[i] for i in order]) for n, c in self.columns.items()}

    def _keep_last(self) -> None:
        if (extra := len(self.steps) - MAX_ROWS) > 0:
            for column in (self.steps, *self.columns.values()):
                del column[:extra]

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of every row that has the metric."""
        values = self.columns.get(name, ())
        return [(step, value) for step, value in zip(self.steps, values, strict=False) if value == value]

    def curves(self, limit: int = MAX_POINTS) -> dict[str, Curve]:
        """Each metric as [steps, values], of at most `limit` points. In a long run, a point is the mean of
        consecutive rows at their last step; absent seconds are 0. Two more lists hold minima and maxima.
        """
        size = math.ceil(len(self) / limit) or 1
        curves: dict[str, Curve] = {n: [[] for _ in range(2 if size == 1 else 4)] for n in self.columns}
        for begin in range(0, len(self), size):
            step = self.steps[min(begin + size, len(self)) - 1]
            for name, column in self.columns.items():
                rows = column[begin : begin + size]
                if values := [value for value in rows if value == value]:
                    values += [0.0] * (len(rows) - len(values)) * name.startswith("time/")
                    numbers = (float(f"{value:.6g}") for value in (fmean(values), min(values), max(values)))
                    for part, number in zip(curves[name], (step, *numbers), strict=False):
                        part.append(number)
        return {name: curve for name, curve in curves.items() if curve[0]}


def read_history(path: Path, wanted: Callable[[str, int], bool] | None = None) -> History:
    """The rows of a JSON-lines file; a torn last line, as a killed run leaves it, is not a fault.

    Raises:
        OSError: it cannot be read. A missing file has no rows.
    """
    history = History(wanted or is_shown)
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - MAX_BYTES))
            if size > MAX_BYTES:
                file.readline(MAX_BYTES)
            for row in _rows(bounded_lines(file, MAX_ROW_BYTES), history.left_out):
                history.add(row)
    except FileNotFoundError:
        pass
    history.finish()
    return history


def _rows(lines: Iterator[bytes | None], left_out: Counter[str]) -> Iterator[Any]:
    is_torn = False
    for line in lines:
        left_out["not JSON"] += is_torn
        is_torn = False
        if line is None:
            left_out["too long"] += 1
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            is_torn = bool(line.strip())


def is_own(name: str) -> bool:
    """Whether this can be the name of a metric that a run has besides `METRICS`."""
    is_known = name in METRICS or name.startswith("reward/")
    return not is_known and len(name) <= 200 and OWN_NAME.fullmatch(name) is not None


def is_shown(name: str, num_known: int) -> bool:
    """Whether a report shows a metric of that name: a known one, or one of the run's own, up to a limit."""
    if name in METRICS:
        return True
    is_part = name.startswith("reward/") and name.endswith(("/mean", "/std")) and len(name) <= 200
    return (is_part or is_own(name)) and num_known < len(METRICS) + MAX_PARTS
