"""Is this run healthy? Rules over the rows of `metrics.jsonl`: each has a metric, a first step, a remedy."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rl.report.history import RECENT, History, read_history
from rl.store.folder import evaluation_log
from rl.store.metrics import METRICS, Metric, metric_of, show_value

Level = Literal["No data", "Too early", "Healthy", "Warning", "Broken"]
GROWING = ("sampler/logprob_gap_mean", "sync/canary_gap_mean")
"""Gaps that stay at their first value as long as the engine computes with the policy's weights."""
_GROWN = (
    "some trained weight does not reach the engine: compare with engine.name=transformers, and with "
    "model.lora.target_modules=[q_proj, v_proj] if there are adapters"
)
PATIENCE = max(metric.patience for metric in METRICS.values())  # of the slowest rule, in steps
NUM_FIRST = 2  # steps whose smaller gap counts as the first value
_ORDER = ("No data", "Too early", "Healthy", "Warning", "Broken")

Row = Mapping[str, Any]
Rows = Sequence[Row] | History


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that fired. `since` is the first step of the stretch that lasts until now."""

    level: Level
    metric: str
    since: int
    text: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.text}, since step {self.since}" + (f"; {self.hint}" if self.hint else "")


@dataclass(frozen=True, slots=True)
class Verdict:
    """The worst level among the findings, which come worst first."""

    level: Level
    findings: tuple[Finding, ...] = ()
    control: str = ""  # name of the control arm, if the run is one
    num_steps: int = PATIENCE  # recorded so far

    @property
    def headline(self) -> str:
        """One line: the control arm if it is one, the level, and of its findings the first that fired."""
        arm = f"Control arm ({self.control} reward). " if self.control else ""
        return arm + self._of_rules

    @property
    def _of_rules(self) -> str:
        if self.level == "No data":
            return "No data: no step is recorded yet"
        if not self.findings:
            if self.num_steps >= PATIENCE:
                return "Healthy: every number is inside its range"
            steps = f"{self.num_steps} of the {PATIENCE} steps (train.steps) that rules wait for"
            return f"Too early: {steps}; no number is out of its range so far"
        worst = self.findings[0]
        return f"{self.level}: {worst.text}, since step {worst.since}"


def judge(rows: Rows, evaluations: Sequence[Row] = ()) -> Verdict:
    """The verdict on a run, from its metric rows and its held-out evaluations, both in the order of steps.

    A bound is crossed once `Metric.patience` values in a row, up to the last, are beyond it.
    """
    if not len(rows) and not evaluations:
        return Verdict("No data")
    findings = [finding for metric in METRICS.values() if (finding := _range_rule(metric, rows))]
    findings += _taught_nothing(rows)
    findings += growing_gaps(rows)
    findings += constant_parts(rows)
    findings += _nonfinite_rule(rows)
    findings += _heldout_rule(evaluations)
    findings.sort(key=lambda finding: (-_ORDER.index(finding.level), finding.since))
    parts = part_spreads(rows)
    arm = next((arm for arm in ("random", "format") if f"reward/{arm}_control/std" in parts), "")
    level: Level = "Healthy" if len(rows) >= PATIENCE else "Too early"
    return Verdict(findings[0].level if findings else level, tuple(findings), arm, len(rows))


def judge_run(run_dir: Path) -> Verdict:
    """The verdict on the run of a folder, as its report shows it."""
    path = run_dir / "metrics.jsonl"
    evaluations = [asdict(evaluation) for evaluation in evaluation_log(run_dir).read().values()]
    return judge(read_history(path) if path.is_file() else [], evaluations)


class Watch:
    """Judges a run while it runs, by its latest rows.

    Attributes:
        varied: spreads of reward parts that were not 0 in some step, however long ago.
        verdict: after the latest step.
    """

    def __init__(self) -> None:
        self.first: list[Row] = []
        self.rows: deque[Row] = deque(maxlen=RECENT)
        self.varied: set[str] = set()
        self.verdict = Verdict("Healthy")

    def recall(self, rows: Iterable[Row]) -> None:
        """Takes in earlier rows of a run that is resumed."""
        for row in rows:
            self.first += [row] if len(self.first) < NUM_FIRST else []
            self.rows.append(row)
            self.varied |= {name for name in part_spreads([row]) if row[name]}

    def broken(self, step: int, values: Mapping[str, float]) -> list[Finding]:
        """What is broken after a step with these numbers, and what is unusual and told at once
        (`Metric.told_at_once`). Reward parts that have never varied are told too: only the whole run
        distinguishes them from parts that are learnt.
        """
        lost = [name for name, value in values.items() if not math.isfinite(value)]
        self.recall([{"step": step, **values, "nonfinite": lost}])
        at_once = {name for name, metric in METRICS.items() if metric.told_at_once}
        at_once |= {name for name in part_spreads(self.rows) if name not in self.varied}
        begun = [row for row in self.first if row["step"] < self.rows[0]["step"]]
        verdict = judge([*begun, *self.rows])
        found = tuple(f for f in verdict.findings if f.metric not in self.varied)
        self.verdict = replace(verdict, level=found[0].level if found else "Healthy", findings=found)
        return [finding for finding in found if finding.level == "Broken" or finding.metric in at_once]


def series_of(rows: Rows, name: str) -> list[tuple[int, float]]:
    """(step, value) of every row that has a finite value of the metric."""
    if isinstance(rows, History):
        return rows.series(name)
    found = [(row["step"], row.get(name)) for row in rows]
    return [(s, float(v)) for s, v in found if isinstance(v, int | float) and math.isfinite(v)]


def range_text(metric: Metric) -> str:
    """The healthy range in words: "0.02 to 2.5", "at most 30 %", or "" for a metric without one."""
    low, high = (
        None if math.isinf(bound) else f"{100 * bound:g} %" if metric.unit == "share" else f"{bound:g}"
        for bound in (metric.low, metric.high)
    )
    if low is not None and high is not None:
        return f"{low} to {high}"
    return f"at most {high}" if high is not None else f"at least {low}" if low is not None else ""


def part_spreads(rows: Iterable[Row] | History) -> list[str]:
    """The names `reward/<part>/std` in these rows."""
    present = rows.columns if isinstance(rows, History) else (name for row in rows for name in row)
    return sorted({n for n in present if n.startswith("reward/") and n.endswith("/std")} - {"reward/std"})


def constant_parts(rows: Rows) -> list[Finding]:
    """Fires for a reward part that gave all completions of a step the same score in every step so far.

    A part that varied before and no longer does is learnt, which is not a fault.
    """
    findings = []
    for name in part_spreads(rows):
        metric, series = metric_of(name), series_of(rows, name)
        if len(series) >= metric.patience and not any(metric.is_healthy(value) for _, value in series):
            part = name.removeprefix("reward/").removesuffix("/std")
            means = series_of(rows, f"reward/{part}/mean")
            score = f", {means[-1][1]:.4g}" if means else ""
            text = f"reward part {part} gives all completions of a step the same score{score}"
            findings.append(Finding("Warning", name, series[0][0], text, metric.hint))
    return findings


def growing_gaps(rows: Rows) -> list[Finding]:
    """Fires for a gap between policy and engine that has grown in the last two steps, far below any range.

    A trained weight that is never sent does not show in the first steps. A gap that began below 1e-4 nats
    (fp32) may reach 0.003; others may grow by 0.04, and to 2.5 times the first value. Steps whose samples
    are older than the policy are left out, since there the policy itself moved.
    """
    findings, stale = [], {step for step, age in series_of(rows, "staleness/max") if age > 0}
    for name in GROWING:
        aged = stale if name.startswith("sampler/") else set()
        series = [(step, gap) for step, gap in series_of(rows, name) if step not in aged]
        if len(series) <= NUM_FIRST:
            continue
        start = min(gap for _, gap in series[:NUM_FIRST])
        bound = 0.003 if start < 1e-4 else max(2.5 * start, start + 0.04)
        streak = 0
        while streak < len(series) - NUM_FIRST and series[-1 - streak][1] > bound:
            streak += 1
        if streak >= 2:
            text = f"{name} has grown from {start:.2g} to {series[-1][1]:.2g}, which sound weights never do"
            findings.append(Finding("Warning", name, series[-streak][0], text, _GROWN))
    return findings


def _range_rule(metric: Metric, rows: Rows) -> Finding | None:
    if not range_text(metric):
        return None
    series = series_of(rows, metric.name)
    levels: tuple[Level, ...] = ("Broken", "Warning")
    for level in levels:
        streak = 0
        for _, value in reversed(series):
            if not (metric.is_broken(value) if level == "Broken" else not metric.is_healthy(value)):
                break
            streak += 1
        if streak >= metric.patience:
            step, value = series[-streak][0], series[-1][1]
            text = f"{metric.name} is {show_value(metric.name, value)}, healthy is {range_text(metric)}"
            return Finding(level, metric.name, step, text, metric.hint)
    return None


def _taught_nothing(rows: Rows) -> list[Finding]:
    """Fires if no group has had spread, in a run that is too short for the rule of the metric's range."""
    metric = METRICS["groups/without_spread"]
    series = series_of(rows, metric.name)
    if not 0 < len(series) < metric.patience or not all(metric.is_broken(share) for _, share in series):
        return []
    text = f"all rewards of every group were equal in all steps ({len(series)}), so they taught nothing"
    abstained = METRICS["reward/abstained"]
    if {share for _, share in series_of(rows, abstained.name)} == {1.0}:
        metric, text = abstained, f"no completion got a reward in any step ({len(series)})"
    return [Finding("Warning", metric.name, series[0][0], text, metric.hint)]


def _nonfinite_rule(rows: Rows) -> list[Finding]:
    last = rows.recent if isinstance(rows, History) else rows[-RECENT:]
    recent = [row for row in last if row.get("nonfinite")]
    if not recent:
        return []
    level: Level = "Broken" if recent[-1] is last[-1] else "Warning"
    names = ", ".join(sorted({str(name) for row in recent for name in row["nonfinite"]}))
    first = str(recent[0]["nonfinite"][0])
    text = f"{names} not finite in {len(recent)} of the last {len(last)} steps"
    hint = "lower optimizer.lr; try model.dtype=fp32; check rewards for infinite scores"
    return [Finding(level, first, recent[0]["step"], text, hint)]


def _heldout_rule(evaluations: Sequence[Row]) -> list[Finding]:
    """Fires if the last held-out interval lies wholly below the first: training made the model worse."""
    intervals = [(row["step"], row.get("low"), row.get("high")) for row in evaluations]
    known = [(step, low, high) for step, low, high in intervals if low is not None and high is not None]
    if len(known) < 2 or known[-1][2] >= known[0][1]:
        return []
    since = known[-1][0]
    for step, _, high in reversed(known):
        if high >= known[0][1]:
            break
        since = step
    text = f"held-out accuracy fell below its start (now <= {known[-1][2]:.1%}, then >= {known[0][1]:.1%})"
    hint = "go back to an earlier checkpoint; lower optimizer.lr, raise loss.kl_coef, or repair the reward"
    return [Finding("Broken", "heldout/accuracy", since, text, hint)]
