"""The figures of a report: is the model better, is there signal, is training stable, what takes time.

This file names their curves; the page draws them (`charts.js`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from rl.report.history import Curve, is_own
from rl.report.verdict import Row, series_of
from rl.store.metrics import METRICS, shown_metric
from rl.store.redact import show_controls

_MAX_PARTS = 6
_PHASES = ("sample", "score", "pack", "train", "sync", "save", "eval")
_LENGTHS = ("completion/length_min", "completion/length_max")
_GROUPS = ("groups/with_spread", "groups/all_wrong", "groups/all_right", "groups/no_verdict")


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot of a card.

    Attributes:
        lines: label -> metric; the plot has the unit of the first one.
        kind: "lines", "strip" (a low plot that shares its card with another) or "bars" (stacked).
        band: metrics at the ends of an interval around the first line.
        is_share: the vertical axis goes from 0 to 1.
    """

    lines: Mapping[str, str]
    kind: str = "lines"
    band: tuple[str, str] | None = None
    is_share: bool = False


strip = partial(Panel, kind="strip")
FIGURES: tuple[tuple[str, str, tuple[Panel, ...]], ...] = (
    (
        "Held-out accuracy",
        "The number that counts. The band is the 95 % interval: a rise within it may be luck.",
        (Panel({"accuracy": "heldout/accuracy"}, band=("heldout/low", "heldout/high")),),
    ),
    (
        "Reward",
        "On the training prompts. If it rises while the held-out accuracy is flat, it is being gamed.",
        (Panel({"mean": "reward/mean"}),),
    ),
    (
        "Bound on the training text",
        "Nats per maskable token; the negative log-likelihood is at most this. Steps are noisy.",
        (Panel({"bound": "diffusion/bound"}),),
    ),
    (
        "Do groups teach?",
        "Only groups with spread give a gradient; too easy and too hard groups waste samples.",
        (Panel({name[7:].replace("_", " "): name for name in _GROUPS}, "bars", is_share=True),),
    ),
    (
        "Exploration and drift",
        "Entropy falls slowly in a healthy run. KL is the distance from the reference model.",
        (strip({"entropy": "policy/entropy"}), strip({"KL": "policy/kl"})),
    ),
    (
        "Completion length",
        "Cut completions are usually wrong; a length that creeps to the limit is being rewarded.",
        (
            Panel({"mean, shortest to longest": "completion/length_mean"}, band=_LENGTHS),
            strip({"cut by the limit": "completion/truncated_share"}, is_share=True),
        ),
    ),
    (
        "Time per step",
        "Sampling usually dominates; a tall score bar means that graders hold up the run.",
        (
            Panel({name: f"time/{name}" for name in _PHASES}, "bars"),
            strip({"speed": "tokens/per_second"}),
        ),
    ),
    (
        "Clipped tokens",
        "Zero with one update per batch, since the ratio is then 1.",
        (Panel({"all": "policy/clip_fraction", "low": "policy/clip_low", "high": "policy/clip_high"}),),
    ),
    (
        "Does the sampler match the policy?",
        "Both compute the same log-probs up to rounding, and up to what the policy moved in "
        "train.max_staleness steps. A jump means wrong or stale weights.",
        (
            Panel(
                {"log-prob gap": "sampler/logprob_gap_mean", "mismatch KL": "sampler/mismatch_kl"}, "strip"
            ),
            strip({"ratio, mean": "sampler/ratio_mean"}),
        ),
    ),
)
"""Figures shown at once: title, how to read it, the plots. Other metrics have a figure each, folded away."""


def with_derived(curves: Mapping[str, Curve], evaluations: Sequence[Row]) -> dict[str, Curve]:
    """The curves, and those derived from them: shares of groups by outcome, and held-out results."""
    found = dict(curves)
    for end in ("accuracy", "low", "high"):
        if points := series_of(evaluations, end):
            found[f"heldout/{end}"] = [[step for step, _ in points], [value for _, value in points]]
    if "groups/without_spread" in curves:
        steps, same = curves["groups/without_spread"][:2]
        known = [dict(zip(*curves.get(name, [[], []])[:2], strict=True)) for name in _GROUPS[1:3]]
        wrong, right = ([shares.get(step, 0.0) for step in steps] for shares in known)
        rest = [max(0.0, s - w - r) for s, w, r in zip(same, wrong, right, strict=True)]
        shares = ([1 - s for s in same], wrong, right, rest if any(v > 1e-9 for v in rest) else [])
        found |= {name: [steps, values] for name, values in zip(_GROUPS, shares, strict=True) if values}
    return found


def build_figures(curves: Mapping[str, Curve]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The figures to show at once and those to fold away; figures without data are left out."""
    used: set[str] = set()
    first = []
    for title, note, panels in FIGURES:
        drawn = [_with_parts(panel, curves) for panel in panels]
        used |= {name for panel in drawn for name in (*panel.lines.values(), *(panel.band or ()))}
        first.append(_figure(title, note, drawn, curves))
    used |= {"groups/without_spread", "time/step"}
    rest = [name for name in (*METRICS, *sorted(filter(is_own, curves))) if name not in used]
    more = [_figure(shown_metric(name).description, "", [strip({name: name})], curves) for name in rest]
    return list(filter(None, first)), list(filter(None, more))


def overlays(runs: Sequence[Mapping[str, Curve]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Figures of a single metric, in which the curves of several runs lie on top of each other."""
    every = {name: curve for run in runs for name, curve in run.items()}
    first = []
    for title, note, panels in FIGURES:
        drawn = [_with_parts(panel, every) for panel in panels]
        apart = [replace(p, lines={k: n}, kind="strip") for p in drawn for k, n in p.lines.items()]
        apart = [replace(panel, band=None) for panel in apart] if len(apart) > 1 else drawn
        first.append(_figure(title, note, apart, every))
    return list(filter(None, first)), build_figures(every)[1]


def _with_parts(panel: Panel, curves: Mapping[str, Curve]) -> Panel:
    """Adds up to six reward parts to the plot of rewards; a single part would only repeat the mean."""
    if "reward/mean" not in panel.lines.values():
        return panel
    names = sorted(name for name in curves if re.fullmatch(r"reward/.+/mean", name, re.DOTALL))
    parts = {show_controls(name[len("reward/") : -len("/mean")]): name for name in names}
    kept = dict(list(parts.items())[:_MAX_PARTS]) if len(parts) > 1 else {}
    return replace(panel, lines={**panel.lines, **kept})


def _figure(
    title: str, note: str, panels: Sequence[Panel], curves: Mapping[str, Curve]
) -> dict[str, Any] | None:
    drawn = []
    for panel in panels:
        if lines := [[label, name] for label, name in panel.lines.items() if name in curves]:
            band = panel.band if panel.band and all(name in curves for name in panel.band) else None
            unit = shown_metric(lines[0][1]).unit or ("share" if panel.is_share else "")
            drawn.append(asdict(panel) | {"lines": lines, "band": band, "unit": unit})
    return {"title": show_controls(title), "note": note, "panels": drawn} if drawn else None
