"""The numbers of a step, from its scored groups: rewards and their parts, group outcomes, lengths, staleness,
faults.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from rl.advantages import group_outcome
from rl.config import AdvantageConfig
from rl.types import Completion, Reason, Reward, ScoredGroup
from rl.world import World

NO_FAULT = {Reason.NOT_APPLICABLE, Reason.BAD_GOLD}
COUNTS = {
    "replaced": "rollout/replaced",
    "in_flight": "rollout/in_flight",
    "over_age": "staleness/over_age",
}
Sum = Callable[[list[float]], list[float]]


def is_fault(completion: Completion, reward: Reward) -> bool:
    """Whether the grader failed, as opposed to abstaining by right or never being asked."""
    return reward.score is None and completion.finish_reason != "abort" and reward.reason not in NO_FAULT


def group_metrics(
    groups: Sequence[ScoredGroup],
    *,
    step: int,
    config: AdvantageConfig,
    weights: Mapping[str, float],
    world: World,
    counts: Mapping[str, float],
) -> dict[str, float]:
    """Means and extremes over the completions of all processes; a mean over nothing is left out.

    `counts` is what the source of this process counted; all processes count the same things.
    """
    pairs = [(c, r) for g in groups for c, r in zip(g.completions, g.rewards, strict=True)]
    live = [c for c, _ in pairs if c.finish_reason != "abort"]
    scores = [r.score for c, r in pairs if r.score is not None and c.finish_reason != "abort"]
    outcomes = [group_outcome(g, config=config, weights=weights) for g in groups]
    lengths = [len(c.token_ids) for c in live]
    ages = [(step - span.policy_version, span.num_tokens) for c in live for span in c.version_spans]
    ratios: dict[str, tuple[float, float]] = {
        "reward/mean": (math.fsum(scores), len(scores)),
        "_squares": (math.fsum(s * s for s in scores), len(scores)),
        "reward/abstained": (sum(r.score is None for _, r in pairs), len(pairs)),
        "groups/all_right": (outcomes.count("all_right"), len(groups)),
        "groups/all_wrong": (outcomes.count("all_wrong"), len(groups)),
        "groups/without_spread": (len(groups) - outcomes.count("mixed"), len(groups)),
        "completion/length_mean": (sum(lengths), len(lengths)),
        "completion/truncated_share": (sum(c.finish_reason == "length" for c in live), len(live)),
        "completion/aborted": (len(pairs) - len(live), len(pairs)),
        "staleness/mean": (sum(age * n for age, n in ages), sum(n for _, n in ages)),
    }
    for name in weights:
        parts = [p for _, r in pairs if (p := r.parts.get(name)) is not None]
        ratios[f"reward/{name}/mean"] = (math.fsum(parts), len(parts))
    flat = world.sum([float(x) for pair in ratios.values() for x in pair])
    totals = dict(zip(ratios, zip(flat[::2], flat[1::2], strict=True), strict=True))
    values = {name: total / count for name, (total, count) in totals.items() if count}
    if (square := values.pop("_squares", None)) is not None:
        values["reward/std"] = math.sqrt(max(0.0, square - values["reward/mean"] ** 2))
    longest, shortest, oldest = world.max(
        [
            float(max(lengths, default=0)),
            -float(min(lengths, default=0)),
            float(max((age for age, _ in ages), default=0)),
        ]
    )
    values |= {
        "completion/length_max": longest,
        "completion/length_min": -shortest,
        "staleness/max": oldest,
        "tokens/completion": totals["completion/length_mean"][0],
    }
    counted = {metric: counts[name] for name, metric in COUNTS.items() if name in counts}
    return values | dict(zip(counted, world.sum(list(counted.values())), strict=True))


def check_faults(groups: Sequence[ScoredGroup], max_share: float, sum_over_processes: Sum) -> None:
    """Raises RuntimeError, with examples, if more than `max_share` of the graded completions met a failing
    grader.
    """
    faults = [r for g in groups for c, r in zip(g.completions, g.rewards, strict=True) if is_fault(c, r)]
    graded = sum(c.finish_reason != "abort" for g in groups for c in g.completions)
    num_faults, num_graded = sum_over_processes([float(len(faults)), float(graded)])
    if num_graded and num_faults / num_graded > max_share:
        examples = sorted({f"{r.reason}: {r.detail}" for r in faults})[:3]
        raise RuntimeError(
            f"graders failed on {num_faults:.0f} of {num_graded:.0f} completions, more than "
            f"rewards.max_fault_share={max_share}: {'; '.join(examples) or 'see the other processes'}. "
            "Nothing was trained on this step; "
            "mend the reward function (`cohort score` runs it on saved rows) and start again: the run resumes"
        )
