"""What is the same answer, case by case: the cases beside this file, and the shared ones where present."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rewards.math.grader import grade
from rl.types import Reason

OWN = [json.loads(line) for line in (Path(__file__).parent / "math_cases.jsonl").read_text().splitlines()]
SHARED = Path(__file__).parents[3] / "shared"
CATEGORIES = sorted({case["category"] for case in OWN})


def completion(case: dict) -> str:
    return case.get("completion") or f"The final answer is $\\boxed{{{case.get('answer', '')}}}$."


@pytest.mark.parametrize("category", CATEGORIES)
def test_own_cases_are_judged_as_their_author_would(category):
    cases = [case for case in OWN if case["category"] == category]
    wrong = [
        case for case in cases if (grade(completion(case), case["gold"]).score == 1.0) != case["expected"]
    ]
    assert len(cases) >= 20
    assert wrong == []


def shared(name: str) -> list[dict]:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not at hand")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_shared_core_cases_are_99_percent_right_without_a_false_positive():
    rows = [row for row in shared("cases/math.jsonl") if row["tier"] == "core"]
    wrong = [row for row in rows if (grade(row["prediction"], row["gold"]).score == 1.0) != row["expected"]]
    assert [row["id"] for row in wrong if not row["expected"]] == []
    assert len(wrong) <= 0.01 * len(rows), [row["id"] for row in wrong]


def test_shared_kinds_have_no_core_false_positive_and_at_most_4_percent_of_right_answers_refused():
    rows = shared("cases/math_kinds.jsonl")
    scores = {row["id"]: grade(row["prediction"], row["gold"]).score for row in rows}
    paid = [row["id"] for row in rows if scores[row["id"]] == 1.0 and not row["expected"]]
    refused = [row for row in rows if scores[row["id"]] == 0.0 and row["expected"]]
    assert [name for name, score in scores.items() if score is None] == []
    assert [row["id"] for row in rows if row["id"] in paid and row["tier"] == "core"] == []
    assert len(paid) <= 1  # BA for AB, which is CA for AC where these are choices
    assert len(refused) <= 0.04 * sum(row["expected"] for row in rows)
    assert [row["id"] for row in refused if row["tier"] == "core"] == []


def test_shared_attacks_on_math_are_not_paid_and_honest_answers_are():
    rows = [row for row in shared("cases/attacks.jsonl") if row["tests"]["type"] == "math"]
    assert len(rows) >= 10
    for row in rows:
        paid = grade(row["completion_code"], row["tests"]["gold"]).score == 1.0
        assert paid == bool(row["expected_reward"]), (row["id"], row["why"])


@pytest.mark.parametrize(
    "name", ["gsm8k_test", "math500", "amc23", "aime24", "minerva_math", "olympiad_bench"]
)
def test_every_gold_of_the_shared_sets_is_its_own_answer(name):
    """As it stands, and written otherwise, so that more than two equal texts are compared."""
    unusable = []
    for row in shared(f"data/{name}.jsonl"):
        golds = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        for gold in map(str, golds):
            answer = gold.split("####")[-1].strip().strip("$")
            reward = grade(f"\\boxed{{{answer}}}", gold)
            if reward.reason is Reason.BAD_GOLD:
                unusable.append(gold)
                continue
            assert reward.score == 1.0, (gold, reward)
            spaced = answer.replace("\\frac", "\\dfrac").replace("^", " ^ ").replace("=", " = ")
            is_plain = "\\text" not in answer and "mho" not in answer and answer.count("$") % 2 == 0
            if is_plain:
                assert grade(f"\\boxed{{ {spaced} \\, }}", gold).score == 1.0, gold
    assert unusable == []
