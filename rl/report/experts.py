"""The load of a mixture's experts at a few steps of a run, for the page to draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rl.store.rows import read_rows
from rl.store.safe_read import is_number

_MAX_MAPS = 6
_MAX_CELLS = 1 << 16


def expert_loads(path: Path) -> list[dict[str, Any]]:
    """{"step", "load"} of `experts.jsonl` at some steps: per cent of an even load, by layer and expert.

    Malformed rows are left out.
    """
    try:
        rows = [row for row in read_rows(path) if _is_map(row.get("load"))]
    except OSError:
        return []
    last = len(rows) - 1
    kept = sorted({round(i * last / (_MAX_MAPS - 1)) for i in range(_MAX_MAPS)}) if rows else []
    return [{"step": rows[i]["step"], "load": rows[i]["load"]} for i in kept]


def _is_map(load: Any) -> bool:
    if not isinstance(load, list) or not load or not all(isinstance(row, list) for row in load):
        return False
    widths = {len(row) for row in load}
    fits = len(widths) == 1 and 0 < len(load) * min(widths) <= _MAX_CELLS
    return fits and all(is_number(value) for row in load for value in row)
