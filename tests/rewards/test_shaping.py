"""Length and repetition rewards: the papers' formulas, TRL's numbers, and clamped ends."""

import math

import pytest
from trl.rewards import get_cosine_scaled_reward, get_repetition_penalty_reward, get_soft_overlong_punishment

from rewards.language import LanguageConsistency
from rewards.plugins import load_reward
from rewards.pool.calling import grade
from rewards.shaping import CosineLength, KimiLength, Repetition, SoftOverlong
from rl.types import Reason, Reward

EXACT = {"accuracy": "rewards_for_tests:exact"}


def ids(*lengths):
    return [list(range(n)) for n in lengths]


def test_soft_overlong_falls_linearly_to_its_floor():
    fn = SoftOverlong(max_length=100, buffer=20)
    assert fn(ids(0, 80, 85, 90, 100, 101, 1000)) == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0, -1.0]


def test_soft_overlong_equals_trls():
    lengths = ids(*range(0, 60, 7))
    assert SoftOverlong(40, 15)(lengths) == get_soft_overlong_punishment(40, 15)(lengths)


def test_soft_overlong_without_a_buffer_is_a_step():
    assert SoftOverlong(max_length=4, buffer=0)(ids(4, 5)) == [0.0, -1.0]


@pytest.mark.parametrize("buffer", [-1, 101])
def test_soft_overlong_refuses_a_buffer_that_does_not_fit(buffer):
    with pytest.raises(
        ValueError, match=r"must be in 0..max_length=100; DAPO uses a fifth of max_length, here 20"
    ):
        SoftOverlong(max_length=100, buffer=buffer)


def test_repetition_counts_repeated_ngrams_of_tokens():
    fn = Repetition(ngram_size=2, max_penalty=-1.0)
    # 1234: 3 of 3 unique; 55555: 1 of 4 unique; 1212: (12 21 12) 2 of 3 unique; one token: no n-gram
    assert fn([[1, 2, 3, 4], [5] * 5, [1, 2, 1, 2], [1]]) == pytest.approx([0.0, -0.75, -1 / 3, 0.0])


def test_repetition_equals_trls():
    samples = [[1, 2, 3] * 5, [7] * 20, list(range(9)), [1], []]
    assert Repetition(3, -2.0)(samples) == pytest.approx(get_repetition_penalty_reward(3, -2.0)(samples))


def test_cosine_equals_trls_and_stays_at_its_end_beyond_the_maximum():
    lengths = [0, 13, 50, 99, 100, 150, 200]
    trl = get_cosine_scaled_reward(max_len=100)
    ours = CosineLength(max_length=100, **EXACT)
    for text, gold in (("\\boxed{3}", "\\boxed{3}"), ("\\boxed{4}", "\\boxed{3}")):
        n = len(lengths)
        chats = [[{"role": "assistant", "content": text}]] * n
        expected = trl(chats, [gold] * n, ids(*lengths))
        rewards = ours([""] * n, [text] * n, ids(*lengths), answer=[gold] * n)
        assert [r.score for r in rewards] == pytest.approx(expected)
    assert ours([""], ["3"], ids(200), answer=["3"])[0].score == 0.5
    assert ours([""], ["3"], ids(50), answer=["3"])[0].score == pytest.approx(0.75)
    assert ours([""], ["4"], ids(0), answer=["3"])[0].score == pytest.approx(-1.0)


def test_kimi_prefers_short_completions_among_those_of_one_prompt():
    fn = KimiLength(**EXACT)
    # lengths 10, 15, 20: lam = 0.5, 0, -0.5; wrong ones get min(0, lam)
    rewards = fn([""] * 3, ["3", "3", "3"], ids(10, 15, 20), answer=["3"] * 3)
    assert [r.score for r in rewards] == [0.5, 0.0, -0.5]
    rewards = fn([""] * 3, ["4", "4", "4"], ids(10, 15, 20), answer=["3"] * 3)
    assert [r.score for r in rewards] == [0.0, 0.0, -0.5]
    rewards = fn([""] * 2, ["3", "4"], ids(10, 10), answer=["3"] * 2)
    assert [r.score for r in rewards] == [0.0, 0.0]


def test_length_rewards_abstain_where_accuracy_does():
    for fn in (
        CosineLength(max_length=10, accuracy="rewards_for_tests:unusable_gold"),
        KimiLength("rewards_for_tests:unusable_gold"),
    ):
        (reward,) = fn([""], ["3"], ids(5))
        assert (reward.score, reward.reason) == (None, Reason.BAD_GOLD)


def test_length_rewards_need_the_columns_of_their_accuracy_reward():
    reward = load_reward("cosine_length", {"max_length": 10, **EXACT})
    # A group a call, as its accuracy reward is a function from outside; with a built-in one, a completion.
    assert (reward.required, reward.needs_ids, reward.groupwise) == (("answer",), True, True)
    assert not load_reward("cosine_length", {"max_length": 10}).groupwise
    columns = {"answer": ["3"], "unused": [0]}
    assert grade(reward, [""], completions=["3"], completion_ids=ids(10), columns=columns)[0].score == 0.5
    assert load_reward("kimi_length", EXACT).groupwise


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cosine_length", {"max_length": 0}, "max_length=0 must be >= 1"),
        ("cosine_length", {"max_length": 9, "min_correct": 2.0}, "<= min_correct=2.0 <= max_correct=1.0"),
        (
            "cosine_length",
            {"max_length": 9, "accuracy": "rewards_for_tests:judge"},
            "must not be async",
        ),
        ("kimi_length", {"accuracy": "matth"}, "no reward 'matth'"),
        ("repetition", {"ngram_size": 0}, "ngram_size=0 must be >= 1"),
        ("repetition", {"max_penalty": 1.0}, "max_penalty=1.0 <= 0"),
        ("language_consistency", {"language": "xx"}, "language='xx' is unknown; use one of en"),
    ],
)
def test_wrong_options_are_errors_when_the_reward_is_loaded(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_reward(name, options)


@pytest.mark.parametrize(
    ("language", "text", "share"),
    [
        ("en", "so the answer is 3", 1.0),
        ("en", "so the 答案 is", 3 / 5),  # so, the, is of 5 words: each Chinese character is one
        ("zh", "答案是 3", 1.0),
        ("zh", "答案 is", 2 / 3),
        ("ja", "答えは three", 3 / 4),
        ("ru", "ответ x", 1 / 2),
        ("ko", "답은 삼", 1.0),
        ("el", "το άλφα", 1.0),
        ("th", "คำ", 1.0),
        ("en", "3 + 4 = 7", 0.0),
        ("zh", r"<think>\frac{1}{2} 是</think>", 1.0),
        ("en", "so xответ aдва", 1 / 3),  # a Latin letter does not make a Russian word English
        ("ru", "ответ xдва", 1 / 2),
        ("en", "3 µm, ﬁnd, naïve", 1.0),
        ("ja", "世界 東x", 3 / 4),
        ("zh", "见 https://example.com ```print(x)``` 。", 1.0),
    ],
)
def test_language_consistency_is_the_share_of_words_in_the_language(language, text, share):
    (reward,) = LanguageConsistency(language)([text])
    assert math.isclose(reward.score, share)


def test_language_consistency_names_words_of_other_languages():
    assert LanguageConsistency("en")(["so 答 is"]) == [Reward(2 / 3, Reason.SCORED, "other words: 答")]
