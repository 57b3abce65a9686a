"""Curves over steps as SVG text: lines with bands, stacked bars, sparklines. They need no script and no file.

Colours are classes (`c1` .. `c8`) that the style sheet defines for light and dark. Labels are escaped here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from markupsafe import Markup, escape

Point = tuple[float, float]
WIDTH, HEIGHT = 560, 262
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 24
MAX_COLUMNS = 160  # a series longer than this is drawn as the mean, least and greatest of as many buckets
_SMOOTH_FROM = 30  # longer lines get a moving median on top of the raw one


@dataclass(frozen=True, slots=True)
class Series:
    """A named curve. `low` and `high` are the ends of an interval around each point, or empty."""

    label: str
    points: Sequence[Point]
    color: int = 1
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Column:
    """Neighbouring points drawn as one: their mean, least and greatest value."""

    first: float
    last: float
    mean: float
    low: float
    high: float

    @property
    def x(self) -> float:
        return (self.first + self.last) / 2


@dataclass(frozen=True, slots=True)
class Frame:
    """Maps steps and values to the pixels of a plot."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    height: int = HEIGHT
    ticks: list[float] = field(default_factory=list)

    def x(self, step: float) -> float:
        low, high = self.x_range
        return _LEFT + (step - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.height - _BOTTOM - (value - low) / (high - low) * (self.height - _TOP - _BOTTOM)


def line_plot(
    series: Sequence[Series],
    *,
    x_range: tuple[float, float],
    show: Callable[[float], str],
    y_range: tuple[float, float] | None = None,
    height: int = HEIGHT,
) -> Markup:
    """Lines over steps, with a band where a series has an interval or stands for several steps a column.

    Args:
        x_range: first and last step; the same for all plots of a page, so that they line up.
        show: a value as text, for ticks and tooltips.
        y_range: fixed ends of the vertical axis; default: the data's.
    """
    drawn = [(s, columns_of(s)) for s in series if s.points]
    if not drawn:
        return Markup("")
    values = [v for _, columns in drawn for c in columns for v in (c.low, c.high)]
    frame = _frame(x_range, y_range or (min(values), max(values)), height, is_fixed=y_range is not None)
    body = [_axes(frame, show)]
    body += [_band(frame, s.color, columns) for s, columns in drawn if any(c.high > c.low for c in columns)]
    for s, columns in drawn:
        points = [(c.x, c.mean) for c in columns]
        is_long = len(points) > _SMOOTH_FROM
        body.append(_line(frame, points, f"c{s.color} raw" if is_long else f"c{s.color}"))
        if is_long:
            body.append(_line(frame, smooth(points), f"c{s.color}"))
        else:
            body += [_dot(frame, point, s.color) for point in points]
    body.append(_tooltips(frame, [(s.label, columns) for s, columns in drawn], show))
    return _svg(WIDTH, height, body)


def stacked_bars(
    series: Sequence[Series],
    *,
    x_range: tuple[float, float],
    show: Callable[[float], str],
    y_range: tuple[float, float] | None = None,
    height: int = HEIGHT,
) -> Markup:
    """One bar per step (or bucket of steps) with the series on top of each other, the first at the bottom."""
    steps = sorted({x for s in series for x, _ in s.points})
    if not steps:
        return Markup("")
    filled = [(s, {x: max(0.0, y) for x, y in s.points}) for s in series]
    columns = [
        (s, columns_of(Series(s.label, [(x, known.get(x, 0.0)) for x in steps]))) for s, known in filled
    ]
    count = len(columns[0][1])
    tops = [sum(c[i].mean for _, c in columns) for i in range(count)]
    frame = _frame(x_range, y_range or (0.0, max(tops) or 1.0), height, is_fixed=y_range is not None)
    body = [_axes(frame, show)]
    # Each area reaches down to the axis and is covered by those below it, so that no seam shows between them.
    for top in reversed(range(len(columns))):
        heights = [sum(c[i].mean for _, c in columns[: top + 1]) for i in range(count)]
        body.append(_bars(frame, columns[top][0].color, columns[0][1], heights))
    body.append(_tooltips(frame, [(s.label, c) for s, c in columns], show))
    return _svg(WIDTH, height, body)


def sparkline(points: Sequence[Point], *, low: float | None = None, high: float | None = None) -> Markup:
    """A line of 120 by 24 pixels without axes; healthy bounds that lie in view are dotted lines."""
    columns = columns_of(Series("", points), limit=60)
    if not columns:
        return Markup("")
    values = [c.mean for c in columns]
    frame_low, frame_high = min(values), max(values)
    span = frame_high - frame_low or 1.0
    first, last = columns[0].x, columns[-1].x

    def at(step: float, value: float) -> str:
        x = 2 + (step - first) / ((last - first) or 1.0) * 112
        return f"{_n(x)},{_n(21 - (value - frame_low) / span * 18 if frame_high > frame_low else 12)}"

    body = [
        Markup('<path class="bound" d="M{} L{}"/>').format(at(first, bound), at(last, bound))
        for bound in (low, high)
        if bound is not None and frame_low < bound < frame_high
    ]
    body.append(
        Markup('<polyline class="line c1" points="{}"/>').format(" ".join(at(c.x, c.mean) for c in columns))
    )
    end_x, end_y = at(columns[-1].x, columns[-1].mean).split(",")
    body.append(Markup('<circle class="dot c1" cx="{}" cy="{}" r="2"/>').format(end_x, end_y))
    return _svg(120, 24, body, kind="spark")


def columns_of(series: Series, limit: int = MAX_COLUMNS) -> list[Column]:
    """The points, or the means of equal buckets of neighbours where there are more than `limit`."""
    lows, highs = series.low or [y for _, y in series.points], series.high or [y for _, y in series.points]
    size = math.ceil(len(series.points) / limit) if series.points else 1
    columns = []
    for begin in range(0, len(series.points), size):
        bucket = series.points[begin : begin + size]
        mean = math.fsum(y for _, y in bucket) / len(bucket)
        ends = min(lows[begin : begin + size]), max(highs[begin : begin + size])
        columns.append(Column(bucket[0][0], bucket[-1][0], mean, *ends))
    return columns


def nice_ticks(low: float, high: float, target: int = 4) -> list[float]:
    """Round numbers inside low..high: 1, 2 or 5 times a power of ten apart, about `target` gaps."""
    span = high - low
    if not span > 0:
        return [low]
    rough = span / target
    power = 10.0 ** math.floor(math.log10(rough))
    gap = min((m * power for m in (1, 2, 5, 10)), key=lambda g: abs(g - rough))
    first = math.ceil(low / gap - 1e-9)
    return [round(k * gap, 12) for k in range(first, math.floor(high / gap + 1e-9) + 1)]


def smooth(points: Sequence[Point]) -> list[Point]:
    """Centred moving median over about a twelfth of the points: unlike a mean it keeps the step of a jump."""
    half = max(1, len(points) // 24)
    windows = [points[max(0, i - half) : i + half + 1] for i in range(len(points))]
    return [(x, median(y for _, y in window)) for (x, _), window in zip(points, windows, strict=True)]


def _frame(x_range: Point, y_range: Point, height: int, *, is_fixed: bool) -> Frame:
    x_low, x_high = x_range
    if x_high <= x_low:
        x_low, x_high = x_low - 0.5, x_low + 0.5
    low, high = y_range
    num_gaps = 4 if height > 160 else 2
    if not is_fixed:
        if high - low < 1e-12 * max(1.0, abs(high)):
            pad = abs(high) * 0.1
            low, high = (low - pad, high + pad) if pad else (0.0, 1.0)
        # The axis ends on ticks, so that no curve touches the frame.
        ticks = nice_ticks(low, high, num_gaps)
        gap = ticks[1] - ticks[0] if len(ticks) > 1 else high - low
        low, high = math.floor(low / gap + 1e-9) * gap, math.ceil(high / gap - 1e-9) * gap
    return Frame((x_low, x_high), (low, high), height, nice_ticks(low, high, num_gaps))


def _axes(frame: Frame, show: Callable[[float], str]) -> Markup:
    right, bottom = WIDTH - _RIGHT, frame.height - _BOTTOM
    label = Markup('<text x="{}" y="{}" class="{}">{}</text>')
    parts = []
    for tick in frame.ticks:
        y = _n(frame.y(tick))
        parts.append(Markup('<path class="grid" d="M{} {}H{}"/>').format(_LEFT, y, right))
        parts.append(
            Markup('<text x="{}" y="{}" dy="4" class="end">{}</text>').format(_LEFT - 6, y, show(tick))
        )
    low, high = frame.x_range
    steps = [tick for tick in nice_ticks(low, high, 6) if tick == int(tick)] or [round(low)]
    for tick in steps:
        anchor = "end" if frame.x(tick) > right - 16 else "middle"
        parts.append(label.format(_n(frame.x(tick)), bottom + 16, anchor, f"{tick:,.0f}"))
    parts.append(label.format(_LEFT - 14, bottom + 16, "end", "step"))
    parts.append(Markup('<path class="axis" d="M{} {}H{}"/>').format(_LEFT, bottom, right))
    return Markup("").join(parts)


def _band(frame: Frame, color: int, columns: Sequence[Column]) -> Markup:
    there = [f"{_n(frame.x(c.x))},{_n(frame.y(c.high))}" for c in columns]
    back = [f"{_n(frame.x(c.x))},{_n(frame.y(c.low))}" for c in reversed(columns)]
    if len(columns) == 1:
        return Markup('<path class="line c{}" d="M{} L{}"/>').format(color, there[0], back[0])
    return Markup('<polygon class="band c{}" points="{}"/>').format(color, " ".join(there + back))


def _bars(frame: Frame, color: int, columns: Sequence[Column], heights: Sequence[float]) -> Markup:
    """Bars from the axis up, as one path; wide ones stand apart, narrow ones touch."""
    pitch = frame.x(frame.x_range[0] + 1) - _LEFT
    path = []
    for c, height in zip(columns, heights, strict=True):
        half = (c.last - c.first + 1) * pitch / 2
        half -= 1 if half > 4 else 0
        left, right = max(_LEFT, frame.x(c.x) - half), min(WIDTH - _RIGHT, frame.x(c.x) + half)
        path.append(f"M{_n(left)} {_n(frame.y(frame.y_range[0]))}V{_n(frame.y(height))}H{_n(right)}")
        path.append(f"V{_n(frame.y(frame.y_range[0]))}z")
    return Markup('<path class="fill c{}" d="{}"/>').format(color, "".join(path))


def _line(frame: Frame, points: Sequence[Point], kind: str) -> Markup:
    text = " ".join(f"{_n(frame.x(x))},{_n(frame.y(y))}" for x, y in points)
    return Markup('<polyline class="line {}" points="{}"/>').format(kind, text)


def _dot(frame: Frame, point: Point, color: int) -> Markup:
    x, y = _n(frame.x(point[0])), _n(frame.y(point[1]))
    return Markup('<circle class="dot c{}" cx="{}" cy="{}" r="2.5"/>').format(color, x, y)


def _tooltips(
    frame: Frame, drawn: Sequence[tuple[str, Sequence[Column]]], show: Callable[[float], str]
) -> Markup:
    """An invisible bar per column that carries every series' value in its <title>."""
    texts: dict[float, list[str]] = {}
    for label, columns in drawn:
        for c in columns:
            span = f"step {c.first:,.0f}" + (f" to {c.last:,.0f}" if c.last > c.first else "")
            interval = f" [{show(c.low)}, {show(c.high)}]" if c.high > c.low else ""
            texts.setdefault(c.x, [span]).append(f"{label}: {show(c.mean)}{interval}")
    xs = sorted(texts)
    edges = [frame.x_range[0], *((a + b) / 2 for a, b in itertools.pairwise(xs)), frame.x_range[1]]
    bars = [
        Markup('<rect class="hit" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
            _n(frame.x(left)),
            _TOP,
            _n(max(0.0, frame.x(right) - frame.x(left))),
            frame.height - _TOP - _BOTTOM,
            "\n".join(texts[x]),
        )
        for x, left, right in zip(xs, edges, edges[1:], strict=False)
    ]
    return Markup("").join(bars)


def _svg(width: int, height: int, body: Sequence[Markup], kind: str = "plot") -> Markup:
    head = Markup('<svg class="{}" viewBox="0 0 {} {}" role="img">').format(kind, width, height)
    return head + Markup("").join(escape(part) for part in body) + Markup("</svg>")


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
