"""Several runs on one page: verdicts, results, the settings that differ, and curves on top of each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rl.config.read import flatten
from rl.report.figures import overlays
from rl.report.groups import json_for_html
from rl.report.page import write_page
from rl.report.report import shown_setting
from rl.report.run_facts import gather_facts
from rl.report.shelf import Shelf

MAX_RUNS = 8  # as many as there are colours
_RECORDS = 16  # files of each run's ledger that are read, of evaluations and of training each
_PROMPTS, _BEST = 40, 4  # prompts on the page, and completions of each run


def compare_runs(run_dirs: Sequence[Path], out: Path) -> Path:
    """Writes the page and returns its path.

    Raises:
        ValueError: one of `run_dirs` is not a folder, or there are too many of them.
    """
    if len(run_dirs) > MAX_RUNS:
        raise ValueError(f"{len(run_dirs)} runs; one page compares at most {MAX_RUNS}")
    runs = [gather_facts(run_dir) for run_dir in run_dirs]
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=f"{run.name} ({i})") for i, run in enumerate(runs, start=1)]
    tiles = [{tile["label"]: f"{tile['value']}\n{tile['about']}" for tile in run.tiles} for run in runs]
    results = [flatten(run.result) for run in runs]
    settings = [flatten(run.config) for run in runs]
    first, more = overlays([run.curves for run in runs])
    values = {
        "name": " · ".join(run.name for run in runs),
        "runs": runs,
        "results": _rows(tiles) + _rows(results),
        "settings": [(key, row) for key, row in _rows(settings) if len(set(row)) > 1 and key != "run_dir"],
        "prompts": _same_prompts(run_dirs),
        "num_more": len(more),
        "notes": [f"{run.name}: {note}" for run in runs for note in run.notes],
    }
    data = {"page": json_for_html({"live": 0})}
    if first or more:
        data["curves"] = json_for_html([{"name": run.name, "curves": run.curves} for run in runs])
        data["figure-list"] = json_for_html({"first": first, "more": more})
    write_page(out, "compare.html.j2", values, data=data)
    return out


def _same_prompts(run_dirs: Sequence[Path]) -> list[tuple[str, list[dict[str, Any] | None]]]:
    """Prompts that several runs have answered, and the best completions of each run. These are from its
    newest evaluation, or from the newest training steps that another run has too.
    """
    shelves = [Shelf(run_dir, run_dir) for run_dir in run_dirs]
    times = Counter(key for shelf in shelves for key in shelf.newest())
    found: dict[tuple[str, ...], list[dict[str, Any] | None]] = {}
    for i, shelf in enumerate(shelves):
        kinds = {kind: [key for key in shelf.newest() if key[1] == kind] for kind in "et"}
        shared = [key for key in kinds["t"] if times[key] > 1]
        for (step, kind, _), name, texts in shelf.texts_of(kinds["e"][:_RECORDS] + shared[:_RECORDS]):
            answers = found.setdefault((kind, name, texts["prompt"]), [None] * len(shelves))
            answers[i] = answers[i] or {
                "where": f"evaluation after step {step}" if kind == "e" else f"step {step}",
                "completions": texts["completions"][:_BEST],
            }
    rows = [(key[-1], row) for key, row in found.items() if sum(map(bool, row)) > 1]
    return rows[:_PROMPTS]


def _rows(columns: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Key -> its value in each column, in the order of keys."""
    keys = dict.fromkeys(key for column in columns for key in column)
    return [
        (shown_setting(key), [shown_setting(c[key]) if key in c else "–" for c in columns]) for key in keys
    ]
