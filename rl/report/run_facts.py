"""What a run folder tells about its run, whatever state it is in: numbers, verdict, settings, result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rl.config.bounded_yaml import parse_yaml
from rl.report.figures import with_derived
from rl.report.history import MAX_POINTS, Curve, History, read_history
from rl.report.verdict import Row, Verdict, judge, part_spreads, range_text, series_of
from rl.store.metrics import METRICS, Metric, metric_of, show_seconds, show_value
from rl.store.redact import redact, show_controls
from rl.store.safe_read import is_number, plain_tree, read_at_most

_MAX_MAPPING = 256 << 10  # bytes of config.yaml or result.json


@dataclass(frozen=True, slots=True)
class RunFacts:
    """One run, as far as its files can be read; `notes` say what could not.

    Attributes:
        tiles: the few numbers that a reader wants first: label, value, and a line about it.
        curves: name of each metric shown, without control characters -> its curve.
        config, result: as in their files, without secrets.
    """

    name: str
    status: str
    verdict: Verdict
    tiles: list[dict[str, str]]
    checks: list[dict[str, Any]]
    curves: dict[str, Curve]
    config: dict[str, Any]
    result: dict[str, Any]
    notes: list[str]


def gather_facts(run_dir: Path, *, is_running: bool = False) -> RunFacts:
    """Reads everything about a run except its groups.

    Raises:
        ValueError: `run_dir` is not a folder.
    """
    if not run_dir.is_dir():
        raise ValueError(
            f"no run folder {run_dir}; a report is made from the folder that train writes (run_dir)"
        )
    notes: list[str] = []
    history = _history(run_dir / "metrics.jsonl", notes)
    evaluations = _evaluations(run_dir / "evaluation.jsonl", notes)
    config = redact(_read_mapping(run_dir / "config.yaml", notes))
    result = redact(_read_mapping(run_dir / "result.json", notes))
    verdict = judge(history, evaluations)
    checked = [*METRICS, *part_spreads(history)]
    curves = with_derived(history.curves(), evaluations)
    return RunFacts(
        name=show_controls(run_dir.resolve().name),
        status=_status(run_dir, history, total=config.get("train"), result=None if is_running else result),
        verdict=verdict,
        tiles=_tiles(history, evaluations),
        checks=[check for name in checked if (check := _check(metric_of(name), history, verdict))],
        curves={show_controls(name): curve for name, curve in curves.items()},
        config=config,
        result=result,
        notes=notes,
    )


def _history(path: Path, notes: list[str], wanted: Callable[[str, int], bool] | None = None) -> History:
    """The rows of a file; `notes` receives what was left out."""
    try:
        history = read_history(path, wanted)
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}")
        return History(lambda *_: False)
    for why, count in history.left_out.items():
        if count:
            notes.append(f"{path.name}: {count:,} lines left out ({why})")
    return history


def _evaluations(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The rows of `evaluation.jsonl`, or as many of them as a curve has points, the last among them."""
    history = _history(path, notes, lambda name, _: name in ("accuracy", "low", "high", "n"))
    indices = range(len(history) - 1, -1, -(-(-len(history) // MAX_POINTS) or 1))
    rows = [
        {"step": history.steps[i], **{n: c[i] for n, c in history.columns.items() if c[i] == c[i]}}
        for i in reversed(indices)
    ]
    return [row for row in rows if "accuracy" in row]


def _status(run_dir: Path, history: History, *, total: Any, result: Mapping[str, Any] | None) -> str:
    """How far a run is. `total`: its section `train`; `result`: None while the run goes on."""
    total = total.get("steps") if isinstance(total, dict) else None
    done = history.steps[-1] if len(history) else 0
    parts = [f"{done:,} of {total:,} steps" if isinstance(total, int) else f"{done:,} steps"]
    if result:
        seconds = result.get("seconds")
        parts.append("finished" + (f" after {show_seconds(seconds)}" if is_number(seconds) else ""))
    elif len(history):
        written = datetime.fromtimestamp((run_dir / "metrics.jsonl").stat().st_mtime, UTC)
        state = "running" if result is None else "running or stopped"
        parts.append(f"{state}, last step recorded {written:%Y-%m-%d %H:%M UTC}")
    else:
        parts.append("no step recorded yet")
    return " · ".join(parts)


def _tiles(rows: History, evaluations: Sequence[Row]) -> list[dict[str, str]]:
    tiles = []
    if accuracies := series_of(evaluations, "accuracy"):
        first, last = accuracies[0], accuracies[-1]
        low, high, n = (evaluations[-1].get(key) for key in ("low", "high", "n"))
        begin = "before" if first[0] == 0 else f"at step {first[0]}"
        about = f"{begin} {100 * first[1]:.1f} %" if len(accuracies) > 1 else f"at step {last[0]}"
        if isinstance(low, float) and isinstance(high, float):
            about += f"; now {100 * low:.1f} to {100 * high:.1f} %" + (f", n = {n:,.0f}" if n else "")
        tiles.append({"label": "Held-out accuracy", "value": f"{100 * last[1]:.1f} %", "about": about})
    for label, name, what in (
        ("Reward", "reward/mean", "first"),
        ("Groups without spread", "groups/without_spread", "first"),
        ("Completion length", "completion/length_mean", "first"),
        ("Tokens per second", "tokens/per_second", "median"),
    ):
        values = [value for _, value in series_of(rows, name)]
        if not values:
            continue
        if what == "median":
            shown, about = show_value(name, median(values)), "median over the steps"
        else:
            means, is_score = (fmean(values[:5]), fmean(values[-5:])), METRICS[name].unit == "score"
            first, shown = (f"{mean:.3g}" if is_score else show_value(name, mean) for mean in means)
            about = f"{first} in the first steps" if len(values) > 5 else "mean of the steps so far"
        tiles.append({"label": label, "value": shown, "about": about})
    return tiles


def _check(metric: Metric, history: History, verdict: Verdict) -> dict[str, Any] | None:
    """A row of the verdict table; None for a metric without a range or without data."""
    series = series_of(history, metric.name) if range_text(metric) else []
    if not series:
        return None
    out = [step for step, value in series if not metric.is_healthy(value)]
    finding = next((f for f in verdict.findings if f.metric == metric.name), None)
    return {
        "level": finding.level if finding else "Healthy",
        "name": show_controls(metric.name),
        "unit": metric.unit,
        "description": show_controls(metric.description),
        "value": show_value(metric.name, series[-1][1]),
        "range": range_text(metric),
        "low": "" if metric.low == float("-inf") else metric.low,
        "high": "" if metric.high == float("inf") else metric.high,
        "first_out": f"step {out[0]:,}" if out else "never",
        "out": f"{len(out):,} of {len(series):,} steps" if out else "",
        "hint": finding.hint if finding else "",
    }


def _read_mapping(path: Path, notes: list[str]) -> dict[str, Any]:
    """A YAML or JSON file that holds keys and values; empty if it is missing, damaged or something else."""
    try:
        data = read_at_most(path, _MAX_MAPPING)
        value = parse_yaml(data.decode("utf-8", "replace")) if path.suffix == ".yaml" else json.loads(data)
        value = plain_tree(value)
    except FileNotFoundError:
        return {}
    except (OSError, RecursionError, ValueError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        notes.append(f"{path.name} cannot be read: {reason[:200]}")
        return {}
    return value if isinstance(value, dict) else {}
