"""The curves of a report in reading order: is it better, is there signal, is it stable, what takes time."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from rl.report.history import Extremes
from rl.report.plots import HEIGHT, Point, Series, line_plot, stacked_bars
from rl.report.verdict import series_of
from rl.store.metrics import METRICS, metric_of, show_value
from rl.store.redact import show_controls

Row = Mapping[str, Any]
_STRIP = 118  # height of a plot that shares its card with another
_MAX_PARTS = 6
_SPLIT = (
    ("sample", 1),
    ("score", 2),
    ("pack", 3),
    ("train", 4),
    ("sync", 5),
    ("save", 6),
    ("eval", 7),
)


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot of a card. `legend` has (label, colour) pairs."""

    svg: Markup
    caption: str
    legend: list[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class Figure:
    """A card of the report: plots that answer one question. `note` says how to read it."""

    title: str
    note: str
    panels: list[Panel]


def build_figures(
    rows: Sequence[Row], evaluations: Sequence[Row], extremes: Extremes | None = None
) -> tuple[list[Figure], list[Figure]]:
    """The figures to show at once and those to fold away; a figure without data is left out.

    `extremes` are those of `History.thinned`, for rows that stand for several steps each.
    """
    steps = [row["step"] for row in (*rows, *evaluations)]
    if not steps:
        return [], []
    draw = _Pen(rows, (min(steps), max(steps)), extremes or [])
    first = [
        Figure(
            "Held-out accuracy",
            "The number that counts. The band is the 95 % interval: a rise within it may be luck.",
            [draw.heldout(evaluations)],
        ),
        Figure(
            "Reward",
            "Of the training prompts. If it rises while the held-out accuracy is flat, it is being gamed.",
            [draw.rewards()],
        ),
        Figure(
            "Bound on the training text",
            "Nats per maskable token; the negative log-likelihood is at most this. Steps are noisy.",
            [draw.lines({"bound": "diffusion/bound"})],
        ),
        Figure(
            "Do groups teach?",
            "Only groups with spread give a gradient; too easy and too hard ones cost samples for nothing.",
            [draw.groups()],
        ),
        Figure(
            "Exploration and drift",
            "Entropy falls slowly in a healthy run. KL is the distance from the reference model.",
            [
                draw.lines({"entropy": "policy/entropy"}, height=_STRIP),
                draw.lines({"KL": "policy/kl"}, height=_STRIP),
            ],
        ),
        Figure(
            "Completion length",
            "Cut completions are usually wrong; a length that creeps to the limit is being rewarded.",
            [
                draw.lines(
                    {"mean, shortest to longest": "completion/length_mean"},
                    low="completion/length_min",
                    high="completion/length_max",
                ),
                draw.lines(
                    {"cut by the limit": "completion/truncated_share"}, y_range=(0.0, 1.0), height=_STRIP
                ),
            ],
        ),
        Figure(
            "Time per step",
            "Sampling usually dominates; a tall score bar means that graders hold up the run.",
            [draw.times(), draw.lines({"speed": "tokens/per_second"}, height=_STRIP)],
        ),
        Figure(
            "Clipped tokens",
            "Zero with one update per batch, since the ratio is then 1.",
            [
                draw.lines(
                    {"all": "policy/clip_fraction", "low": "policy/clip_low", "high": "policy/clip_high"}
                )
            ],
        ),
        Figure(
            "Does the sampler match the policy?",
            "Both compute the same log-probs up to rounding, and up to what the policy moved in "
            "train.max_staleness steps. A jump means wrong or stale weights.",
            [
                draw.lines(
                    {"log-prob gap, mean": "sampler/logprob_gap_mean", "mismatch KL": "sampler/mismatch_kl"},
                    height=_STRIP,
                ),
                draw.lines({"ratio, mean": "sampler/ratio_mean"}, height=_STRIP),
            ],
        ),
    ]
    shown = {"heldout/accuracy", "heldout/low", "heldout/high"} | draw.used
    rest = [
        Figure(METRICS[name].description, "", [draw.lines({name: name}, height=_STRIP)])
        for name in METRICS
        if name not in shown
    ]
    return _with_data(first), _with_data(rest)


class _Pen:
    """Draws the series of one run over its steps, and remembers which metrics were drawn."""

    def __init__(self, rows: Sequence[Row], x_range: Point, extremes: Extremes) -> None:
        self.rows = rows
        self.x_range = x_range
        self.extremes = {row["step"]: ends for row, ends in zip(rows, extremes, strict=False)}
        self.used: set[str] = set()

    def lines(
        self,
        names: Mapping[str, str],
        *,
        low: str = "",
        high: str = "",
        y_range: Point | None = None,
        height: int = HEIGHT,
    ) -> Panel:
        """Metrics by label in one plot; `low` and `high` name the band around the first."""
        self.used |= {*names.values(), low, high}
        series = []
        for color, (label, name) in enumerate(names.items(), start=1):
            points = series_of(self.rows, name)
            is_banded = color == 1 and bool(low)
            lows = self._ends(low if is_banded else name, points, 0)
            highs = self._ends(high if is_banded else name, points, 1)
            has_ends = bool(lows and highs) and (is_banded or bool(self.extremes))
            series.append(Series(label, points, color, lows if has_ends else (), highs if has_ends else ()))
        first = next(iter(names.values()))
        svg = line_plot(series, x_range=self.x_range, show=_shower(first), y_range=y_range, height=height)
        return Panel(svg, metric_of(first).unit, [(s.label, s.color) for s in series if s.points])

    def heldout(self, evaluations: Sequence[Row]) -> Panel:
        points = series_of(evaluations, "accuracy")
        lows, highs = ([v for _, v in series_of(evaluations, end)] for end in ("low", "high"))
        if len(lows) != len(points) or len(highs) != len(points):
            lows, highs = [], []
        svg = line_plot(
            [Series("accuracy", points, 1, lows, highs)],
            x_range=self.x_range,
            show=_shower("heldout/accuracy"),
        )
        return Panel(svg, "share of held-out prompts", [])

    def rewards(self) -> Panel:
        """The mean, and up to six parts; a run with one part needs no second line on top of the first."""
        present = set().union(*self.rows)
        names = {name for name in present if re.fullmatch(r"reward/.+/mean", name, re.DOTALL)}
        parts = {show_controls(name[len("reward/") : -len("/mean")]): name for name in sorted(names)}
        kept = dict(list(parts.items())[:_MAX_PARTS]) if len(parts) > 1 else {}
        panel = self.lines({"mean": "reward/mean", **kept})
        caption = (
            "score" if len(kept) == len(parts) or not kept else f"score; {len(kept)} of {len(parts)} parts"
        )
        return Panel(panel.svg, caption, panel.legend)

    def groups(self) -> Panel:
        right, wrong, flat = (
            dict(series_of(self.rows, f"groups/{name}"))
            for name in ("all_right", "all_wrong", "without_spread")
        )
        self.used |= {"groups/all_right", "groups/all_wrong", "groups/without_spread"}
        series = [
            Series("with spread", [(s, 1 - v) for s, v in flat.items()], 1),
            Series("all right", [(s, right.get(s, 0.0)) for s in flat], 3),
            Series("all wrong", [(s, wrong.get(s, 0.0)) for s in flat], 2),
            Series(
                "no verdict",
                [(s, max(0.0, v - right.get(s, 0.0) - wrong.get(s, 0.0))) for s, v in flat.items()],
                8,
            ),
        ]
        if not any(v > 1e-9 for _, v in series[3].points):
            series.pop()
        svg = stacked_bars(series, x_range=self.x_range, show=_shower("groups/all_right"), y_range=(0.0, 1.0))
        return Panel(svg, "share of groups", [(s.label, s.color) for s in series])

    def times(self) -> Panel:
        self.used |= {"time/step", *(f"time/{name}" for name, _ in _SPLIT)}
        series = [Series(name, series_of(self.rows, f"time/{name}"), color) for name, color in _SPLIT]
        series = [s for s in series if s.points]
        svg = stacked_bars(series, x_range=self.x_range, show=lambda v: f"{v:.3g} s")
        return Panel(svg, "seconds", [(s.label, s.color) for s in series])

    def _ends(self, name: str, points: Sequence[Point], end: int) -> list[float]:
        """A metric's values at the steps of `points`, or its least (0) or greatest (1) where a row stands for
        several steps; nothing unless it has them all.
        """
        known: dict[float, float] = dict(series_of(self.rows, name))
        if not all(s in known for s, _ in points):
            return []
        return [self.extremes[s][name][end] if s in self.extremes else known[s] for s, _ in points]


def _with_data(figures: Sequence[Figure]) -> list[Figure]:
    kept = [Figure(f.title, f.note, [panel for panel in f.panels if panel.svg]) for f in figures]
    return [figure for figure in kept if figure.panels]


def _shower(name: str) -> Callable[[float], str]:
    if metric_of(name).unit == "share":
        return lambda value: f"{100 * value:.3g} %"
    return lambda value: show_value(name, value)
