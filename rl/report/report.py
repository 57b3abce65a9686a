"""One self-contained HTML page about a run, from the files of its folder alone: finished, killed or running.

Everything shown may be hostile: the template escapes it, data is JSON that cannot end its element, the page's
policy allows one script by its hash and no request, and that script only ever sets text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from rl.config import Config
from rl.config.bounded_yaml import parse_yaml
from rl.config.diffusion import DiffusionConfig, TextConfig
from rl.config.diffusion_rl import MaskedRunConfig
from rl.config.read import flatten
from rl.report.figures import build_figures
from rl.report.groups import json_for_html, sample_groups
from rl.report.history import MAX_POINTS, History, read_history
from rl.report.plots import sparkline
from rl.report.traces import denoising_html, sampled_traces
from rl.report.verdict import Row, Verdict, evaluations_in, judge, part_spreads, range_text, series_of
from rl.store.durable import written_whole
from rl.store.ledger import Ledger
from rl.store.manifest import library_versions
from rl.store.metrics import METRICS, Metric, metric_of, show_seconds, show_value
from rl.store.redact import redact, show_controls
from rl.store.safe_read import is_number, plain_tree, read_at_most

_TEMPLATE = Path(__file__).with_name("report.html.j2")
_MAX_TEXT = 100_000
_MAX_MAPPING = 256 << 10  # bytes of config.yaml or result.json
_MAX_NOTES = 50


def build_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Writes the report of a run, to `RUN/report.html` by default, and returns its path.

    Raises:
        ValueError: `run_dir` is no folder.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(
            f"no run folder {run_dir}; a report is made of the folder that train writes (run_dir)"
        )
    path = run_dir / "report.html" if out is None else Path(out)
    page = render(gather(run_dir))
    with written_whole(path) as file:
        file.write(page.encode("utf-8", "replace"))
    return path


def gather(run_dir: Path) -> dict[str, Any]:
    """Everything the template shows; what is missing is empty, and what cannot be read is noted."""
    notes: list[str] = []
    history = _history(run_dir / "metrics.jsonl", notes)
    evaluations = _evaluations(run_dir / "evaluation.jsonl", notes) or evaluations_in(history)
    config = _read_mapping(run_dir / "config.yaml", notes)
    result = _read_mapping(run_dir / "result.json", notes)
    verdict = judge(history, evaluations)
    rows, extremes = history.thinned()
    figures, more_figures = build_figures(rows, evaluations, extremes)
    groups, damaged = sample_groups(run_dir)
    checked = [*METRICS, *part_spreads(history)]
    return {
        "name": show_controls(run_dir.resolve().name),
        "verdict": verdict,
        "status": _status(run_dir, history, config, result),
        "tiles": _tiles(history, evaluations),
        "checks": [check for name in checked if (check := _check(metric_of(name), history, verdict))],
        "figures": figures,
        "more_figures": more_figures,
        "groups": groups,
        "groups_json": Markup(json_for_html(groups)),
        "denoisings": _denoisings(run_dir),
        "changed": _changed(config),
        "config": _shown_text(
            yaml.safe_dump(redact(config), sort_keys=False, allow_unicode=True) if config else ""
        ),
        "result": {key: _shown_text(_plain(value)) for key, value in flatten(redact(result)).items()},
        "versions": library_versions(),
        "notes": [show_controls(note) for note in [*notes, *damaged][:_MAX_NOTES]],
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _history(path: Path, notes: list[str], wanted: Callable[[str, int], bool] | None = None) -> History:
    """The rows of a file; what was left out of them goes into the notes."""
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


def _denoisings(run_dir: Path) -> list[Markup]:
    """In which order a diffusion model wrote some completions; nothing for other models."""
    return [
        Markup(denoising_html(scored.completions[i], f"Step {step}, prompt {scored.prompt.id}:"))
        for step, scored, i in sampled_traces(Ledger(run_dir))
    ]


def render(values: Mapping[str, Any]) -> str:
    """The page. The policy's hash is taken from the very script that the template contains."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["script_hash"] = _script_hash
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(**values)


def _script_hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()


def _status(run_dir: Path, history: History, config: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    total = config.get("train", {}).get("steps") if isinstance(config.get("train"), dict) else None
    done = history.steps[-1] if len(history) else 0
    parts = [f"{done:,} of {total:,} steps" if isinstance(total, int) else f"{done:,} steps"]
    if result:
        seconds = result.get("seconds")
        parts.append("finished" + (f" after {show_seconds(seconds)}" if is_number(seconds) else ""))
    elif len(history):
        written = datetime.fromtimestamp((run_dir / "metrics.jsonl").stat().st_mtime, UTC)
        parts.append(f"running or stopped, last step recorded {written:%Y-%m-%d %H:%M UTC}")
    else:
        parts.append("no step recorded yet")
    return " · ".join(parts)


def _tiles(rows: History, evaluations: Sequence[Row]) -> list[dict[str, str]]:
    """The few numbers that a reader wants first: label, value, and a line about it."""
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
            shown, about = show_value(name, sorted(values)[len(values) // 2]), "median over the steps"
        else:
            first, shown = (_short(name, math.fsum(some) / len(some)) for some in (values[:5], values[-5:]))
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
        "spark": sparkline(series, low=metric.low, high=metric.high),
        "first_out": f"step {out[0]:,}" if out else "never",
        "out": f"{len(out):,} of {len(series):,} steps" if out else "",
        "hint": finding.hint if finding else "",
    }


def _changed(config: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Settings that are not the defaults: key -> (value, default)."""
    plain = DiffusionConfig(data=TextConfig(source="")) if "objective" in config else Config()
    plain = MaskedRunConfig() if "diffusion" in config else plain
    here, defaults = flatten(redact(config)), flatten(plain.model_dump(mode="json"))
    return {
        key: (_shown_text(_plain(value)), _plain(defaults.get(key, "none")))
        for key, value in here.items()
        if defaults.get(key, None) != value
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


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _shown_text(text: str) -> str:
    return show_controls(text[:_MAX_TEXT])


def _short(name: str, value: float) -> str:
    return f"{value:.3g}" if METRICS[name].unit == "score" else show_value(name, value)
