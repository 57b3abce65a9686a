"""reasoning-gym's scoring: full scores by default, and no answer that runs as Python."""

import json

import pytest
import reasoning_gym

from rewards.gym import ALGEBRA, ALLOWED, ReasoningGym, find_answer
from rl.types import Reason


def entries(task, size=3):
    return [
        json.loads(json.dumps(e, default=str)) for e in reasoning_gym.create_dataset(task, size=size, seed=5)
    ]


def score(text, entry, **options):
    (reward,) = ReasoningGym(**options)([text], [entry])
    return reward.score


TASKS = ["chain_sum", "spell_backward", "basic_arithmetic", "leg_counting", "number_sorting", *ALLOWED]


@pytest.mark.parametrize("task", TASKS)
def test_the_oracle_answer_scores_one_in_every_place_where_an_answer_may_stand(task):
    for entry in entries(task):
        gold = entry["answer"]
        if "Integral(" in gold:  # unevaluated: it restates the question, and any completion could
            assert ReasoningGym()([gold], [entry])[0].reason is Reason.BAD_GOLD
            continue
        assert score(gold, entry) == 1.0
        assert score(f"<think>hm</think>\n<answer>\n{gold}\n</answer>", entry) == 1.0
        assert score(f"so \\boxed{{{gold}}}", entry) == 1.0


def test_a_list_of_guesses_pays_only_without_strict():
    entry = entries("letter_counting", 1)[0]
    guesses = f"{entry['answer']} or something else"
    assert score(guesses, entry) == 0.0
    lax = score(guesses, entry, strict=False)  # length of the oracle / length of the answer
    assert lax == pytest.approx(len(entry["answer"]) / len(guesses))


def test_no_answer_and_a_cut_one_score_nothing_even_where_the_task_pays_for_silence():
    entry = entries("countdown", 1)[0]
    for text, reason in (
        ("", Reason.NO_ANSWER),
        ("<think>1 + 2", Reason.TRUNCATED),
        ("<answer>1", Reason.TRUNCATED),
    ):
        (reward,) = ReasoningGym()([text], [entry])
        assert (reward.score, reward.reason) == (0.0, reason)


def test_an_entry_without_a_known_task_is_a_bad_gold():
    (reward,) = ReasoningGym()(["3"], [{"answer": "3", "metadata": {"source_dataset": "no_such_task"}}])
    assert (reward.score, reward.reason) == (None, Reason.BAD_GOLD)


PAYLOADS = [
    "__import__('os').system('touch {path}')",
    "open('{path}', 'w')",
    "(1).__class__.__base__.__subclasses__()",
    "[x for x in [open('{path}', 'w')]]",
    "eval(chr(49))",
    "exec(chr(49))",
    "sympify('1')",
    "x.__class__",
    "lambda: 1",
    "9**9**9**9",
    "9**999999999",
    "2**(9**9)",
    "f\"{{open('{path}', 'w')}}\"",
]


@pytest.mark.parametrize("task", ALLOWED)
def test_answers_that_run_as_python_never_reach_the_evaluating_tasks(task, tmp_path):
    path = tmp_path / "written"
    entry = next(entry for entry in entries(task) if "Integral(" not in entry["answer"])
    grade = ReasoningGym(strict=False)
    for payload in PAYLOADS:
        (reward,) = grade([payload.replace("{path}", str(path))], [entry])
        assert reward.score == 0.0
        assert reward.reason is Reason.FORBIDDEN or not set(payload) & set("(){}*.")
    assert not path.exists()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("task", ALLOWED)
@pytest.mark.parametrize("unit", ["1", "1.", "x", "x ", "(", "**1", "sqrt", " "])
def test_long_hostile_answers_are_matched(task, unit):
    ALLOWED[task].fullmatch(unit * (200_000 // len(unit)) + "!")


@pytest.mark.parametrize(
    "answer", ["x**3 - 2*x**2 + 1.5", "C + 3*x**(1/2)/4", "exp(2*x)*sin(x)/2 - log(x)", "-(x + 1)**10"]
)
def test_ordinary_algebra_is_let_through(answer):
    assert ALGEBRA.fullmatch(answer)


@pytest.mark.parametrize(
    ("text", "where", "expected"),
    [
        ("a <answer>1</answer> b <answer> 2 </answer>", "auto", "2"),
        (r"\boxed{\frac{1}{2}}", "auto", r"\frac{1}{2}"),
        ("<think>\\boxed{1}</think> 7", "auto", "7"),
        (r"<answer>1</answer> \boxed{2}", "box", "2"),
        (r"<answer>1</answer>", "text", "<answer>1</answer>"),
    ],
)
def test_where_the_answer_stands(text, where, expected):
    assert find_answer(text, where) == expected
