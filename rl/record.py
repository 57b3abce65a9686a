"""The metrics of a step's groups: rewards and their parts, outcomes, lengths, staleness, faults."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rl.advantages import ReduceMoments, group_outcome
from rl.config import AdvantageConfig
from rl.types import Completion, Reason, Reward, ScoredGroup
from rl.world import World

NO_FAULT = {Reason.NOT_APPLICABLE, Reason.BAD_GOLD}
COUNTS = {"replaced": "rollout/replaced", "in_flight": "rollout/in_flight"}


def grader_faults(groups: Sequence[ScoredGroup]) -> tuple[list[Reward], int]:
    """Rewards that are missing because a grader or environment failed, not because it rightly abstained.
    Also the number of graded completions, without those that the engine aborted.
    """
    graded = [r for c, r in _pairs(groups) if c.finish_reason != "abort" or "fault" in c.facts]
    return [r for r in graded if r.score is None and r.reason not in NO_FAULT], len(graded)


def _pairs(groups: Sequence[ScoredGroup]) -> list[tuple[Completion, Reward]]:
    return [pair for group in groups for pair in zip(group.completions, group.rewards, strict=True)]


def group_metrics(
    groups: Sequence[ScoredGroup],
    *,
    rejected: Sequence[ScoredGroup] = (),
    step: int,
    config: AdvantageConfig,
    weights: Mapping[str, float],
    world: World,
    counts: Mapping[str, float],
) -> dict[str, float]:
    """Means and extremes over the completions of all processes; a mean over nothing is left out.

    `rejected` are groups that dynamic sampling replaced: they count only in the outcomes of groups, the
    faults of graders and the sampled tokens.
    `counts` is what the source of this process counted, under the same names on all processes.
    """
    pairs, sampled = _pairs(groups), [*groups, *rejected]
    live = [(c, r) for c, r in pairs if c.finish_reason != "abort"]
    outcomes = [group_outcome(g, config=config, weights=weights) for g in sampled]
    faults, num_graded = grader_faults(sampled)
    scored = {"reward": [r.score for _, r in live if r.score is not None]} | {
        f"reward/{name}": [p for _, r in pairs if (p := r.parts.get(name)) is not None] for name in weights
    }
    lengths = [c.num_sampled for c, _ in live]
    spans = [span for c, _ in live for row in c.rows for span in row.version_spans]
    ages = [(step - span.policy_version, span.num_tokens) for span in spans]
    ratios = {
        "graders/faults": (len(faults), num_graded),
        "completion/length_mean": (sum(lengths), len(lengths)),
        "completion/truncated_share": (sum(c.finish_reason == "length" for c, _ in live), len(live)),
        "completion/aborted": (len(pairs) - len(live), len(pairs)),
        "staleness/mean": (sum(age * n for age, n in ages), sum(n for _, n in ages)),
    }
    if any(weights.values()):  # otherwise only a teacher gives a signal
        ratios |= {
            "reward/abstained": (sum(r.score is None for _, r in live), len(live)),
            "groups/all_right": (outcomes.count("all_right"), len(outcomes)),
            "groups/all_wrong": (outcomes.count("all_wrong"), len(outcomes)),
            "groups/without_spread": (len(outcomes) - outcomes.count("mixed"), len(outcomes)),
        }
    oldest = max((age for age, _ in ages), default=0)
    maxima = {"completion/length_max": max(lengths, default=0), "staleness/max": oldest}
    minima = {"completion/length_min": min(lengths)} if lengths else {}
    counted = {metric: counts[name] for name, metric in COUNTS.items() if name in counts}
    counted["tokens/completion"] = sum(c.num_sampled for c, _ in _pairs(sampled))
    values = _moments(scored, world) | world.merged(ratios, maxima=maxima, minima=minima)
    values |= _episode_metrics([c for c, _ in live], world)
    return values | dict(zip(counted, world.sum(list(counted.values())), strict=True))


def _episode_metrics(completions: Sequence[Completion], world: World) -> dict[str, float]:
    """Turns and tool calls per episode, and each tool's seconds in the step; empty without episodes."""
    counts: Counter[Any] = Counter()
    for facts in (c.facts for c in completions if isinstance(c.facts.get("counts"), Mapping)):
        counts.update({"/episodes": 1, "/turns": len(facts["rewards"]), "/tools": "tools" in facts})
        counts.update(dict(zip(("/sampling", "/idle"), facts.get("seconds", (0, 0)), strict=True)))
        counts.update(facts["counts"])
    total: Counter[Any] = Counter()
    for found in world.gather(dict(counts)):
        total.update(found)
    if not total["/episodes"]:
        return {}
    tools = [name.removeprefix("seconds/") for name in total if name.startswith("seconds/")]
    values: dict[str, float] = {f"tools/{name}/seconds": total[f"seconds/{name}"] for name in tools}
    values["episode/turns"] = total["/turns"] / total["/episodes"]
    if total["/sampling"]:
        values["episode/wait_share"] = total["/idle"] / total["/sampling"]
    if total["calls"] or total["/tools"]:
        values["tools/calls"] = total["calls"] / total["/episodes"]
    if total["calls"]:
        values["tools/failed"] = (total["malformed"] + total["tool_errors"]) / total["calls"]
    return values


def _moments(scored: Mapping[str, Sequence[float]], world: World) -> dict[str, float]:
    """Mean and standard deviation of scores by name; the deviation of equal scores is exactly 0."""
    found, values = world.gather(scored), {}
    for name in scored:
        numbers = [x for of_process in found for x in of_process[name]]
        if numbers:
            mean = values[f"{name}/mean"] = math.fsum(numbers) / len(numbers)
            squares = math.fsum((x - mean) ** 2 for x in numbers) if max(numbers) > min(numbers) else 0.0
            values[f"{name}/std"] = math.sqrt(squares / len(numbers))
    return values


def check_faults(groups: Sequence[ScoredGroup], max_share: float, sum_over_processes: ReduceMoments) -> str:
    """A sentence with examples if graders failed on some of the completions, else "".

    Raises:
        RuntimeError: they failed on more than `max_share` of them. A single failure, which is a large share
            of a small step, counts only where `max_share` is 0.
    """
    faults, num_graded = grader_faults(groups)
    total_faults, total_graded = sum_over_processes([float(len(faults)), float(num_graded)])
    if not total_faults:
        return ""
    examples = sorted({f"{r.reason}: {r.detail}" for r in faults})[:3]
    sentence = f"graders failed on {total_faults:.0f} of {total_graded:.0f} completions"
    shown = "; ".join(examples) or "see the other processes"
    if total_faults <= max_share * total_graded or (total_faults == 1 and max_share > 0):
        return f"{sentence}, which are left out: {shown}"
    raise RuntimeError(
        f"{sentence}, more than rewards.max_fault_share={max_share}: {shown}. Nothing was trained on this "
        "step; fix the reward function (`cohort score` runs it on saved rows), or the tools of an "
        "environment that failed (environment.log), and start again: the run resumes"
    )
