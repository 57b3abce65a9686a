"""Rewards of a step -> advantages: one dict `ADVANTAGES`, name -> function of one group's rewards.

Numbers are Python floats (fp64): groups are tiny, and one without spread gets exactly 0 and may be skipped.
Abstained rewards (score None) and aborted completions are in no mean or deviation and get advantage 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from rl.config import AdvantageConfig
from rl.types import Advantage, Completion, ScoredGroup

STD_EPS = 1e-4
"""Added to a deviation, outside the root, as TRL does; the paper's formula divides by the bare deviation."""

Advantages = Callable[[Sequence[float]], list[float]]
"""Rewards of one group -> one advantage per reward."""

ReduceMoments = Callable[[list[float]], list[float]]
"""Sums each number over all processes, in fp64. Every process calls it equally often."""

Outcome = Literal["mixed", "all_right", "all_wrong", "unscored"]


def centered_advantages(rewards: Sequence[float]) -> list[float]:
    """r - mean(r): no division, so hard and easy prompts are not up-weighted (Dr. GRPO, arXiv:2503.20783).

    Exactly 0 for rewards that are equal up to rounding, a single one included.
    """
    if not has_spread(rewards):
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    return [r - mean for r in rewards]


def grpo_advantages(rewards: Sequence[float]) -> list[float]:
    """(r - mean(r)) / (std(r) + 1e-4), sample deviation, G - 1 (DeepSeek-R1, arXiv:2501.12948 (3))."""
    return _scaled(centered_advantages(rewards), 1 / (sample_std(rewards) + STD_EPS))


def rloo_advantages(rewards: Sequence[float]) -> list[float]:
    """r - mean of the group's other rewards = G / (G - 1) * (r - mean(r)) (RLOO, arXiv:2402.14740)."""
    return _scaled(centered_advantages(rewards), len(rewards) / max(len(rewards) - 1, 1))


def max_rl_advantages(rewards: Sequence[float]) -> list[float]:
    """(r - mean(r)) / mean(r), 0 for a group without success (MaxRL, arXiv:2602.02710 algorithm 1).

    It is derived for binary rewards: a prompt of pass rate p weighs about 1 / p, as in maximum likelihood.
    A positive factor on all rewards changes nothing.

    Raises:
        ValueError: a reward is negative; the mean could then be 0 or flip the sign.
    """
    if min(rewards, default=0.0) < 0:
        raise ValueError(
            f"advantage.name=max_rl divides by the mean, so rewards must be >= 0, not {min(rewards):g}; "
            "use rewards in [0, 1] without penalties, or advantage.name=grpo, centered or rloo"
        )
    mean = math.fsum(rewards) / max(len(rewards), 1)
    return _scaled(centered_advantages(rewards), 1 / mean if mean > 0 else 0.0)


def wd1_advantages(rewards: Sequence[float]) -> list[float]:
    """softmax(A) - softmax(-A) over the group, A = r - mean(r): the weights of log-probs in wd1
    (arXiv:2507.08838), its positive and negative terms added. 0 without spread; for loss.name=reinforce.
    """
    centered = centered_advantages(rewards)
    up, down = ([math.exp(sign * a) for a in centered] for sign in (1, -1))
    return [u / math.fsum(up) - d / math.fsum(down) for u, d in zip(up, down, strict=True)]


ADVANTAGES: dict[str, Advantages] = {
    "grpo": grpo_advantages,
    "centered": centered_advantages,
    "rloo": rloo_advantages,
    "max_rl": max_rl_advantages,
    "batch": centered_advantages,  # over the step's deviation (arXiv:2508.08221; TRL scale_rewards="batch")
    "wd1": wd1_advantages,
}


def compute_advantages(
    groups: Sequence[ScoredGroup],
    *,
    config: AdvantageConfig,
    weights: Mapping[str, float],
    reduce_moments: ReduceMoments | None = None,
) -> list[list[Advantage]]:
    """One advantage per completion of every group of a step, in order. With credit="turns" it is one per
    token (`turn_advantages`).

    aggregate="sum" normalises `Reward.score`, already the weighted sum. aggregate="gdpo" (arXiv:2601.05242)
    normalises each of `Reward.parts` within its group as "grpo" does, and sums them with `weights`. Then it
    divides by the deviation of the sums over the step, plus 1e-4. Their mean is 0 by construction. "batch"
    divides by that of the scores.

    Args:
        groups: this process's groups; they may be ragged.
        weights: reward name -> weight; only gdpo reads it.
        reduce_moments: sums numbers over processes; called twice, whatever the config. None: one process.

    Raises:
        ValueError: a score is not finite; gdpo finds no parts or one without a weight; max_rl a score < 0.
    """
    if config.credit == "turns":
        return [turn_advantages(group) for group in groups]
    valid_ids = [valid_completions(group) for group in groups]
    advantages: list[list[Advantage]] = [[0.0] * len(group.rewards) for group in groups]
    if config.aggregate == "gdpo":
        scores = [_sum_of_normalised(g, ids, weights) for g, ids in zip(groups, valid_ids, strict=True)]
        values = scores
    else:
        scores = [list(_scores(g, ids).values()) for g, ids in zip(groups, valid_ids, strict=True)]
        values = [ADVANTAGES[config.name](group_scores) for group_scores in scores]
    step_std = _std_over_step(scores, reduce_moments)
    if config.aggregate == "gdpo" or config.name == "batch":
        values = [_scaled(of_group, 1 / (step_std + STD_EPS)) for of_group in values]
    for row, ids, group_values in zip(advantages, valid_ids, values, strict=True):
        for i, value in zip(ids, group_values, strict=True):
            row[i] = value
    return advantages


def turn_advantages(scored: ScoredGroup) -> list[Advantage]:
    """A_t = G_t - mean of G_t over the group's other episodes, for tokens sampled in turn t; 0 for others.

    G_t is the sum of the rewards from turn t on, and 0 once an episode is over. The baseline is a mean over
    all other episodes, so it does not depend on this episode's actions. That keeps it unbiased even where
    the policy decides when to stop. A mean over only the episodes that reach turn t, this one included,
    would charge a further turn its mean reward.

    Raises:
        ValueError: a reward is not finite, or an episode has no reward for each of its turns.
    """
    ids = valid_completions(scored)
    returns = {i: _returns(scored, i) for i in ids}
    advantages: list[Advantage] = [0.0] * len(scored.rewards)
    for i in ids:
        per_turn = []
        for turn, value in enumerate(returns[i]):
            others = [g[turn] if turn < len(g) else 0.0 for j, g in returns.items() if j != i]
            is_level = not has_spread([value, *others])
            per_turn.append(0.0 if is_level else value - math.fsum(others) / len(others))
        advantages[i] = _per_token(scored.completions[i], per_turn)
    return advantages


def _returns(scored: ScoredGroup, index: int) -> list[float]:
    """G_t of a completion for each of its turns."""
    turns = [reward or 0.0 for reward in scored.rewards[index].turns]
    rows = scored.completions[index].rows
    num_turns = sum(segment.origin == "sampled" for row in rows for segment in row.segments)
    if not turns or len(turns) != num_turns or not all(map(math.isfinite, turns)):
        raise ValueError(
            f"advantage.credit=turns: completion {index} of prompt {scored.prompt.id} has {num_turns} turns "
            f"and {turns} as their rewards; use an environment that gives each turn a finite reward, and "
            "'environment' alone in rewards.functions, or set advantage.credit=episode"
        )
    return [math.fsum(turns[t:]) for t in range(len(turns))]


def _per_token(completion: Completion, per_turn: Sequence[float]) -> list[float]:
    """The k-th number for each token of the k-th sampled segment over all rows; 0 for other tokens."""
    values, numbers = [], iter(per_turn)
    for row in completion.rows:
        for segment in row.segments:
            value = next(numbers) if segment.origin == "sampled" else 0.0
            values += [value] * segment.num_tokens
    return values


def group_outcome(scored: ScoredGroup, *, config: AdvantageConfig, weights: Mapping[str, float]) -> Outcome:
    """Whether a group has a training signal: "mixed" if an advantage can differ from 0, else why none can.

    "all_right": all valid scores are equal, positive and at least half of what the weights can pay (rewards
    up to 1). A format bonus alone is less. "all_wrong": equal and below that. "unscored": none is valid.
    Under gdpo a group with equal scores is mixed if one of its weighted parts has spread.
    """
    ids = valid_completions(scored)
    if not ids:
        return "unscored"
    first, *_ = scores = list(_scores(scored, ids).values())
    series = [scores]
    if config.credit == "turns":
        series = [[0.0, *a] for a in turn_advantages(scored) if not isinstance(a, float | int)]
    if config.aggregate == "gdpo":
        series = [list(_scores(scored, ids, name).values()) for name, weight in weights.items() if weight]
    if any(has_spread(values) for values in series):
        return "mixed"
    payable = math.fsum(weight for weight in weights.values() if weight > 0)
    return "all_right" if first > 0 and first >= payable / 2 else "all_wrong"


def valid_completions(scored: ScoredGroup) -> list[int]:
    """Indices of the completions that count in the group's baseline: those not aborted, and scored."""
    assert len(scored.rewards) == len(scored.completions), f"{scored.prompt.id}: one reward each"
    pairs = zip(scored.completions, scored.rewards, strict=True)
    return [i for i, (c, r) in enumerate(pairs) if c.finish_reason != "abort" and r.score is not None]


def has_spread(rewards: Sequence[float]) -> bool:
    """Whether max(r) differs from min(r) by more than rounding (1e-9, relative or absolute)."""
    return len(rewards) > 1 and not math.isclose(min(rewards), max(rewards), rel_tol=1e-9, abs_tol=1e-9)


def sample_std(values: Sequence[float]) -> float:
    """sqrt(sum((x - mean)^2) / (n - 1)); 0 for fewer than two values."""
    return _std_over_step([values], None)


def _std_over_step(values: Sequence[Sequence[float]], reduce_moments: ReduceMoments | None) -> float:
    """Sample deviation of all values of all processes, in two passes: a large mean costs no digits."""
    reduce = reduce_moments or (lambda moments: moments)
    flat = [x for group in values for x in group]
    count, total = reduce([float(len(flat)), math.fsum(flat)])
    mean = total / max(count, 1.0)
    (squares,) = reduce([math.fsum((x - mean) ** 2 for x in flat)])
    return math.sqrt(squares / (count - 1)) if count > 1 else 0.0


def _sum_of_normalised(scored: ScoredGroup, ids: Sequence[int], weights: Mapping[str, float]) -> list[float]:
    """sum_k weight_k * grpo_advantages(part k) per valid completion; an abstained part adds 0."""
    names = {name for i in ids for name in scored.rewards[i].parts}
    if (unknown := names - set(weights)) or (ids and not names):
        found = f"parts {sorted(unknown)} without a weight" if unknown else "no parts in Reward.parts"
        raise ValueError(
            f"advantage.aggregate=gdpo normalises each reward alone, but {scored.prompt.id} has {found}; "
            f"weights are given for {sorted(weights)}; name every reward in rewards.functions, or set "
            "advantage.aggregate=sum"
        )
    sums = dict.fromkeys(ids, 0.0)
    for name, weight in weights.items():
        scores = _scores(scored, ids, name)
        for i, value in zip(scores, grpo_advantages(list(scores.values())), strict=True):
            sums[i] += weight * value
    return list(sums.values())


def _scores(scored: ScoredGroup, ids: Sequence[int], part: str | None = None) -> dict[int, float]:
    """Index -> score of the reward, or of one of its parts; completions without such a score are left out."""
    scores: dict[int, float] = {}
    for i in ids:
        reward = scored.rewards[i]
        score = reward.score if part is None else reward.parts.get(part)
        if score is not None and not math.isfinite(score):
            raise ValueError(
                f"completion {i} of prompt {scored.prompt.id} has reward {score}; a reward must be a finite "
                "number, or None to abstain"
            )
        if score is not None:
            scores[i] = float(score)
    return scores


def _scaled(values: Sequence[float], factor: float) -> list[float]:
    return [value * factor for value in values]
