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
