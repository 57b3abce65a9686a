"""Checks that each reward does what it should on a dataset (`cohort doctor rewards CONFIG`).

The dataset's right answers are graded as if they were completions: each must score 1 against itself and about
0 against another row's. Nothing is sampled and no model is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from rewards.compose import RewardSpec
from rewards.pool.pool import Faults, RewardPool
from rewards.score import quantile
from rl.types import Completion, Group, Prompt, Reward

Row = Mapping[str, Any]
Ask = Callable[[Row, str], Prompt]
GOLD_COLUMNS = ("answer", "solution", "ground_truth", "gold", "label", "canonical_solution", "target")
TEMPLATES = {
    "the bare answer": "{gold}",
    "boxed": "\\boxed{{gold}}",
    "in <answer> tags": "<answer>\n{gold}\n</answer>",
    "think, then boxed": "<think>\nhm\n</think>\n\\boxed{{gold}}",
    "think, then <answer>": "<think>\nhm\n</think>\n<answer>\n{gold}\n</answer>",
    "a code fence": "```python\n{gold}\n```",
}
MARK = "@rewards.plugins.ignores_answer, or the option ignores_answer: true"
BLIND = "the reward does not look at the answer: its signature names no column"
NO_ANSWER = "I cannot tell."
MANY_BAD_GOLDS, MUCH_FOR_OTHERS, NUM_SHOWN = 0.05, 0.1, 5


@dataclass
class Check:
    """The outcome of one check of a reward; `ok` is None if the check does not apply."""

    title: str
    ok: bool | None
    finding: str
    rows: list[str] = field(default_factory=list)


@dataclass
class Examination:
    """The outcomes of all checks of one reward."""

    name: str
    checks: list[Check]

    @property
    def ok(self) -> bool:
        return all(check.ok is not False for check in self.checks)

    def __str__(self) -> str:
        lines = [f"{self.name}: {'ok' if self.ok else 'NOT OK'}"]
        for check in self.checks:
            mark = {True: "ok  ", False: "FAIL", None: "-   "}[check.ok]
            lines.append(f"  {mark} {check.title}: {check.finding}")
            lines += [f"         {row}" for row in check.rows[:NUM_SHOWN]]
        return "\n".join(lines)


def examine_all(
    specs: Sequence[RewardSpec],
    rows: Sequence[Row],
    *,
    prompt_column: str = "prompt",
    ask: Ask | None = None,
    gold: str | None = None,
    workers: int = 2,
    deadline: float = 10.0,
) -> int:
    """Prints an examination of each reward; returns 0 if all is well, else 1.

    Args:
        ask: (row, id) -> the prompt that training makes of the row; default: the row's messages or text.

    Raises:
        ValueError: the dataset or a reward cannot be used.
    """
    if not rows:
        raise ValueError("the dataset has no rows, so nothing can be checked")
    print(f"{len(rows)} rows; the first one is row 0, as in the ids of prompts")
    well = True
    for spec in specs:
        alone = RewardSpec(spec.name, options=spec.options)
        with closing(RewardPool([alone], workers=workers, deadline_s=deadline)) as pool:
            columns = rows[0] if ask is None else ask(rows[0], "row 0").columns
            pool.check_columns(set(columns), columns)
            found = examine(pool, rows, prompt_column=prompt_column, gold_column=gold, ask=ask)
        print(found)
        well &= found.ok
    return 0 if well else 1


def examine(
    pool: RewardPool,
    rows: Sequence[Row],
    *,
    prompt_column: str = "prompt",
    gold_column: str | None = None,
    ask: Ask | None = None,
) -> Examination:
    """Runs all checks on one reward. Without a gold in the dataset, only some of them are possible."""
    name = pool.asks[0].name
    patient = Patient(pool, rows, prompt_column, ask)
    golds = find_golds(rows, pool.required_columns(), gold_column)
    checks: list[Check] = []
    if ignores := pool.asks[0].ignores_answer:
        checks.append(_ask_ignored(patient, gold_column))
    elif golds is None:
        without = "the dataset holds no answer that could be graded as a completion"
        checks.append(Check("gold", None, without if pool.required_columns() else BLIND))
    else:
        template = patient.best_template(golds)
        checks += [
            *_ask_golds(patient, golds, template),
            _ask_others_golds(patient, golds, template),
            _ask_swapped(patient, golds, template, gold_column),
        ]
    checks += [_ask_prompt(patient, golds is not None and not ignores), _ask_latency(patient)]
    checks.append(_ask_faults(pool.take_faults()))
    return Examination(name, checks)


class Patient:
    """A reward and the rows that it is checked on; it records how long each grade took."""

    def __init__(
        self, pool: RewardPool, rows: Sequence[Row], prompt_column: str, ask: Ask | None = None
    ) -> None:
        self.pool, self.rows, self.prompt_column = pool, rows, prompt_column
        self.ask = ask or self._plain
        self.timed: list[tuple[float, str]] = []

    def _plain(self, row: Row, name: str) -> Prompt:
        prompt = row.get(self.prompt_column, "")
        messages = tuple(prompt) if isinstance(prompt, list) else ()
        return Prompt(name, prompt if isinstance(prompt, str) else "", (), messages, row)

    def grade(self, texts: Sequence[str], columns: Sequence[Row] | None = None) -> list[Reward]:
        """Grades `texts` as completions of the first rows, each in a group of its own."""
        groups = []
        for index, (text, row) in enumerate(zip(texts, columns or self.rows, strict=False)):
            asked = self.ask(row, f"row {index}")
            ids = list(range(max(1, len(text) // 4)))  # about as many tokens as the text has
            groups.append(Group(asked, [Completion(ids, [], [True] * len(ids), "stop", [], text=text)]))
        rewards = [scored.rewards[0] for scored in self.pool.score(groups)]
        pairs = enumerate(zip(rewards, texts, strict=False))
        self.timed += [(reward.elapsed_ms, f"row {i}: {shown(text)}") for i, (reward, text) in pairs]
        return rewards

    def best_template(self, golds: Sequence[str]) -> str:
        """The template of a completion in which most of the first golds score, as the reward expects it."""
        some = golds[:20]

        def total(name: str) -> float:
            rewards = self.grade([written(gold, name) for gold in some])
            return sum(reward.score or 0.0 for reward in rewards)

        return max(TEMPLATES, key=total)


def find_golds(rows: Sequence[Row], required: set[str], column: str | None) -> list[str] | None:
    """The right answers as text: the named column, or the first with a usual name; None without one.

    Raises:
        ValueError: the dataset has no such column.
    """
    if column is not None and column not in rows[0]:
        raise ValueError(f"--gold {column}: the dataset has {', '.join(rows[0])}")
    usual = [c for c in GOLD_COLUMNS if c in required] + [c for c in GOLD_COLUMNS if required]
    for name in [column] if column else usual:
        if name in rows[0]:
            return [str(row[name]) for row in rows]
    return None


def written(gold: str, form: str) -> str:
    return TEMPLATES[form].replace("{gold}", gold)


def shown(text: str) -> str:
    return re.sub(r"\s+", " ", text)[:60]


def _ask_golds(patient: Patient, golds: Sequence[str], template: str) -> Iterator[Check]:
    rewards = patient.grade([written(gold, template) for gold in golds])
    unusable = [i for i, reward in enumerate(rewards) if reward.score is None]
    failing = [i for i, reward in enumerate(rewards) if reward.score is not None and reward.score < 1]
    usable = len(rewards) - len(unusable)
    yield Check(
        "gold against gold",
        not failing and usable > 0,
        f"{usable - len(failing)} of {usable} score 1, written as: {template}",
        [_row(i, golds[i], rewards[i]) for i in failing],
    )
    share = len(unusable) / len(rewards)
    yield Check(
        "unusable golds",
        share <= MANY_BAD_GOLDS,
        f"{len(unusable)} of {len(rewards)} ({share:.1%}) abstain; they are never trained on",
        [_row(i, golds[i], rewards[i]) for i in unusable],
    )


def _row(index: int, gold: str, reward: Reward) -> str:
    found = "" if reward.extracted is None else f", found {shown(reward.extracted)!r}"
    return f"row {index}: gold {shown(gold)!r}{found}: {reward.score} {reward.reason} {shown(reward.detail)}"


def _ask_others_golds(patient: Patient, golds: Sequence[str], template: str) -> Check:
    others = [_another(golds, index) for index in range(len(golds))]
    if None in others:
        return Check("gold of another row", None, "all rows have the same gold")
    rewards = patient.grade([written(other or "", template) for other in others])
    scores = [reward.score for reward in rewards if reward.score is not None]
    mean = sum(scores) / len(scores) if scores else 0.0
    paid = [i for i, reward in enumerate(rewards) if reward.score is not None and reward.score > 0]
    rows = [f"{_row(i, golds[i], rewards[i])}; the completion was {shown(others[i] or '')!r}" for i in paid]
    hint = f"; if it should not look at the answer, mark it: {MARK}" if mean > MUCH_FOR_OTHERS else ""
    finding = f"mean score {mean:.3f}, expected about 0{hint}"
    return Check("gold of another row", mean <= MUCH_FOR_OTHERS, finding, rows)


def _ask_ignored(patient: Patient, column: str | None) -> Check:
    """Checks a reward declared to ignore the answer: other answers must not change its scores."""
    rows, texts = patient.rows, [str(row.get(patient.prompt_column, "")) for row in patient.rows]
    names = {column, *GOLD_COLUMNS} & rows[0].keys()
    others = [{**row, **{n: rows[i - 1].get(n) for n in names}} for i, row in enumerate(rows)]
    pairs = zip(patient.grade(texts), patient.grade(texts, others), strict=True)
    changed = sum(own.score != other.score for own, other in pairs)
    said = f"declared, and {changed} of {len(rows)} scores change with it" if changed else "as declared"
    return Check("does not look at the answer", False if changed else None, said)


def _another(golds: Sequence[str], index: int) -> str | None:
    """The next gold with another text."""
    following = (golds[(index + k) % len(golds)] for k in range(1, len(golds)))
    return next((gold for gold in following if gold.strip() != golds[index].strip()), None)


def _ask_swapped(patient: Patient, golds: Sequence[str], template: str, column: str | None) -> Check:
    """Checks that the reward does not swap gold and completion: only a bad gold may make it abstain."""
    title = "gold and completion are not swapped"
    name = column or next((c for c in GOLD_COLUMNS if c in patient.pool.required_columns()), None)
    if name is None:
        return Check(title, None, "the reward names no gold column")
    rows, golds = patient.rows[:20], golds[:20]
    no_answer = patient.grade([NO_ANSWER] * len(rows))
    right = [written(gold, template) for gold in golds]
    no_gold = patient.grade(right, [{**row, name: NO_ANSWER} for row in rows])
    blamed = sum(reward.score is None for reward in no_answer)
    excused = sum(reward.score is None for reward in no_gold)
    pair = ["$(1,2)$", "$1 < x < 2$"]
    probes = patient.grade(pair, [{**rows[0], name: gold} for gold in reversed(pair)])
    backwards = [reward.score for reward in probes] == [0.0, 1.0]
    if blamed > excused or backwards:
        why = f"a completion without an answer abstains ({blamed} of {len(rows)})"
        why += f", a gold without one does not ({excused})"
        if backwards:
            why = "an interval matches an inequality only with the two swapped"
        return Check(title, False, f"they look swapped: {why}")
    scored = f"{len(rows) - blamed} of {len(rows)} get a score"
    return Check(title, True, f"no answer: {scored}; no gold: {excused} abstain")


def _ask_prompt(patient: Patient, has_gold: bool) -> Check:
    """Checks that an empty completion and a repeated prompt, which take no work, do not score."""
    prompts = [str(row.get(patient.prompt_column, "")) for row in patient.rows]
    paid = []
    for what, texts in (("an empty completion", [""] * len(prompts)), ("the prompt repeated", prompts)):
        for index, reward in enumerate(patient.grade(texts)):
            if reward.score is not None and reward.score > 0:
                paid.append(f"row {index}: {what} scores {reward.score:g}: {shown(texts[index])!r}")
    share = len(paid) / (2 * len(prompts))
    ok = share <= MUCH_FOR_OTHERS if has_gold else None
    return Check("no work, no pay", ok, f"{len(paid)} of {2 * len(prompts)} score", paid)


def _ask_latency(patient: Patient) -> Check:
    ordered = sorted(patient.timed)
    times = [elapsed for elapsed, _ in ordered]
    p50, p99 = quantile(times, 0.5), quantile(times, 0.99)
    finding = f"p50 {p50:.2f} ms, p99 {p99:.2f} ms over {len(times)} grades; slowest:"
    return Check("latency", None, finding, [f"{ms:.1f} ms, {what}" for ms, what in reversed(ordered[-2:])])


def _ask_faults(faults: Faults) -> Check:
    return Check("faults", not faults.num_faulty, str(faults).splitlines()[0], list(faults.examples))
