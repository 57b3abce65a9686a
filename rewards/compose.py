"""Combines several rewards of a completion into one: weights, gates, clipping. `Reward.parts` holds each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rl.types import Reason, Reward


@dataclass(frozen=True)
class RewardSpec:
    """One reward of a run.

    Attributes:
        name: built-in name, entry point of group `cohort.rewards`, or `module:callable`.
        weight: factor in the sum; 0 makes it a metric: logged, and no reason to abstain.
        requires: name of a reward that must be > 0 for this one to count (else it counts 0).
        options: arguments that are the same for every sample.
        clip: (low, high) bounds of the score before its weight, or None. `parts` holds the unclipped score.
        origin: where to find a function that a program passed under `name` (`rewards.functions`).
    """

    name: str
    weight: float = 1.0
    requires: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    clip: tuple[float, float] | None = None
    origin: Mapping[str, Any] | None = None


def reward_specs(
    settings: Iterable[Any], origins: Mapping[str, Mapping[str, Any]] | None = None
) -> list[RewardSpec]:
    """The rewards of a config; its section `rewards.functions` has the same fields, except for the origin."""
    found = origins or {}
    return [RewardSpec(**dict(one), origin=found.get(one.name)) for one in settings]


def check_specs(specs: Sequence[RewardSpec]) -> None:
    """
    Raises:
        ValueError: there is no reward, a name occurs twice, a weight or clip is not a number, or gates name
            unknown rewards or form a circle.
    """
    if not specs:
        raise ValueError("a run needs at least one reward, such as RewardSpec('math')")
    by_name = {spec.name: spec for spec in specs}
    for spec in specs:
        this = f"reward {spec.name!r}"
        if sum(other.name == spec.name for other in specs) > 1:
            raise ValueError(f"{this} is listed twice, and parts are told apart by name; list it once")
        if not abs(spec.weight) <= 1e9:
            raise ValueError(f"{this}: weight={spec.weight} must be a number such as 1.0")
        if spec.clip is not None and not spec.clip[0] <= spec.clip[1]:
            raise ValueError(f"{this}: clip={spec.clip} must be (low, high), such as (0.0, 1.0)")
        if spec.requires is not None and spec.requires not in by_name:
            raise ValueError(f"{this} requires {spec.requires!r}, which is not among {list(by_name)}")
        path = [spec.name]
        while (needed := by_name[path[-1]].requires) is not None:
            if needed in path:
                circle = " -> ".join([*path, needed])
                raise ValueError(f"rewards require each other in a circle: {circle}; drop one")
            path.append(needed)


def compose(specs: Sequence[RewardSpec], parts: Mapping[str, Reward]) -> Reward:
    """sum_i weight_i * clip_i(score_i) over the parts whose gate holds.

    A part that does not apply (TRL's None) is left out of the sum; as a gate it is open. If a part abstains
    for any other reason, so does the whole, unless the part has weight 0 and gates nothing that counts. If no
    part applies, neither does the whole. Reason and extracted answer come from the first part with a weight.
    Rewards per turn exist only if there is a single part: they are its own, times its weight.
    """
    by_name = {spec.name: spec for spec in specs}
    scores = {spec.name: parts[spec.name].score for spec in specs}
    elapsed_ms = sum(part.elapsed_ms for part in parts.values())
    counting = _counting(specs)
    for name in counting:
        part = parts[name]
        if part.score is None and part.reason is not Reason.NOT_APPLICABLE:
            detail = f"{name}: {part.detail}" if len(specs) > 1 else part.detail
            return Reward(None, part.reason, detail, part.extracted, elapsed_ms, scores)
    applicable = [spec for spec in specs if spec.weight and scores[spec.name] is not None]
    main = parts[next((spec.name for spec in specs if spec.weight), specs[0].name)]
    detail = main.detail
    if len(specs) > 1:
        detail = "; ".join(f"{name}: {part.detail}" for name, part in parts.items() if part.detail)
    if not applicable:
        return Reward(None, Reason.NOT_APPLICABLE, detail, main.extracted, elapsed_ms, scores)
    total = sum(spec.weight * _counted(spec, by_name, scores) for spec in applicable)
    turns: tuple[float | None, ...] = ()
    if len(specs) == 1:
        turns = tuple(None if turn is None else specs[0].weight * turn for turn in main.turns)
    return Reward(total, main.reason, detail, main.extracted, elapsed_ms, scores, turns)


def _counting(specs: Sequence[RewardSpec]) -> list[str]:
    """Names of the parts that can change the sum: those with a weight, and the gates before them."""
    by_name = {spec.name: spec for spec in specs}
    counting: list[str] = []
    for spec in specs:
        name: str | None = spec.name if spec.weight else None
        while name is not None and name not in counting:
            counting.append(name)
            name = by_name[name].requires
    return counting


def _counted(spec: RewardSpec, by_name: Mapping[str, RewardSpec], scores: Mapping[str, Any]) -> float:
    """The part's clipped score, or 0 if its gate is closed; a gate whose own gate is closed is closed too."""
    score = scores[spec.name]
    if score is None:
        return math.inf  # only gates come here: a rule that does not apply is an open gate
    if spec.requires is not None and _counted(by_name[spec.requires], by_name, scores) <= 0:
        return 0.0
    return score if spec.clip is None else min(max(score, spec.clip[0]), spec.clip[1])
