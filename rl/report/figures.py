"""The curves of a report in reading order: is it better, is there signal, is it stable, what takes time."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from rl.report.history import Extremes, is_own
from rl.report.plots import HEIGHT, Point, Series, line_plot, stacked_bars
from rl.report.verdict import Row, series_of
from rl.store.metrics import METRICS, show_value, shown_metric
from rl.store.redact import show_controls

_STRIP = 118  # height of a plot that shares its card with another
_MAX_PARTS = 6
_PHASES = ("sample", "score", "pack", "train", "sync", "save", "eval")


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


class _Pen:
    """Draws the series of one run over its steps, and remembers which metrics were drawn."""

    def __init__(self, rows: Sequence[Row], evaluations: Sequence[Row], extremes: Extremes) -> None:
        self.rows, self.evaluations = rows, evaluations
        steps = [row["step"] for row in (*rows, *evaluations)]
        self.x_range = min(steps), max(steps)
        self.extremes = {row["step"]: ends for row, ends in zip(rows, extremes, strict=False)}
        self.used: set[str] = set()

    def lines(
        self,
        names: Mapping[str, str],
        *,
        band: tuple[str, str] | None = None,
        y_range: Point | None = None,
        height: int = HEIGHT,
    ) -> Panel:
        """Metrics by label in one plot; `band` names the ends of an interval around the first."""
        self.used |= {*names.values(), *(band or ())}
        series = []
        for color, (label, name) in enumerate(names.items(), start=1):
            points = series_of(self.rows, name)
            ends = band if color == 1 and band else (name, name)
            lows, highs = (self._ends(end, points, i) for i, end in enumerate(ends))
            has_ends = bool(lows and highs) and (ends is band or bool(self.extremes))
            series.append(Series(label, points, color, lows if has_ends else (), highs if has_ends else ()))
        first = next(iter(names.values()))
        svg = line_plot(series, x_range=self.x_range, show=_shower(first), y_range=y_range, height=height)
        return Panel(svg, shown_metric(first).unit, [(s.label, s.color) for s in series if s.points])

    def strip(self, names: Mapping[str, str], *, y_range: Point | None = None) -> Panel:
        """A low plot, which shares its card with another."""
        return self.lines(names, y_range=y_range, height=_STRIP)

    def heldout(self) -> Panel:
        self.used |= {f"heldout/{name}" for name in ("accuracy", "low", "high")}
        points = series_of(self.evaluations, "accuracy")
        lows, highs = ([v for _, v in series_of(self.evaluations, end)] for end in ("low", "high"))
        if len(lows) != len(points) or len(highs) != len(points):
            lows, highs = [], []
        series = [Series("accuracy", points, 1, lows, highs)]
        svg = line_plot(series, x_range=self.x_range, show=_shower("heldout/accuracy"))
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
        names = [f"groups/{name}" for name in ("without_spread", "all_right", "all_wrong")]
        self.used |= set(names)
        same, right, wrong = (dict(series_of(self.rows, name)) for name in names)
        shares = [
            (1 - v, right.get(s, 0.0), wrong.get(s, 0.0), v - right.get(s, 0.0) - wrong.get(s, 0.0))
            for s, v in same.items()
        ]
        kinds = (("with spread", 1), ("all right", 3), ("all wrong", 2), ("no verdict", 8))
        series = [
            Series(label, [(s, share[i]) for s, share in zip(same, shares, strict=True)], color)
            for i, (label, color) in enumerate(kinds)
        ]
        if not any(v > 1e-9 for _, v in series[3].points):
            series.pop()
        svg = stacked_bars(series, x_range=self.x_range, show=_shower("groups/all_right"), y_range=(0.0, 1.0))
        return Panel(svg, "share of groups", [(s.label, s.color) for s in series])

    def times(self) -> Panel:
        self.used |= {"time/step", *(f"time/{name}" for name in _PHASES)}
        points = [series_of(self.rows, f"time/{name}") for name in _PHASES]
        drawn = zip(_PHASES, points, range(1, 8), strict=True)
        series = [Series(name, found, color) for name, found, color in drawn if found]
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


FIGURES: tuple[tuple[str, str, Callable[[_Pen], list[Panel]]], ...] = (
    (
        "Held-out accuracy",
        "The number that counts. The band is the 95 % interval: a rise within it may be luck.",
        lambda pen: [pen.heldout()],
    ),
    (
        "Reward",
        "Of the training prompts. If it rises while the held-out accuracy is flat, it is being gamed.",
        lambda pen: [pen.rewards()],
    ),
    (
        "Bound on the training text",
        "Nats per maskable token; the negative log-likelihood is at most this. Steps are noisy.",
        lambda pen: [pen.lines({"bound": "diffusion/bound"})],
    ),
    (
        "Do groups teach?",
        "Only groups with spread give a gradient; too easy and too hard ones cost samples for nothing.",
        lambda pen: [pen.groups()],
    ),
    (
        "Exploration and drift",
        "Entropy falls slowly in a healthy run. KL is the distance from the reference model.",
        lambda pen: [pen.strip({"entropy": "policy/entropy"}), pen.strip({"KL": "policy/kl"})],
    ),
    (
        "Completion length",
        "Cut completions are usually wrong; a length that creeps to the limit is being rewarded.",
        lambda pen: [
            pen.lines(
                {"mean, shortest to longest": "completion/length_mean"},
                band=("completion/length_min", "completion/length_max"),
            ),
            pen.strip({"cut by the limit": "completion/truncated_share"}, y_range=(0.0, 1.0)),
        ],
    ),
    (
        "Time per step",
        "Sampling usually dominates; a tall score bar means that graders hold up the run.",
        lambda pen: [pen.times(), pen.strip({"speed": "tokens/per_second"})],
    ),
    (
        "Clipped tokens",
        "Zero with one update per batch, since the ratio is then 1.",
        lambda pen: [
            pen.lines({"all": "policy/clip_fraction", "low": "policy/clip_low", "high": "policy/clip_high"})
        ],
    ),
    (
        "Does the sampler match the policy?",
        "Both compute the same log-probs up to rounding, and up to what the policy moved in "
        "train.max_staleness steps. A jump means wrong or stale weights.",
        lambda pen: [
            pen.strip(
                {"log-prob gap, mean": "sampler/logprob_gap_mean", "mismatch KL": "sampler/mismatch_kl"}
            ),
            pen.strip({"ratio, mean": "sampler/ratio_mean"}),
        ],
    ),
)
"""What is shown at once: title, how to read it, the plots. Other metrics have a figure each, folded away."""


def build_figures(
    rows: Sequence[Row], evaluations: Sequence[Row], extremes: Extremes | None = None
) -> tuple[list[Figure], list[Figure]]:
    """The figures to show at once and those to fold away; a figure without data is left out.

    `extremes` are those of `History.thinned`, for rows that stand for several steps each.
    """
    if not rows and not evaluations:
        return [], []
    pen = _Pen(rows, evaluations, extremes or [])
    first = [_figure(title, note, panels(pen)) for title, note, panels in FIGURES]
    own = sorted({name for row in rows for name in row if is_own(name)})
    rest = [name for name in (*METRICS, *own) if name not in pen.used]
    more = [_figure(shown_metric(name).description, "", [pen.strip({name: name})]) for name in rest]
    return list(filter(None, first)), list(filter(None, more))


def _figure(title: str, note: str, panels: Sequence[Panel]) -> Figure | None:
    drawn = [panel for panel in panels if panel.svg]
    return Figure(title, note, drawn) if drawn else None


def _shower(name: str) -> Callable[[float], str]:
    if shown_metric(name).unit == "share":
        return lambda value: f"{100 * value:.3g} %"
    return lambda value: show_value(name, value)
