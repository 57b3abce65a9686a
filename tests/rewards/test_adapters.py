"""Rewards to and from TRL, verl, OpenRLHF and AReaL."""

import pickle

import pytest
import rewards_for_tests
import torch

from rewards.adapters import as_areal, as_openrlhf, as_trl, as_verl
from rewards.plugins import load_reward
from rewards.pool.calling import grade

HERE = "rewards_for_tests:"


def scores(name, completions, *, options=None, prompts=None, ids=None, **columns):
    reward = load_reward(name, options)
    prompts = prompts or [""] * len(completions)
    return [
        r.score for r in grade(reward, prompts, completions=completions, completion_ids=ids, columns=columns)
    ]


def test_as_trl_gives_floats_and_none_under_a_name_that_trl_can_log():
    reward = as_trl(HERE + "half")
    assert reward.__name__ == "half"
    assert reward(
        prompts=["", ""], completions=["a", "b"], completion_ids=[[1], [2]], trainer_state=None
    ) == [1.0, None]
    assert as_trl("think_format")(prompts=[""], completions=["<think>a</think>b"]) == [1.0]
    assert as_trl(rewards_for_tests.length).__name__ == "length"


def test_as_trl_takes_chats_options_and_columns():
    chat = [{"role": "assistant", "content": "<think>a</think>b"}]
    assert as_trl("think_format")(prompts=[[]], completions=[chat]) == [1.0]
    reward = as_trl(HERE + "exact", bonus=0.5)
    columns = {"answer": ["a", "a"], "other": [0, 0], "trainer_state": object(), "log_extra": print}
    assert reward(prompts=["", ""], completions=["a", "b"], **columns) == [1.5, 0.5]
    with pytest.raises(ValueError, match="needs the column 'answer'; there are: other"):
        reward(prompts=[""], completions=["a"], other=[0])


def test_as_trl_keeps_the_groups_of_a_batch_apart():
    reward = as_trl(HERE + "centred")
    assert reward(prompts=["p", "p", "q", "q"], completions=["a", "abc", "abcdef", "abcdef"]) == [
        -1.0,
        1.0,
        0.0,
        0.0,
    ]


@pytest.mark.parametrize("name", ["think_format", HERE + "make_scaled"])
def test_as_trl_can_be_pickled(name):
    options = {"factor": 2.0} if "scaled" in name else {}
    reward = pickle.loads(pickle.dumps(as_trl(name, **options)))
    assert reward(prompts=[""], completions=["abc"]) in ([0.0], [6.0])


def test_async_rewards_run_in_trl_too():
    assert as_trl(HERE + "judge")(prompts=[""], completions=["abc"]) == [3.0]


def test_as_verl_scores_one_solution_and_says_why_it_abstained():
    compute_score = as_verl(HERE + "exact", bonus=0.5)
    found = compute_score(data_source="d", solution_str="a", ground_truth="a", extra_info={"index": 3})
    assert found == {"score": 1.5, "reason": "scored", "pred": ""}
    assert as_verl(HERE + "rich")("d", "x", "x")["pred"] == "x"
    assert as_verl(HERE + "unusable_gold", abstain=-1.0)("d", "a", "b") == {
        "score": -1.0,
        "reason": "bad_gold",
        "pred": "",
    }


def test_as_openrlhf_gets_completions_from_queries():
    found = as_openrlhf(HERE + "exact", bonus=1.0)(
        queries=["q: a", "q: b"], prompts=["q: ", "q: "], labels=["a", "a"]
    )
    assert torch.equal(found["rewards"], torch.tensor([2.0, 1.0]))
    assert torch.equal(found["scores"], torch.tensor([1.0, 1.0]))
    found = as_openrlhf(HERE + "unusable_gold")(["a"], ["a"], ["a"])
    assert torch.equal(found["extra_logs"]["abstained"], torch.tensor([1.0]))


def test_as_areal_scores_one_sample():
    reward_fn = as_areal(HERE + "exact")
    assert reward_fn("q", "a", [1], [2, 3], answer="a", task="t") == 1.0
    assert as_areal(HERE + "ids")("q", "a", [1], [2, 3], answer="a") == 5.0


def test_verls_functions_are_rewards_here():
    options = {"function": HERE + "compute_score", "data_source": "mine"}
    assert scores("verl", ["a", "b"], options=options, answer=["a", "a"]) == [1.0, 0.0]
    options = {"function": HERE + "compute_score", "answer": "gold"}
    assert load_reward("verl", options).required == ("gold",)
    columns = {"gold": ["a", "a"], "data_source": ["mine", "other"], "extra_info": [{"i": 1}, {"i": 2}]}
    assert scores("verl", ["a", "a"], options=options, **columns) == [1.0, 0.0]


def test_as_openrlhf_grades_no_prompt_as_an_answer():
    """Queries are decoded with special tokens, so a beginning of text may stand before the prompt."""
    found = as_openrlhf(HERE + "exact")(["<s>What is 3?", "<s>What is 3?3"], ["What is 3?"] * 2, ["3", "3"])
    assert found["rewards"].tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match=r"the query 'What is 4.*does not hold its prompt 'What is 3"):
        as_openrlhf(HERE + "exact")(["What is 4?3"], ["What is 3?"], ["3"])


def test_openrlhfs_functions_are_rewards_here():
    options = {"function": HERE + "reward_func"}
    assert scores("openrlhf", ["a", "b"], options=options, prompts=["q", "q"], answer=["a", "a"]) == [
        1.0,
        0.0,
    ]


def test_areals_functions_are_rewards_here():
    options = {"function": HERE + "reward_fn"}
    assert scores("areal", ["a", "b"], options=options, ids=[[1], [1, 2]], answer=["a", "a"]) == [1.01, 0.02]


def test_an_adapted_function_that_is_not_there_is_an_error_when_loaded():
    with pytest.raises(ValueError, match="did you mean compute_score"):
        load_reward("verl", {"function": HERE + "compute_scores"})
    with pytest.raises(ValueError, match="needs the option 'function'"):
        load_reward("verl")
