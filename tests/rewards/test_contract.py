"""The contract of `rewards`: what a call of a reward function holds, in training and elsewhere."""

import json
from types import SimpleNamespace

import pytest
from contract_rewards import ranked
from pool_parts import completion, group
from trl.rewards import (
    accuracy_reward,
    get_cosine_scaled_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    think_format_reward,
)

from recipes.cli import main
from rewards.adapters import as_openrlhf, as_trl
from rewards.compose import RewardSpec
from rewards.plugins import load_reward
from rewards.pool.pool import RewardPool
from rl.types import Group, Prompt, VersionSpan
from rollout.chat import render_prompts

HERE = "contract_rewards:"
QUESTION = ({"role": "user", "content": "1 + 2?"},)


@pytest.fixture
def grade():
    pools = []

    def grade_(spec, *groups, **options):
        """The rewards of each group, from a pool that may be asked for its faults."""
        pools.append(RewardPool([spec], **{"deadline_s": 60.0, **options}))
        return [scored.rewards for scored in pools[-1].score(groups)], pools[-1].faults

    yield grade_
    for pool in pools:
        pool.close()


def scores(found):
    return [[reward.score for reward in rewards] for rewards in found]


@pytest.mark.parametrize("messages", [(), QUESTION])
def test_a_function_that_compares_completions_gets_the_group_of_one_prompt_without_being_marked(
    grade, messages
):
    groups = [group(["a", "abc", "ab"], messages=messages), group(["abcd", "abcde"], messages=messages)]
    found, _ = grade(HERE + "longest", *groups)
    assert scores(found) == [[0.0, 1.0, 0.0], [0.0, 1.0]]


def test_built_in_rewards_and_marked_functions_get_one_completion_a_call(grade):
    function = {"function": "rewards_for_tests:reward_fn"}
    assert not load_reward("math").groupwise and not load_reward("areal", function).groupwise
    assert load_reward("openrlhf", function).groupwise
    for options in ({"per_completion": True}, {"groupwise": False}):
        found, _ = grade(RewardSpec(HERE + "longest", options=options), group(["a", "abc", "ab"]))
        assert scores(found) == [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize(("fault", "kind"), [("hang", "timeout"), ("raise", "raised")])
def test_a_fault_in_a_group_call_costs_its_completion_and_the_rest_is_compared_without_it(grade, fault, kind):
    found, faults = grade(HERE + "longest", group(["a", fault, "abc", "ab"]), deadline_s=1.5, workers=2)
    assert scores(found) == [[0.0, None, 1.0, 0.0]]
    assert found[0][1].detail.startswith(kind)
    assert faults.counts == {kind: 1} and (faults.num_faulty, faults.num_graded) == (1, 4)


def test_a_function_that_fails_on_groups_only_abstains_and_the_fault_names_the_remedy(grade):
    found, faults = grade(HERE + "refuses_groups", group(["a", "b"]))
    assert scores(found) == [[None, None]] and faults.counts == {"raised": 2}
    assert "one at a time, please" in found[0][0].detail
    assert found[0][0].detail.endswith("may have the option per_completion: true")


TEXTS = ["<think>t</think>\\boxed{3}", "<think>\\boxed{3}</think> none", "\\boxed{4}"]
IDS = [[1, 2, 3, 4], [5, 5, 5, 5, 5], [7] * 12]
FROM_TRL = {
    "think_format_reward": (think_format_reward, {}),
    "accuracy_reward": (accuracy_reward, {}),
    "reasoning_accuracy_reward": (reasoning_accuracy_reward, {}),
    "get_cosine_scaled_reward": (get_cosine_scaled_reward, {"max_len": 10}),
    "get_repetition_penalty_reward": (get_repetition_penalty_reward, {"ngram_size": 2}),
    "get_soft_overlong_punishment": (
        get_soft_overlong_punishment,
        {"max_completion_len": 10, "soft_punish_cache": 6},
    ),
}


def asked(**columns):
    prompt = Prompt("p", "", (1,), QUESTION, columns)
    return Group(prompt, [completion(text, ids) for text, ids in zip(TEXTS, IDS, strict=True)])


def test_each_reward_of_trl_scores_here_what_it_scores_there():
    chats = [[{"role": "assistant", "content": text}] for text in TEXTS]
    pool = RewardPool([RewardSpec(f"trl.rewards:{n}", options=o) for n, (_, o) in FROM_TRL.items()])
    try:
        rewards = pool.score([asked(solution="$3$")])[0].rewards
    finally:
        pool.close()
    for name, (made, options) in FROM_TRL.items():
        reward = made(**options) if options else made
        there = reward(completions=chats, completion_ids=IDS, solution=["$3$"] * 3)
        assert len(set(there)) > 1, name
        assert [one.parts[f"trl.rewards:{name}"] for one in rewards] == there, name


def test_a_function_gets_trainer_state_and_the_loggers_as_in_trl(grade):
    sampled = asked()
    for one in sampled.completions:
        one.version_spans = [VersionSpan(5, 1), VersionSpan(6, 1)]
    found, _ = grade(HERE + "curriculum", sampled, num_steps=24)
    assert scores(found) == [[304.25, 305.25, 312.25]]  # 6 / 24 + tokens + 100 x 3 completions


def test_an_async_function_gets_the_group_too(grade):
    found, _ = grade(HERE + "ranked", asked())
    assert scores(found) == [[1.0, 2.0, 0.0]]


def test_trls_own_state_and_loggers_reach_a_reward_that_runs_in_its_trainer():
    logged = []
    state = SimpleNamespace(global_step=3, max_steps=4)
    reward = as_trl(HERE + "curriculum")
    found = reward(
        prompts=["p", "p", "q"],
        completions=[[{"role": "assistant", "content": text}] for text in "abc"],
        completion_ids=[[1]] * 3,
        trainer_state=state,
        log_extra=lambda name, values: logged.append(values),
        log_metric=lambda name, value: None,
    )
    assert found == [201.75, 201.75, 101.75]
    assert logged == [["a", "b"], ["c"]]


def test_groups_of_openrlhfs_batch_stay_apart():
    found = as_openrlhf(HERE + "longest")(["q: a", "q: bc", "r: a"], ["q: ", "q: ", "r: "], [""] * 3)
    assert found["rewards"].tolist() == [0.0, 1.0, 1.0]
    assert ranked.__name__ == "ranked"


@pytest.mark.parametrize("data", [{}, {"chat": False}, {"columns": ["answer"], "system_prompt": "Be short."}])
def test_the_doctor_passes_what_training_passes(tmp_path, capsys, tiny_model_dir, data):
    from transformers import AutoTokenizer

    rows = [{"prompt": "What is w1 ?", "answer": "w1", "other": [1]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"source": str(tmp_path / "rows.jsonl"), "template": "{prompt} Box it.", **data}
    seen = tmp_path / "seen.jsonl"
    spec = {"name": HERE + "Recorder", "options": {"path": str(seen)}}
    config = {"data": source, "rewards": {"functions": [spec]}, "model": {"name": str(tiny_model_dir)}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))

    main(["doctor", "rewards", str(tmp_path / "config.yaml"), "--workers", "1"])
    assert "faults: graders failed on 0" in capsys.readouterr().out
    by_doctor = json.loads(seen.read_text().splitlines()[0])  # an empty completion comes first

    seen.unlink()
    names = ("chat", "columns", "system_prompt")
    (prompt,) = render_prompts(
        rows,
        AutoTokenizer.from_pretrained(tiny_model_dir),
        prefix="train",
        prompt_column="prompt",
        template=source["template"],
        max_prompt_length=99,
        **{name: data[name] for name in names if name in data},
    )
    pool = RewardPool([RewardSpec(spec["name"], options=spec["options"])])
    try:
        pool.score([Group(prompt, [completion("", [0])])])
    finally:
        pool.close()
    assert [by_doctor] == [json.loads(line) for line in seen.read_text().splitlines()]
    assert isinstance(by_doctor["completions"][0], str) == (data.get("chat") is False)
