"""One self-contained HTML page about a run, from the files of its folder alone: finished, killed or running.

Everything shown may be hostile: the template escapes it, data is JSON that cannot end its element, the page's
policy allows one script by its hash and no request, and that script only ever sets text.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from rl.config import Config
from rl.config.bounded_yaml import read_yaml
from rl.diffusion.config import DiffusionConfig, TextConfig
from rl.diffusion.rl_config import MaskedRunConfig
from rl.diffusion.trace_view import denoising_html, sampled_traces
from rl.durable import written_whole
from rl.figures import build_figures
from rl.group_sample import json_for_html, sample_groups
from rl.ledger import Ledger
from rl.manifest import library_versions
from rl.metrics import METRICS, Metric, show_seconds, show_value
from rl.plots import sparkline
from rl.redact import redact, show_controls
from rl.row_log import read_rows
from rl.verdict import Row, Verdict, judge, range_text, series_of

_TEMPLATE = Path(__file__).with_name("report.html.j2")
_MAX_TEXT = 100_000
_MAX_ROWS = 200_000  # steps; a longer file is read from its end


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
    """Everything the template shows; parts whose file is missing or damaged are empty."""
    rows = sorted(read_rows(run_dir / "metrics.jsonl"), key=lambda row: row["step"])[-_MAX_ROWS:]
    evaluations = sorted(read_rows(run_dir / "evaluation.jsonl"), key=lambda row: row["step"])
    evaluations = evaluations or _evaluations_in(rows)
    config = _read_mapping(run_dir / "config.yaml")
    result = _read_mapping(run_dir / "result.json")
    verdict = judge(rows, evaluations)
    figures, more_figures = build_figures(rows, evaluations)
    groups, damaged = sample_groups(run_dir)
    return {
        "name": show_controls(run_dir.resolve().name),
        "verdict": verdict,
        "status": _status(run_dir, rows, config, result),
        "tiles": _tiles(rows, evaluations),
        "checks": [
            _check(METRICS[name], rows, verdict) for name in METRICS if _has_range(METRICS[name], rows)
        ],
        "figures": figures,
        "more_figures": more_figures,
        "groups": groups,
        "groups_json": Markup(json_for_html(groups)),
        "denoisings": _denoisings(run_dir),
        "changed": _changed(config),
        "config": _shown_text(
            yaml.safe_dump(redact(config), sort_keys=False, allow_unicode=True) if config else ""
        ),
        "result": {key: _shown_text(_plain(value)) for key, value in _flat(redact(result)).items()},
        "versions": library_versions(),
        "notes": [show_controls(note) for note in damaged],
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


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


def _status(run_dir: Path, rows: Sequence[Row], config: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    total = config.get("train", {}).get("steps") if isinstance(config.get("train"), dict) else None
    done = rows[-1]["step"] if rows else 0
    parts = [f"{done:,} of {total:,} steps" if isinstance(total, int) else f"{done:,} steps"]
    if result:
        seconds = result.get("seconds")
        parts.append(
            "finished" + (f" after {show_seconds(seconds)}" if isinstance(seconds, int | float) else "")
        )
    elif rows:
        written = datetime.fromtimestamp((run_dir / "metrics.jsonl").stat().st_mtime, UTC)
        parts.append(f"running or stopped, last step recorded {written:%Y-%m-%d %H:%M UTC}")
    else:
        parts.append("no step recorded yet")
    return " · ".join(parts)


def _tiles(rows: Sequence[Row], evaluations: Sequence[Row]) -> list[dict[str, str]]:
    """The few numbers that a reader wants first: label, value, and a line about it."""
    tiles = []
    if accuracies := series_of(evaluations, "accuracy"):
        first, last = accuracies[0], accuracies[-1]
        low, high, n = (evaluations[-1].get(key) for key in ("low", "high", "n"))
        begin = "before" if first[0] == 0 else f"at step {first[0]}"
        about = f"{begin} {100 * first[1]:.1f} %" if len(accuracies) > 1 else f"at step {last[0]}"
        if isinstance(low, float) and isinstance(high, float):
            about += f"; now {100 * low:.1f} to {100 * high:.1f} %" + (
                f", n = {n:,}" if isinstance(n, int) else ""
            )
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
        begin, end = _mean(values[:5]), _mean(values[-5:])
        if what == "median":
            middle = sorted(values)[len(values) // 2]
            tiles.append(
                {"label": label, "value": show_value(name, middle), "about": "median over the steps"}
            )
        else:
            about = (
                f"{_short(name, begin)} in the first steps" if len(values) > 5 else "mean of the steps so far"
            )
            tiles.append({"label": label, "value": _short(name, end), "about": about})
    return tiles


def _check(metric: Metric, rows: Sequence[Row], verdict: Verdict) -> dict[str, Any]:
    """A row of the verdict table."""
    series = series_of(rows, metric.name)
    out = [step for step, value in series if not metric.is_healthy(value)]
    finding = next((f for f in verdict.findings if f.metric == metric.name), None)
    return {
        "level": finding.level if finding else "Healthy",
        "name": metric.name,
        "unit": metric.unit,
        "description": metric.description,
        "value": show_value(metric.name, series[-1][1]),
        "range": range_text(metric),
        "spark": sparkline(series, low=metric.low, high=metric.high),
        "first_out": f"step {out[0]:,}" if out else "never",
        "out": f"{len(out):,} of {len(series):,} steps" if out else "",
        "hint": finding.hint if finding else "",
    }


def _has_range(metric: Metric, rows: Sequence[Row]) -> bool:
    return bool(range_text(metric)) and bool(series_of(rows, metric.name))


def _evaluations_in(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Held-out results that a run put into its metric rows, for folders without evaluation.jsonl."""
    return [
        {"step": row["step"], **{key: row.get(f"heldout/{key}") for key in ("accuracy", "low", "high")}}
        for row in rows
        if row.get("heldout/accuracy") is not None
    ]


def _changed(config: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Settings that are not the defaults: key -> (value, default)."""
    plain = DiffusionConfig(data=TextConfig(source="")) if "objective" in config else Config()
    plain = MaskedRunConfig() if "diffusion" in config else plain
    here, defaults = _flat(redact(config)), _flat(plain.model_dump(mode="json"))
    return {
        key: (_shown_text(_plain(value)), _plain(defaults.get(key, "none")))
        for key, value in here.items()
        if defaults.get(key, None) != value
    }


def _read_mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON file that holds keys and values; empty if it is missing, damaged or something else."""
    try:
        value = read_yaml(path) if path.suffix == ".yaml" else json.loads(path.read_bytes())
    except (OSError, RecursionError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree} if prefix else {}
    return {
        key: value
        for name, sub in tree.items()
        for key, value in _flat(sub, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _shown_text(text: str) -> str:
    return show_controls(text[:_MAX_TEXT])


def _short(name: str, value: float) -> str:
    return f"{value:.3g}" if METRICS[name].unit == "score" else show_value(name, value)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
