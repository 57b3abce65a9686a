"""`cohort doctor rewards`: finds rewards that are wrong for their dataset."""

import argparse

import pytest

from recipes.cli import doctor as command
from rewards import doctor
from rewards.compose import RewardSpec
from rewards.pool.pool import RewardPool

HERE = "rewards_for_tests:"
ROWS = [{"prompt": f"What is {i} + {i}?", "answer": f"${2 * i}$"} for i in range(1, 13)]


@pytest.fixture
def examine():
    pools = []

    def examine_(spec, rows=ROWS, **options):
        pools.append(RewardPool([spec], workers=1, deadline_s=20.0))
        found = doctor.examine(pools[-1], rows, **options)
        return found, {check.title: check for check in found.checks}

    yield examine_
    for pool in pools:
        pool.close()


def test_a_sound_reward_on_a_sound_dataset_is_well(examine):
    found, checks = examine(HERE + "verified")
    assert found.ok
    assert checks["gold against gold"].finding.startswith("12 of 12 score 1")
    assert checks["gold of another row"].finding == "mean score 0.000, expected about 0"
    assert checks["unusable golds"].finding.startswith("0 of 12")
    assert "p50" in checks["latency"].finding and "p99" in checks["latency"].finding
    assert str(found).startswith(f"{HERE}verified: ok\n  ok   gold against gold: 12 of 12")


def test_swapped_arguments_are_noticed(examine):
    found, checks = examine(HERE + "verified_swapped")
    assert checks["gold and completion are not swapped"].ok is False
    assert "they look swapped" in checks["gold and completion are not swapped"].finding
    assert not found.ok


def test_a_reward_that_pays_everything_is_noticed(examine):
    found, checks = examine(HERE + "generous")
    assert not found.ok
    assert checks["gold against gold"].ok
    assert checks["gold of another row"].ok is False
    assert checks["no work, no pay"].ok is False
    assert "row 0" in checks["gold of another row"].rows[0]


def test_golds_that_cannot_be_used_are_counted_and_shown(examine):
    rows = [*ROWS[:9], *({"prompt": "?", "answer": f"no number here {c}"} for c in "abc")]
    found, checks = examine(HERE + "verified", rows)
    assert not found.ok
    assert checks["unusable golds"].finding.startswith("3 of 12 (25.0%) abstain")
    assert [row.split(":")[0] for row in checks["unusable golds"].rows] == ["row 9", "row 10", "row 11"]


def test_prompts_that_give_the_answer_away_are_noticed(examine):
    rows = [{**row, "prompt": f"{row['prompt']} (It is {row['answer']}.)"} for row in ROWS]
    found, checks = examine(HERE + "verified", rows)
    assert not found.ok
    assert checks["no work, no pay"].finding == "12 of 24 score"
    assert checks["no work, no pay"].rows[0].startswith("row 0: the prompt repeated scores 1")


def test_a_format_reward_has_no_gold_and_is_well(examine):
    found, checks = examine("think_format", [{"prompt": "hello"}, {"prompt": "you"}])
    assert found.ok
    assert checks["gold"].ok is None
    assert checks["no work, no pay"].finding == "0 of 4 score"


def test_a_reward_that_is_not_to_look_at_the_answer_says_so(examine):
    """By the option, by the mark in its module, or by a signature without a column."""
    for spec in (RewardSpec(HERE + "generous", options={"ignores_answer": True}), HERE + "blind"):
        found, checks = examine(spec)
        assert found.ok and "gold of another row" not in checks
        assert "  -    does not look at the answer: as declared" in str(found)
        assert checks["no work, no pay"].ok is None
    found, checks = examine(HERE + "length")
    assert found.ok
    assert checks["gold"].finding == "the reward does not look at the answer: its signature names no column"
    _, checks = examine(HERE + "generous")
    assert checks["gold of another row"].finding.endswith("or the option ignores_answer: true")


def test_a_reward_that_looks_at_the_answer_although_it_is_declared_not_to_is_noticed(examine):
    rows = [{"prompt": str(i), "answer": str(i)} for i in range(4)]
    found, checks = examine(RewardSpec(HERE + "exact", options={"ignores_answer": True}), rows)
    assert not found.ok
    assert checks["does not look at the answer"].finding == "declared, and 4 of 4 scores change with it"


def test_faults_of_graders_are_shown(examine):
    found, checks = examine(HERE + "length", [{"prompt": "raise"}])
    assert not found.ok
    assert "raised" in checks["faults"].finding


def test_the_gold_column_can_be_named(examine):
    rows = [{"prompt": "?", "answer": "x", "right": str(i)} for i in range(3)]
    _, checks = examine(RewardSpec(HERE + "exact"), rows, gold_column="right")
    assert checks["gold against gold"].finding.startswith("0 of 3 score 1")
    with pytest.raises(ValueError, match="--gold wrong: the dataset has prompt, answer, right"):
        examine(HERE + "exact", rows, gold_column="wrong")


def test_the_command_examines_every_reward_of_a_config_and_exits_1_if_one_is_not_well(capsys):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(["rewards", "my.yaml", "--rows", "4", "a.b=1"])
    assert (args.config, args.overrides) == ("my.yaml", ["a.b=1"])
    specs = [RewardSpec(HERE + "exact"), RewardSpec(HERE + "generous")]
    assert doctor.examine_all(specs, ROWS[: args.rows]) == 1
    said = capsys.readouterr().out
    assert said.startswith("4 rows; the first one is row 0, as in the ids of prompts\n")
    assert f"{HERE}exact: ok" in said and f"{HERE}generous: NOT OK" in said and "4 of 4 score 1" in said


def test_a_missing_column_is_an_error():
    with pytest.raises(ValueError, match="needs the column 'answer'"):
        doctor.examine_all([RewardSpec(HERE + "exact")], [{"prompt": "?"}])
    with pytest.raises(ValueError, match="has no rows"):
        doctor.examine_all([RewardSpec(HERE + "exact")], [])


def test_tests_that_cannot_be_asked_are_named_with_the_reason(examine):
    code = {"canonical_solution": "import os\ndef f(): return len(os.listdir('/x'))", "prompt": "?"}
    asserts = {"type": "asserts", "entry_point": "f"}
    patched = "from unittest.mock import patch\nwith patch('os.listdir', lambda _: [1]):\n    assert f() == 1"
    rows = [
        {**code, "tests": {**asserts, "code": patched}},
        {**code, "tests": {**asserts, "code": "def test_f(capsys):\n    f()"}},
    ]
    _, checks = examine(RewardSpec("code"), rows)
    unusable = checks["unusable golds"]
    assert unusable.finding.startswith("2 of 2 (100.0%) abstain")
    assert "'patch(' in the tests does not reach the solution's process" in unusable.rows[0]
    assert "test_f needs the fixtures of pytest capsys" in unusable.rows[1]
