"""The report shows an episode as a conversation."""

from __future__ import annotations

from rl.report.groups import describe_group, describe_row
from rl.types import Completion, Group, Prompt, Reward, ScoredGroup


def shown(facts, turns=()):
    completion = Completion([1, 2, 3], [-1.0] * 3, [True, False, True], "stop", [], "last words")
    completion.facts = facts
    scored = ScoredGroup(Group(Prompt("p", "", (1,)), [completion]), [Reward(1.0, turns=turns)])
    (entry,) = describe_group(scored, None)["completions"]
    assert entry["length"] == 2
    return entry["text"]


def test_turns_have_their_rewards_and_answers_their_role():
    said = [
        {"role": "assistant", "content": "5?"},
        {"role": "user", "content": "higher"},
        {"role": "assistant", "content": "7?"},
    ]
    text = shown({"said": said, "limit": "turns"}, (0.0, None))
    assert text == "[turn 1, reward 0]\n5?\n[user]\nhigher\n[turn 2]\n7?\n[cut by its limit of turns]"
    assert shown({"said": said[:1], "fault": "down"}, (1.0,)) == "[turn 1, reward 1]\n5?\n[failed: down]"


def test_numbers_of_an_episode_are_of_the_tokens_that_the_policy_chose():
    """Advantages 2 and -1 by turn, on one token and two; the tool's four tokens have 0, and log-prob 0."""
    mask = [True, False, False, False, False, True, True]
    completion = Completion([1] * 7, [-4.0, 0.0, 0.0, 0.0, 0.0, -1.0, -2.0], mask, "stop", [])
    scored = ScoredGroup(Group(Prompt("p", "", (1,)), [completion, completion]), [Reward(1.0)] * 2)
    advantages = [[2.0, 0.0, 0.0, 0.0, 0.0, -1.0, -0.5], [1.0, 0.0, 0.0, 0.0, 0.0, -0.5, -0.5]]
    first, second = describe_group(scored, advantages)["completions"]
    assert (first["advantage"], second["advantage"]) == (0.1667, 0.0)  # 0.5 / 3, and 0
    assert first["logprobs"] == [-4.0, -1.0, -2.0]
    assert describe_row(scored, advantages[1:] * 2)[4] == 0  # turns of opposite signs teach


def test_a_completion_of_one_turn_and_a_damaged_record_are_shown_as_they_are():
    assert shown({}) == "last words"
    assert shown({"said": 7}) == "last words"
    assert shown({"said": ["x"]}) == "[]\n"


def test_groups_with_a_failed_tool_have_a_tag_and_their_seconds_are_told():
    said = [{"role": "assistant", "content": "f(1)"}]
    counts = {"calls": 2, "tool_errors": 1, "seconds/python": 1.234}
    text = shown({"said": said, "counts": counts})
    assert text == "[turn 1]\nf(1)\n[calls: 2]\n[tool_errors: 1]\n[python: 1.23 s]"
    for found, tag in (
        (counts, 8),
        ({"malformed": 1}, 8),
        ({"calls": 1}, 0),
        (7, 0),
        ({"malformed": "x"}, 0),
    ):
        completions = [Completion([1], [], [True], "stop", []) for _ in range(2)]
        completions[1].facts = {"counts": found}
        scored = ScoredGroup(Group(Prompt("p", "", (1,)), completions), [Reward(1.0), Reward(0.0)])
        assert describe_row(scored, None)[4] == tag
