"""Three tasks of reasoning-gym tell what is wrong; its own scorer says what is right."""

from __future__ import annotations

import json

import pytest
import reasoning_gym

from recipes.environments import load
from recipes.environments.gym import countdown, mini_sudoku, number_sorting
from rollout.environment import EnvironmentFault, Turn


@pytest.mark.parametrize("name", ["countdown", "mini_sudoku", "number_sorting"])
def test_the_gold_answer_is_right_and_another_gets_a_reason(name):
    environment = load("gym", {"name": name})
    for entry in reasoning_gym.create_dataset(name, size=5, seed=1):
        row = {"entry": json.loads(json.dumps(entry, default=str))}
        gold = entry["answer"] or entry["metadata"]["expression"]
        reply = environment.open(row, 0).step(Turn(0, f"<think>1 + 1</think><answer>{gold}</answer>"))
        assert (reply.reward, reply.done) == (1.0, True)
        reply = environment.open(row, 0).step(Turn(0, "<answer>17</answer>"))
        assert (reply.reward, reply.done) == (0.0, False)
        assert reply.messages[0]["content"].endswith(". Answer again.")
    with pytest.raises(EnvironmentFault, match="the row has no column 'entry'"):
        environment.open({}, 0)


def test_reasons_are_about_the_answer():
    entry = {"metadata": {"numbers": [2, 3, 7], "target": 17}}
    assert countdown("2 * 3", entry) == "that is 6, and 17 is wanted; not used yet: [7]"
    assert countdown("3 * 7 - 4", entry) == (
        "that is 17, and 17 is wanted; not to be used: [4]; not used yet: [2]"
    )
    assert countdown("__import__('os')", entry).startswith("that cannot be computed")
    puzzle = [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    sudoku = {"metadata": {"puzzle": puzzle}}
    assert mini_sudoku("1 2 3", sudoku) == "the grid must have 4 rows of 4 digits"
    assert mini_sudoku("2 1 3 4\n3 4 1 2\n1 2 4 3\n4 3 2 1", sudoku) == "row 1, column 1 must stay 1"
    assert mini_sudoku("1 1 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 1", sudoku) == (
        "row 1 does not hold 1 to 4 once each: 1 1 3 4"
    )
    gold = {"answer": "['1', '2', '3']"}
    assert number_sorting("1 3", gold) == "missing: 2"
    assert number_sorting("1 2 3 3", gold) == "too many: 3"
    assert number_sorting("1 3 2", gold) == "the order is wrong from number 2 on"


def test_other_tasks_are_refused():
    with pytest.raises(
        ValueError, match="has no feedback; use one of countdown, mini_sudoku, number_sorting"
    ):
        load("gym", {"name": "chess"})


def test_an_expression_is_not_evaluated_by_the_scorer_unless_it_is_arithmetic(tmp_path):
    """reasoning-gym evaluates what a policy says, for as long as it takes."""
    environment = load("gym", {"name": "countdown"})
    (entry,) = reasoning_gym.create_dataset("countdown", size=1, seed=1)
    episode = environment.open({"entry": entry}, 0)
    file = tmp_path / "owned"
    for answer in (f"open({str(file)!r}, 'w').close()", "9**9**9", "10**400/3"):
        reply = episode.step(Turn(0, f"<answer>{answer}</answer>"))
        assert reply.reward == 0.0 and reply.messages[0]["content"].startswith("that cannot be computed")
    assert not file.exists()
