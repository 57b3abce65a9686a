"""The numbers of a step, from its scored groups: rewards and their parts, group outcomes, lengths, staleness,
faults.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from rl.advantages import group_outcome
from rl.config import AdvantageConfig
from rl.run import Run
from rl.types import Completion, Reason, Reward, ScoredGroup
from rl.update import UpdateResult
from rl.world import World

NO_FAULT = {Reason.NOT_APPLICABLE, Reason.BAD_GOLD}
COUNTS = {
    "replaced": "rollout/replaced",
    "in_flight": "rollout/in_flight",
    "over_age": "staleness/over_age",
}
Sum = Callable[[list[float]], list[float]]


def grader_faults(groups: Sequence[ScoredGroup]) -> tuple[list[Reward], int]:
    """Verdicts that are missing because a grader failed, not because it abstained by right; and how many
    completions were graded, those that the engine aborted left out.
    """
    graded = [r for c, r in _pairs(groups) if c.finish_reason != "abort"]
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

    `rejected` are groups that dynamic sampling replaced: they count among the outcomes of groups, the faults
    of graders and the sampled tokens, and in nothing else.
    `counts` is what the source of this process counted; all processes count the same things.
    """
    pairs = _pairs(groups)
    live = [c for c, _ in pairs if c.finish_reason != "abort"]
    scores = [r.score for c, r in pairs if r.score is not None and c.finish_reason != "abort"]
    sampled = [*groups, *rejected]
    outcomes = [group_outcome(g, config=config, weights=weights) for g in sampled]
    faults, num_graded = grader_faults(sampled)
    lengths = [len(c.token_ids) for c in live]
    ages = [(step - span.policy_version, span.num_tokens) for c in live for span in c.version_spans]
    scored = {"reward": scores}
    scored |= {
        f"reward/{name}": [p for _, r in pairs if (p := r.parts.get(name)) is not None] for name in weights
    }
    ratios: dict[str, tuple[float, float]] = {
        "reward/abstained": (sum(r.score is None for _, r in pairs), len(pairs)),
        "graders/faults": (len(faults), num_graded),
        "groups/all_right": (outcomes.count("all_right"), len(outcomes)),
        "groups/all_wrong": (outcomes.count("all_wrong"), len(outcomes)),
        "groups/without_spread": (len(outcomes) - outcomes.count("mixed"), len(outcomes)),
        "completion/length_mean": (sum(lengths), len(lengths)),
        "completion/truncated_share": (sum(c.finish_reason == "length" for c in live), len(live)),
        "completion/aborted": (len(pairs) - len(live), len(pairs)),
        "staleness/mean": (sum(age * n for age, n in ages), sum(n for _, n in ages)),
        "_tokens": (sum(len(c.token_ids) for c, _ in _pairs(sampled)), 1),
    }
    for name, numbers in scored.items():
        ratios[f"{name}/mean"] = (math.fsum(numbers), len(numbers))
        ratios[f"_{name}/squares"] = (math.fsum(x * x for x in numbers), len(numbers))
    flat = world.sum([float(x) for pair in ratios.values() for x in pair])
    totals = dict(zip(ratios, zip(flat[::2], flat[1::2], strict=True), strict=True))
    values = {name: t / count for name, (t, count) in totals.items() if count and not name.startswith("_")}
    longest, shortest, oldest, *ends = world.max(
        [
            float(max(lengths, default=0)),
            -float(min(lengths, default=0)),
            float(max((age for age, _ in ages), default=0)),
            *(end for x in scored.values() for end in (max(x, default=-math.inf), -min(x, default=math.inf))),
        ]
    )
    for name, high, low in zip(scored, ends[::2], ends[1::2], strict=True):
        square, count = totals[f"_{name}/squares"]
        if count:  # equal scores have a spread of 0 to the last bit, which the squares do not give
            spread = max(0.0, square / count - values[f"{name}/mean"] ** 2) if high > -low else 0.0
            values[f"{name}/std"] = math.sqrt(spread)
    values |= {
        "completion/length_max": longest,
        "completion/length_min": -shortest,
        "staleness/max": oldest,
        "tokens/completion": totals["_tokens"][0],
    }
    counted = {metric: counts[name] for name, metric in COUNTS.items() if name in counts}
    return values | dict(zip(counted, world.sum(list(counted.values())), strict=True))


def check_faults(groups: Sequence[ScoredGroup], max_share: float, sum_over_processes: Sum) -> str:
    """A sentence with examples if graders failed on some of the completions, else "".

    Raises:
        RuntimeError: on more than `max_share` of them. A single failure is not enough, though in a small step
            it is a large share, unless `max_share` is 0.
    """
    faults, num_graded = grader_faults(groups)
    total_faults, total_graded = sum_over_processes([float(len(faults)), float(num_graded)])
    if not total_faults:
        return ""
    examples = sorted({f"{r.reason}: {r.detail}" for r in faults})[:3]
    sentence = f"graders failed on {total_faults:.0f} of {total_graded:.0f} completions"
    shown = "; ".join(examples) or "see the other processes"
    if total_faults <= max_share * total_graded or (total_faults == 1 and max_share > 0):
        return f"{sentence}, which count in nothing: {shown}"
    raise RuntimeError(
        f"{sentence}, more than rewards.max_fault_share={max_share}: {shown}. Nothing was trained on this "
        "step; mend the reward function (`cohort score` runs it on saved rows) and start again: the run "
        "resumes"
    )


def check_update(run: Run, step: int, update: UpdateResult) -> None:
    """Counts skipped optimizer steps. The ledger of the step holds the batch.

    Raises:
        RuntimeError: `train.max_bad_steps` steps in a row were skipped.
    """
    run.skipped_steps += update.bad_steps
    run.bad_steps_in_row = run.bad_steps_in_row + 1 if update.bad_steps else 0
    if update.bad_steps:
        where = f"the batch is in {run.ledger.folder}/step-{step:06d}-rank*.jsonl.gz"
        run.observer.warn(f"step {step + 1}: loss or gradient not finite, update skipped; {where}")
        if run.bad_steps_in_row >= run.config.train.max_bad_steps:
            raise RuntimeError(
                f"{run.bad_steps_in_row} steps in a row had a non-finite loss or gradient; {where}. Nothing "
                "non-finite was saved. Lower optimizer.lr or optimizer.max_grad_norm, or use "
                "model.dtype=fp32, and start again from the newest checkpoint in a new run_dir"
            )
