"""The reward pool: order, isolation of every kind of fault, composition, TRL's own functions."""

import datetime
import os
import signal

import pytest
import rewards_for_tests
from pool_parts import both_ready, completion, group
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

from rewards.compose import RewardSpec
from rewards.pool.pool import RewardPool
from rewards.pool.ticket import Ticket
from rl.types import Group, Prompt, Reason
from tests.waiting import wait_until

HERE = "rewards_for_tests:"


@pytest.fixture(scope="module")
def pool():
    with_closing = RewardPool([HERE + "length"], workers=2, deadline_s=2.0, memory_bytes=200 << 20)
    yield with_closing
    with_closing.close()


def scores(pool, *args, **kwargs):
    return [reward.score for reward in pool.score([group(*args, **kwargs)])[0].rewards]


def test_rewards_come_back_in_the_order_of_groups_and_completions(pool):
    groups = [group(["x" * (i + j) for j in range(3)], id=f"p/{i}") for i in range(20)]
    scored = pool.score(groups)
    assert [s.group for s in scored] == groups
    assert [[r.score for r in s.rewards] for s in scored] == [[i, i + 1, i + 2] for i in range(20)]


def holder_of_a_call(pool):
    return next((grader.process.pid for grader in list(pool._graders._graders) if grader.calls), None)


FAULTS = {
    "hang": "timeout",
    "spin": "timeout",
    "segfault": "crash",
    "exit": "crash",
    "close": "crash",
    "hog": "memory",
    "leave": "raised",
    "raise": "raised",
    **dict.fromkeys(
        ["nan", "inf", "huge", "text", "long", "empty", "scalar", "nothing", "dict", "array"], "bad_value"
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_grader_that_fails_costs_its_own_sample_and_no_other(pool, fault):
    pool.take_faults()
    scored = pool.score([group(["a", fault, "abc"], id="p/1"), group(["abcd"], id="p/2")])
    assert [[r.score for r in s.rewards] for s in scored] == [[1.0, None, 3.0], [4.0]]
    assert scored[0].rewards[1].reason is Reason.INFRA_ERROR
    assert scored[0].rewards[1].detail.startswith(FAULTS[fault])
    faults = pool.take_faults()
    assert faults.counts == {FAULTS[fault]: 1}
    assert (faults.num_faulty, faults.num_graded, faults.share) == (1, 4, 0.25)
    assert faults.examples[0].startswith(f"{HERE}length on p/1: {FAULTS[fault]}: ")
    assert pool.faults.num_graded == 0


def test_a_completion_larger_than_any_pipe_arrives_whole(pool):
    assert scores(pool, ["x" * 3_000_000, "ab"]) == [3e6, 2.0]


def test_every_sample_failing_at_once_ends_and_leaves_a_working_pool(pool):
    assert scores(pool, ["segfault", "hang", "exit", "raise"] * 2) == [None] * 8
    assert scores(pool, ["ab"]) == [2.0]


def test_a_grader_killed_from_outside_loses_nothing(tmp_path):
    pool = RewardPool([HERE + "once"], workers=2)
    try:
        texts = ["a", str(tmp_path / "1"), "b", str(tmp_path / "2"), "c"]
        assert scores(pool, texts) == [1.0] * 5
        assert pool.faults.num_faulty == 0
        assert (tmp_path / "1").exists() and (tmp_path / "2").exists()  # both did die once
    finally:
        pool.close()


def test_idle_graders_killed_from_outside_are_replaced(pool):
    for pid in pool.pids():
        os.kill(pid, signal.SIGKILL)
    assert scores(pool, ["a", "ab"]) == [1.0, 2.0]


def test_a_second_grader_that_dies_before_the_retry_reaches_it_loses_nothing():
    pool = RewardPool([HERE + "length"], workers=2)
    try:
        wait_until(lambda: both_ready(pool), "both graders are ready")
        first, second = pool.pids()
        for pid in (first, second):
            os.kill(pid, signal.SIGSTOP)  # neither reads what it gets
        future = pool.submit(group(["a"]))
        wait_until(lambda: holder_of_a_call(pool) == first, "it was sent")
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: holder_of_a_call(pool) == second, "the other one has it")
        os.kill(second, signal.SIGKILL)
        assert [reward.score for reward in future.result(timeout=60).rewards] == [1.0]
        assert pool.faults.counts == {}
    finally:
        pool.close()


def test_what_graders_print_does_not_disturb_the_answers():
    pool = RewardPool([HERE + "noisy"])
    try:
        assert scores(pool, ["a", "b", "c"]) == [1.0, 1.0, 1.0]
    finally:
        pool.close()


def test_graders_ignore_ctrl_c_and_import_no_torch():
    pool = RewardPool([HERE + "environment", "think_format"])
    try:
        (reward,) = pool.score([group(["a"])])[0].rewards
        assert reward.parts[HERE + "environment"] == 1.0  # 1 SIGINT is ignored + 2 * 0 torch is imported
    finally:
        pool.close()


def test_a_groupwise_reward_sees_a_whole_group_and_no_other(pool):
    single = RewardSpec(HERE + "batch_size", 0.0, options={"per_completion": True})
    pool = RewardPool([HERE + "centred", single])
    try:
        first, second = pool.score([group(["a", "abc"]), group(["abcdef"])])
        assert [r.score for r in first.rewards] == [-1.0, 1.0]  # lengths 1 and 3, mean 2
        assert [r.score for r in second.rewards] == [0.0]
        assert [r.parts[HERE + "batch_size"] for r in first.rewards] == [
            1.0,
            1.0,
        ]  # marked: one at a time
    finally:
        pool.close()


def test_a_groupwise_fault_costs_the_completion_that_caused_it():
    pool = RewardPool([HERE + "group_fault"], deadline_s=1.0)
    try:
        scored = pool.score([group(["segfault", "b"]), group(["a", "b"]), group(["hang", "b"])])
        assert [[r.score for r in s.rewards] for s in scored] == [[None, 1.0], [1.0, 1.0], [None, 1.0]]
        assert pool.faults.counts == {"crash": 1, "timeout": 1}
    finally:
        pool.close()


def test_aborted_completions_are_neither_graded_nor_counted():
    pool = RewardPool([HERE + "centred", HERE + "length"])
    try:
        g = group(["abc", "segfault", "a"])
        g.completions[1].finish_reason = "abort"
        rewards = pool.score([g])[0].rewards
        assert [r.score for r in rewards] == [4.0, None, 0.0]  # 3 + (3 - 2), aborted, 1 + (1 - 2)
        assert rewards[1].parts == {HERE + "centred": None, HERE + "length": None}
        assert (pool.faults.num_faulty, pool.faults.num_graded) == (0, 2)
    finally:
        pool.close()


def test_async_rewards_run_beside_each_other_and_a_stuck_one_costs_itself():
    pool = RewardPool([HERE + "judge"], workers=1, deadline_s=1.0)
    try:
        assert scores(pool, ["meet"] * 3) == [4.0] * 3
        assert scores(pool, ["a", "hang", "abc"]) == [1.0, None, 3.0]
        assert scores(pool, ["a", "block", "abc"]) == [1.0, None, 3.0]
        assert pool.faults.counts == {"timeout": 2}
    finally:
        pool.close()


def test_answers_that_come_before_all_calls_are_made_complete_the_group_once(pool):
    ticket = Ticket(pool._grading, group(["abc", "a"]))
    call, left = ticket._call, []

    def call_and_wait(*given):
        left.append(ticket._missing - 1)
        call(*given)
        wait_until(lambda: ticket._missing == left[-1], "the answer has come")

    ticket._call = call_and_wait
    scored = ticket.start().result(timeout=30)
    assert left == [1, 0] and [r.score for r in scored.rewards] == [3.0, 1.0]


def test_parts_weights_gates_and_none_are_composed():
    specs = [
        RewardSpec(HERE + "exact", 2.0, requires=HERE + "half", options={"bonus": 0.5}),
        RewardSpec(HERE + "half", 0.25),
    ]
    pool = RewardPool(specs)
    try:
        rewards = pool.score([group(["ab", "b"], answer="ab")])[0].rewards
        assert [r.score for r in rewards] == [
            3.25,
            1.0,
        ]  # 2 * 1.5 + 0.25; "half" does not apply: open gate, 2 * 0.5
        assert rewards[0].parts == {HERE + "exact": 1.5, HERE + "half": 1.0}
        assert rewards[1].parts == {HERE + "exact": 0.5, HERE + "half": None}
    finally:
        pool.close()


def test_a_bad_gold_abstains_without_being_a_fault_and_a_broken_sandbox_is_one():
    pool = RewardPool([RewardSpec(HERE + "unusable_gold"), RewardSpec(HERE + "broken_sandbox", 0.0)])
    try:
        (reward,) = pool.score([group(["a"])])[0].rewards
        assert (reward.score, reward.reason) == (None, Reason.BAD_GOLD)
        assert pool.faults.counts == {"infra_error": 1}
    finally:
        pool.close()


def test_trl_reward_functions_run_unchanged():
    texts = ["<think>t</think>\\boxed{3}", "<think>t</think>\\boxed{4}", "\\boxed{3}"]
    token_ids = [[1, 2, 3, 4], [5, 5, 5, 5, 5], [7] * 12]
    messages = ({"role": "user", "content": "1 + 2?"},)
    prompt = Prompt("p", "", (1,), messages, {"solution": "$3$", "unused": {"a": [1]}})
    g = Group(prompt, [completion(t, ids) for t, ids in zip(texts, token_ids, strict=True)])
    overlong = {"max_completion_len": 10, "soft_punish_cache": 6}
    pool = RewardPool(
        [
            "trl.rewards:think_format_reward",
            "trl.rewards.accuracy_reward",
            RewardSpec("trl.rewards:get_soft_overlong_punishment", options=overlong),
            RewardSpec("trl.rewards:get_repetition_penalty_reward", options={"ngram_size": 2}),
        ],
        deadline_s=60,
    )
    try:
        pool.check_columns(prompt.columns, prompt.columns)
        parts = [list(r.parts.values()) for r in pool.score([g])[0].rewards]
    finally:
        pool.close()
    assert [p[:2] for p in parts] == [[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    assert [p[2] for p in parts] == get_soft_overlong_punishment(**overlong)(token_ids)
    assert [p[3] for p in parts] == get_repetition_penalty_reward(2)(token_ids) == [0.0, -0.75, -10 / 11]


def test_a_missing_column_is_an_error_before_anything_is_graded():
    pool = RewardPool([HERE + "exact", "think_format"])
    try:
        assert pool.required_columns() == {"answer"}
        with pytest.raises(
            ValueError, match=r"needs the column 'answer'; the dataset has: answers, id; did you mean"
        ):
            pool.check_columns({"id", "answers"})
        with pytest.raises(ValueError, match="column 'answer' holds date, and graders get JSON"):
            pool.check_columns({"answer"}, {"answer": datetime.date(2026, 1, 1)})
        pool.check_columns({"answer", "day"}, {"answer": "3", "day": datetime.date(2026, 1, 1)})
        unused_day = group(["3"], answer="3", day=datetime.date(2026, 1, 1))
        assert pool.score([unused_day])[0].rewards[0].parts[HERE + "exact"] == 1.0
    finally:
        pool.close()


def test_a_function_is_taken_if_graders_can_import_it_and_refused_if_not():
    pool = RewardPool([rewards_for_tests.length])
    try:
        assert scores(pool, ["ab"]) == [2.0]
    finally:
        pool.close()
    with pytest.raises(ValueError, match="lambdas, nested functions"):
        RewardPool([lambda completions: [0.0]])
