"""Held-out accuracy of a run. It has its own prompts and sampling, and leaves the training stream alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from recipes.evaluation.statistics import Sampled, gathered, paired, summary
from recipes.sources import sampling_params
from rewards.pool.pool import RewardPool
from rl.config import Config
from rl.record import check_faults
from rl.store.folder import Evaluation, write_atomically
from rl.store.ledger import Ledger
from rl.types import Prompt, ScoredGroup
from rl.world import World
from rollout.engine import Engine
from rollout.source import is_engine_fault, sample_and_score

MAX_KEPT = 2048  # completions of an evaluation that are kept for the report, those of the first prompts
FIRST = "evaluations/scores-000000.json"  # of the run folder: mean score of each prompt at step 0


def make_evaluator(
    config: Config,
    world: World,
    *,
    engine: Engine,
    scorer: RewardPool,
    prompts: list[Prompt],
    ends: Sequence[int],
) -> Any:
    """Measures the held-out prompts at a step; None without prompts."""
    if not prompts:
        return None
    e = config.evaluation
    kept = Ledger(config.run_dir, world.rank, world.size, folder="evaluations")

    def evaluate(step: int) -> Evaluation:
        faulty = scorer.faults.num_faulty
        groups = sample_and_score(
            engine,
            scorer,
            prompts,
            sampling_params(e.sampling, ends),
            num_samples=e.num_samples,
            seed=config.train.seed,
            first=world.rank,
            stride=world.size,
        )
        check_faults(groups, config.rewards.max_fault_share, world.sum)
        num_faulty, why = scorer.faults.num_faulty - faulty, scorer.faults.examples
        check_real_rewards(num_faulty, len(prompts) * e.num_samples, config, world, why=why)
        check_finished(groups, config, world)
        some = groups[: max(1, MAX_KEPT // e.num_samples // world.size)]
        kept.write(step, some, cursor_before=None, cursor_after=None, policy_version=step)
        sampled = gathered([Sampled.of(group, e.metric) for group in groups], world)
        found, gain = summary(sampled), gain_since_first(step, sampled, config.run_dir, world)
        low, high = (found["avg"][end] for end in ("low", "high"))
        shares = {name: found[name] for name in ("n", "truncated", "abstained", "mean_tokens")}
        return Evaluation(step, found["avg"]["value"], low, high, **shares, **gain)

    return evaluate


def gain_since_first(step: int, sampled: Sequence[Sampled], run_dir: Path, world: World) -> dict[str, Any]:
    """Keeps each prompt's mean score of step 0; later: the gain since then, as fields of `Evaluation`."""
    path, scores = run_dir / FIRST, {one.id: fmean(one.graded) for one in sampled if one.graded}
    before: dict[str, float] = {}
    if world.is_main and step == 0:
        write_atomically(path, json.dumps(scores))
    elif world.is_main:
        with suppress(OSError, ValueError):  # the run folder of an earlier version has none
            before = json.loads(path.read_text())
    both = [key for key in scores if key in before]
    if not both:
        return {}
    found = paired([before[key] for key in both], [scores[key] for key in both])
    ends = {f"gain_{name}": found[name] for name in ("low", "high", "p")}
    return {"gain": found["difference"], "paired": len(both), **ends}


def check_real_rewards(
    num_faulty: int, num_graded: int, config: Config, world: World, *, why: Iterable[str]
) -> None:
    """Raises RuntimeError if too many graders failed in a control arm, whose own rewards do not show it."""
    (total,), limit = world.sum([float(num_faulty)]), config.rewards.max_fault_share
    if config.rewards.control != "none" and total > limit * num_graded:
        raise RuntimeError(
            f"graders failed on {total:.0f} of {num_graded} held-out completions, more than "
            f"rewards.max_fault_share={limit:g}, so that the arm cannot be measured: "
            + ("; ".join(sorted(set(why))) or "see the other processes")
        )


def check_finished(groups: list[ScoredGroup], config: Config, world: World) -> None:
    """Raises RuntimeError if a held-out completion is missing: it would count as wrong."""
    faults = [is_engine_fault(c) for group in groups for c in group.group.completions]
    missing, num = world.sum([float(sum(faults)), float(len(faults))])
    if missing:
        raise RuntimeError(
            f"the engine did not finish {missing:.0f} of {num:.0f} held-out completions within "
            f"engine.timeout_s={config.engine.timeout_s:g} (or their logits were not finite), and they would "
            "count as wrong; raise engine.timeout_s, or lower evaluation.data.size"
        )
