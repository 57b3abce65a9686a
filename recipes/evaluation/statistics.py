"""Statistics of an evaluation's scores: avg@k, pass@k, maj@k, intervals by prompt, paired tests.

A sample on which the grader abstained is left out, never counted as 0, and the share of these is reported.
A prompt without a graded sample is left out of `n`. A sample is right if its score, cut to 0..1, is 1.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import pairwise, product
from statistics import fmean, variance
from typing import Any

import numpy as np

from rl.store.metrics import wilson_interval
from rl.types import ScoredGroup, Team

NUM_RESAMPLES = 10_000
_FRACTION = re.compile(r"\\frac(?:\{(\d+)\}|(\d))(?:\{(\d+)\}|(\d))")
_NUMBER = re.compile(r"[-+]?(?:\d{1,30}(?:/\d{1,30})?|\d{0,30}\.\d{1,30})", re.ASCII)
MAX_ROWS = 12  # of a table by a column; a numeric column with more values is split at its quartiles
_LOOK = re.compile(r"\\(?:left|right|[,;:! ]|(?:text|mathrm|mbox)(?=\{))|[$\s]|(?<=\d),(?=\d{3}\b)")


@dataclass(frozen=True)
class Sampled:
    """The samples of a prompt as JSON values: scores, extracted answers, sampled tokens, cut or not."""

    id: str
    scores: list[float | None]
    answers: list[str | None]
    lengths: list[int]
    truncated: list[bool]
    by: Any = None

    @staticmethod
    def of(group: ScoredGroup, grader: str, by: str | None = None, *, votes: bool = True) -> Sampled:
        """With `votes`, the extracted answers are this grader's own, so that a majority can be counted."""
        parts = [reward.parts.get(grader) for reward in group.rewards]
        value = group.prompt.columns.get(by) if by else None
        return Sampled(
            group.prompt.id,
            [None if part is None else min(max(part, 0.0), 1.0) for part in parts],
            [reward.extracted if votes else None for reward in group.rewards],
            [c.num_sampled for c in group.completions],
            [c.finish_reason == "length" for c in group.completions],
            value if isinstance(value, int | float | None) else str(value),
        )

    @property
    def graded(self) -> list[float]:
        return [score for score in self.scores if score is not None]

    @property
    def votes(self) -> tuple[int, list[int], int]:
        """(number of right samples, sizes of the classes of wrong answers, number without an answer).

        All samples that the grader found right are one class. Wrong answers are one class if their texts
        agree up to spaces and the value of a number. Other spellings of a wrong answer therefore split its
        votes.
        """
        pairs = [(s, a) for s, a in zip(self.scores, self.answers, strict=True) if s is not None]
        wrong = Counter(same_text(a) for s, a in pairs if s < 1 and a is not None)
        num_right = sum(s == 1 for s, _ in pairs)
        return num_right, list(wrong.values()), len(pairs) - num_right - wrong.total()


def gathered(mine: Sequence[Sampled], team: Team) -> list[Sampled]:
    """The prompts of all processes, sorted by id, so that sums do not depend on which process had them."""
    rows = [Sampled(**row) for rows in team.gather([asdict(one) for one in mine]) for row in rows]
    return sorted(rows, key=lambda row: row.id)


def same_text(answer: str) -> str:
    """An answer without what changes only its look. A number becomes its value, so that 1/2 equals 0.5."""
    text = _LOOK.sub("", answer).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").rstrip(".")
    plain = _FRACTION.sub(lambda m: f"{m[1] or m[2]}/{m[3] or m[4]}", text)
    with suppress(ZeroDivisionError):
        text = str(Fraction(plain)) if _NUMBER.fullmatch(plain) else text
    return text.casefold()


def pass_at_k(n: int, right: int, k: int) -> float:
    """1 - C(n - right, k) / C(n, k): the chance that k of n samples hold a right one (arXiv:2107.03374)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def maj_at(right: int, others: Sequence[int], blank: int, ks: Sequence[int]) -> list[float]:
    """maj@k (cons@k) for each k: the chance that the majority of k of the samples is right, over all subsets.

    Samples without an answer do not vote. One of tied answers is drawn uniformly. Without votes, it is wrong.
    """
    n, most = right + sum(others) + blank, max(ks)
    won = dict.fromkeys(ks, 0.0)
    for c in range(1, min(right, most) + 1):
        ways = {(0, 0): 1}  # (samples of other answers, answers that tie with c votes) -> subsets
        for size in others:
            grown: dict[tuple[int, int], int] = defaultdict(int)
            for (m, t), count in ways.items():
                for j in range(min(size, c, most - c - m) + 1):
                    grown[m + j, t + (j == c)] += count * math.comb(size, j)
            ways = grown
        for k in ks:
            found = sum(w * math.comb(blank, k - c - m) / (t + 1) for (m, t), w in ways.items() if m <= k - c)
            won[k] += math.comb(right, c) * found
    return [won[k] / math.comb(n, k) for k in ks]


def share_interval(values_P: Sequence[float], num_samples: int) -> tuple[float, float]:
    """95 % interval of the mean of values in 0..1, one per prompt, from `num_samples` samples in total.

    It is Wilson's at the effective size p (1 - p) / s^2, where s^2 is the variance of the mean between
    prompts: samples of a prompt are a cluster (Franco et al. 2019, J. Survey Statistics and Methodology
    7:334). The size is kept between the numbers of prompts and of samples.
    """
    n = len(values_P)
    p = fmean(values_P) if n else 0.0
    spread = variance(values_P) / n if n > 1 else 0.0
    size = p * (1 - p) / spread if spread > 0 else n
    size = min(max(size, n), num_samples) if num_samples > n else n
    return wilson_interval(p * size, size)


def summary(prompts: Sequence[Sampled]) -> dict[str, Any]:
    """All numbers of an evaluation, with intervals; the tables' keys are k or the values of a column.

    Raises:
        ValueError: no sample was graded.
    """
    graded = [p for p in prompts if p.graded]
    scores, num = [s for p in prompts for s in p.scores], sum(len(p.graded) for p in graded)
    if not graded:
        raise ValueError(f"the grader abstained on all of {len(scores)} samples, so there is no accuracy")
    lengths, truncated = ([x for p in prompts for x in getattr(p, name)] for name in ("lengths", "truncated"))
    most = max(len(p.graded) for p in graded)
    ks = sorted({*(2**i for i in range(most.bit_length())), most})  # powers of 2, and all samples
    found: dict[str, Any] = {
        "n": len(graded),
        "num_samples": most,
        "avg": _mean([fmean(p.graded) for p in graded], num),
        "pass": {},
        "maj": {},
        "abstained": sum(s is None for s in scores) / len(scores),
        "truncated": sum(truncated) / len(truncated),
        "mean_tokens": fmean(lengths),
    }
    has_answers = any(a is not None for p in graded for a in p.answers)
    for k in ks:  # prompts with fewer graded samples are left out
        enough = [p for p in graded if len(p.graded) >= k]
        passes = [pass_at_k(len(p.graded), sum(s == 1 for s in p.graded), k) for p in enough]
        found["pass"][str(k)] = _mean(passes, num)
    votes = [(p.votes, [k for k in ks if k <= len(p.graded)]) for p in graded] if has_answers else []
    chances = [dict(zip(mine, maj_at(*vote, mine), strict=True)) for vote, mine in votes]
    for k in ks if has_answers else ():
        found["maj"][str(k)] = _mean([chance[k] for chance in chances if k in chance], num)
    if any(p.by is not None for p in graded):
        found["by"] = _by_column(graded)
    return found


def _mean(values: Sequence[float], num_samples: int) -> dict[str, Any]:
    low, high = share_interval(values, num_samples)
    return {"value": fmean(values), "low": low, "high": high, "n": len(values)}


def _by_column(prompts: Sequence[Sampled]) -> dict[str, dict[str, Any]]:
    values = {p.by for p in prompts if isinstance(p.by, int | float)}
    if len(values) > MAX_ROWS:
        cuts = np.quantile([p.by for p in prompts if p.by in values], [0, 0.25, 0.5, 0.75, 1])
        names = [f"{low:g} to {high:g}" for low, high in pairwise(cuts)]
        place = {v: names[min(int(np.searchsorted(cuts[1:], v)), 3)] for v in values}
        prompts = [replace(p, by=place.get(p.by, p.by)) for p in prompts]
    groups: Mapping[Any, list[Sampled]] = defaultdict(list)
    for p in prompts:
        groups[p.by].append(p)
    ordered = sorted(groups, key=lambda v: (0, v, "") if isinstance(v, int | float) else (1, 0.0, str(v)))
    twice = {str(v) for v in ordered if sum(str(v) == str(other) for other in ordered) > 1}
    return {
        repr(v) if str(v) in twice else str(v): _mean(
            [fmean(p.graded) for p in groups[v]], sum(len(p.graded) for p in groups[v])
        )
        for v in ordered
    }


def paired(
    a_P: Sequence[float], b_P: Sequence[float], *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> dict[str, Any]:
    """Mean of b - a over the same prompts, with a 95 % interval by a bootstrap over them.

    The two-sided p is that of a random-sign test (Fisher 1935, The Design of Experiments, section 21). A few
    prompts cannot make it small. With one sample each it is McNemar's.
    """
    differences = np.subtract(b_P, a_P)
    rng, n = np.random.default_rng(seed), len(differences)
    means = [differences[rng.integers(n, size=(500, n))].mean(1) for _ in range(num_resamples // 500)]
    found = np.concatenate(means)
    low, high = np.quantile(found, [0.025, 0.975]).tolist()
    moved = differences[differences != 0]
    if len(moved) <= 12:
        signs = np.array(list(product((-1, 1), repeat=len(moved))))
        p = float((abs(signs @ moved) >= abs(moved.sum()) - 1e-9).mean())
    else:
        sums = [rng.choice((-1, 1), (500, len(moved))) @ moved for _ in range(num_resamples // 500)]
        extreme = (abs(np.concatenate(sums)) >= abs(moved.sum()) - 1e-9).sum().item()
        p = (extreme + 1) / (num_resamples + 1)
    return {"difference": differences.mean().item(), "low": low, "high": high, "p": p, "n": n, "seed": seed}


def mcnemar(a_P: Sequence[float], b_P: Sequence[float]) -> dict[str, Any]:
    """McNemar's exact two-sided test, one sample per prompt: number right in a alone, in b alone, and p."""
    pairs = Counter((a == 1, b == 1) for a, b in zip(a_P, b_P, strict=True))
    only_a, only_b = pairs[True, False], pairs[False, True]
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return {"only_first": only_a, "only_second": only_b, "p": min(1.0, 2 * tail / 2**n)}
