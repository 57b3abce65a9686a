"""Names lead to reward functions; signatures say which columns they need."""

import sys
from importlib.metadata import EntryPoint

import numpy as np
import pytest
import rewards_for_tests
import torch

from rewards import plugins
from rewards.completion import completion_text, last_message_text
from rewards.plugins import import_path, load_reward
from rewards.pool.calling import BadValue, grade
from rl.types import Reason, Reward


def call(name, completions, *, options=None, ids=None, **columns):
    reward = load_reward(name, options)
    prompts = [""] * len(completions)
    return grade(reward, prompts, completions=completions, completion_ids=ids, columns=columns)


def scores(*args, **kwargs):
    return [reward.score for reward in call(*args, **kwargs)]


@pytest.mark.parametrize("name", ["rewards_for_tests:length", "rewards_for_tests.length"])
def test_import_paths_with_colon_and_with_dots_lead_to_the_function(name):
    assert load_reward(name).fn is rewards_for_tests.length


def test_an_entry_point_of_the_group_is_found_by_its_name(monkeypatch):
    point = EntryPoint("my_length", "rewards_for_tests:length", "cohort.rewards")
    monkeypatch.setattr(
        "importlib.metadata.entry_points", lambda *, group: [point] if group == "cohort.rewards" else []
    )
    assert load_reward("my_length").fn is rewards_for_tests.length


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("think_fromat", "no reward 'think_fromat'; did you mean think_format"),
        ("rewards_for_tests:lenght", "rewards_for_tests has no 'lenght'; did you mean length?"),
        ("no_such_module_here:f", "there is no module 'no_such_module_here'; it must be installed"),
        ("rewards_for_tests:not_callable", "is int, not a function"),
        ("rewards_for_tests:make_scaled", "needs the option 'factor'"),
        ("rewards_for_tests:make_scaled", "a function that itself grades takes `completions`, a list"),
        ("rewards_for_tests:makes_nothing", "returned float"),
    ],
)
def test_a_name_that_leads_nowhere_is_explained(name, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        load_reward(name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\n\ndef f(:\n", ", line 3: SyntaxError: invalid syntax"),
        (
            "import os\nimport nothing_so\n",
            ", line 2: ModuleNotFoundError: No module named 'nothing_so'",
        ),
        ("def half():\n    return 1 / 0\n\nhalf()\n", ", line 4: ZeroDivisionError: division by zero"),
    ],
)
def test_a_fault_inside_of_a_module_is_told_by_file_and_line(text, said, tmp_path, monkeypatch):
    """It is not told as a module that must be installed."""
    (tmp_path / "faulty.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^reward 'faulty:f': importing faulty failed: ") as raised:
        load_reward("faulty:f")
    assert str(raised.value).endswith(f"{tmp_path / 'faulty.py'}{said}")
    assert "must be installed" not in str(raised.value)


def test_columns_come_from_the_signature():
    reward = load_reward("rewards_for_tests:exact")
    assert (reward.required, reward.optional, reward.takes_any) == (("answer",), ("bonus",), True)
    reward = load_reward("rewards_for_tests:ids")
    assert (reward.required, reward.given) == ((), {"completion_ids"})
    assert not reward.takes("anything")


def test_facts_of_episodes_go_only_to_those_that_name_them():
    """A function of TRL's that hands its keywords on gets what TRL gives, and nothing of ours."""
    anything = load_reward(lambda completions, **rest: [0.0], name="f")
    assert {"prompts", "trainer_state", "log_metric"} < set(anything.given)
    assert "completion_facts" not in anything.given
    named = load_reward(lambda completions, completion_facts, **rest: [0.0], name="g")
    assert "completion_facts" in named.given


def test_options_bind_parameters_and_win_over_a_column_of_the_same_name():
    assert scores("rewards_for_tests:exact", ["a"], answer=["a"], options={"bonus": 0.5}) == [1.5]
    assert scores("rewards_for_tests:exact", ["a"], answer=["a"], bonus=[9.0], options={"bonus": 0.5}) == [
        1.5
    ]
    assert load_reward("rewards_for_tests:exact", {"answer": "a"}).required == ()


@pytest.mark.parametrize(("name", "column"), [("math", "answer"), ("code", "tests"), ("box_iou", "box")])
def test_a_column_of_a_built_in_reward_is_no_option_of_it(name, column):
    remedy = rf"reads '{column}' from the column .* set data.rename={{column: {column}}}"
    with pytest.raises(ValueError, match=remedy):
        load_reward(name, {column: "solution"})


def test_an_unknown_option_is_an_error_even_where_the_function_swallows_anything():
    with pytest.raises(ValueError, match="has no option 'bonsu'; did you mean 'bonus'"):
        load_reward("rewards_for_tests:exact", {"bonsu": 1})
    with pytest.raises(ValueError, match="has no option 'facto'; did you mean 'factor'"):
        load_reward("rewards_for_tests:make_scaled", {"facto": 1})


def test_factories_and_classes_are_called_with_the_options():
    assert scores("rewards_for_tests:make_scaled", ["ab"], options={"factor": 2, "offset": 1}) == [5.0]
    assert scores("rewards_for_tests:Scaled", ["ab"], options={"factor": 3}) == [6.0]
    assert scores("rewards_for_tests:Scaled", ["ab"]) == [2.0]


def test_built_in_rewards_take_options_by_keyword_only_and_never_from_a_column():
    reward = load_reward("think_format")
    assert not reward.takes("open_in_prompt")
    assert not reward.takes_any


def test_async_functions_and_groupwise_marks_are_seen():
    assert load_reward("rewards_for_tests:judge").is_async
    assert scores("rewards_for_tests:judge", ["abc"]) == [3.0]
    assert load_reward("rewards_for_tests:centred").groupwise
    assert not load_reward("rewards_for_tests:length").groupwise
    assert load_reward("rewards_for_tests:length", {"groupwise": True}).groupwise
    with pytest.raises(ValueError, match="contradict each other; give one of them"):
        load_reward("rewards_for_tests:length", {"groupwise": True, "per_completion": True})


def test_what_trl_passes_besides_columns_is_there():
    assert scores("rewards_for_tests:trl_extras", ["a", "b"], other=[1, 2]) == [1.0, 1.0]


@pytest.mark.parametrize(
    "fault", ["nan", "inf", "huge", "text", "long", "empty", "scalar", "nothing", "dict", "array"]
)
def test_a_value_that_is_no_number_per_completion_is_refused(fault):
    with pytest.raises(BadValue, match="expected"):
        call("rewards_for_tests:length", [fault])


@pytest.mark.parametrize(
    "values",
    [[1, 0.5], (True, 0.5), np.array([1, 0.5]), torch.tensor([1.0, 0.5]), [np.float32(1), torch.tensor(0.5)]],
)
def test_lists_tuples_arrays_and_tensors_of_numbers_are_taken(values, monkeypatch):
    monkeypatch.setattr(rewards_for_tests, "length", lambda completions: values)
    assert scores("rewards_for_tests:length", ["", ""]) == [1.0, 0.5]


def test_none_means_not_applicable_and_rewards_keep_their_reason():
    assert call("rewards_for_tests:half", ["a", "b"]) == [Reward(1.0), Reward(None, Reason.NOT_APPLICABLE)]
    (reward,) = call("rewards_for_tests:rich", ["x"], answer=["x"])
    assert (reward.reason, reward.detail, reward.extracted) == (Reason.CORRECT, "as it should be", "x")


def test_import_path_of_a_module_level_function_and_of_nothing_else():
    assert import_path(rewards_for_tests.length) == "rewards_for_tests:length"
    local = rewards_for_tests.make_scaled(1.0)
    for fn in (lambda completions: [0.0], local, rewards_for_tests.Scaled()):
        with pytest.raises(ValueError, match="cannot be imported by a grader process"):
            import_path(fn)


def test_completion_text_joins_what_the_assistant_said():
    chat = [
        {"role": "assistant", "content": "a"},
        {"role": "tool", "content": "t"},
        {"role": "assistant", "content": "b"},
    ]
    assert completion_text(chat) == "a\nb"
    assert completion_text("a") == "a"
    assert completion_text([{"role": "assistant", "content": None}]) == ""
    said = [{"role": "tool", "content": "the answer is 5"}, {"role": "user", "content": "no"}]
    assert last_message_text([*chat, *said]) == "b" and last_message_text(said) == ""
    assert last_message_text(chat) == "b" and last_message_text([]) == last_message_text([{}]) == ""
    parts = [{"type": "image"}, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert completion_text([{"role": "assistant", "content": parts}]) == "ab"


def test_every_built_in_name_is_a_string_path_that_names_this_package():
    assert all(path.startswith("rewards.") and path.count(":") == 1 for path in plugins.BUILT_IN.values())
    assert "rewards" in sys.modules
