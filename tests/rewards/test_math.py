"""What `grade` answers beyond right and wrong, the policy options, and the calling convention of trainers."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rewards.math.grader import MathOptions, grade, math_reward
from rewards.math.words import COMMANDS, DROPPED, TEXT_STYLES, WORDS
from rl.types import Reason

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "cases" / "math.jsonl"


@pytest.mark.parametrize(
    ("completion", "gold", "score", "reason"),
    [
        ("so \\boxed{\\frac{1}{2}}", "0.5", 1.0, Reason.CORRECT),
        ("so \\boxed{3}", "0.5", 0.0, Reason.WRONG_ANSWER),
        ("\\boxed{7 \\text{ or } 8}", "7", 0.0, Reason.HEDGE),
        ("\\boxed{7}, \\boxed{8}", "8", 0.0, Reason.HEDGE),
        ("\\boxed{8 = 7}", "7", 0.0, Reason.HEDGE),
        ("<think>\\boxed{7}", "7", 0.0, Reason.TRUNCATED),
        ("\\boxed{\\frac{1}{2}", "0.5", 0.0, Reason.TRUNCATED),
        ("<think>\\boxed{7}</think>", "7", 0.0, Reason.NO_ANSWER),
        ("\\boxed{\\write18{ls}}", "7", 0.0, Reason.PARSE_ERROR),
        ("\\boxed{\\frac{7}{0}}", "7", 0.0, Reason.BAD_VALUE),
        ("\\boxed{9^{9^{9^9}}}", "7", 0.0, Reason.TOO_COMPLEX),
        ("\\boxed{7}", "", None, Reason.BAD_GOLD),
        ("\\boxed{NaN}", "NaN", None, Reason.BAD_GOLD),
        ("\\boxed{\\frac{0}{0}}", "\\frac{0}{0}", None, Reason.BAD_GOLD),
        ("no answer here", "  ", None, Reason.BAD_GOLD),
    ],
)
def test_each_outcome_has_its_reason(completion, gold, score, reason):
    reward = grade(completion, gold)
    assert (reward.score, reward.reason) == (score, reason)


def test_the_reward_says_what_was_extracted_and_how_long_it_took():
    reward = grade("<think>\\boxed{8}</think> The roots are $\\boxed{1}$ and $\\boxed{2}$.", "\\{1, 2\\}")
    assert reward.extracted == "1, 2"
    assert reward.elapsed_ms > 0


# gold, answer, options that pay it, options that do not
POLICIES = [
    ("50\\%", "50", {}, {"percent": "hundredths"}),
    ("50\\%", "0.5", {"percent": "hundredths"}, {"percent": "sign"}),
    ("5", "5\\text{ cm}", {}, {"units": "strict"}),
    ("5\\text{ cm}", "5\\text{ m}", {"units": "ignore"}, {}),
    ("90^\\circ", "90", {}, {"degrees": "radians"}),
    ("\\frac{1}{3}", "0.333", {"decimal_rtol": 0.01}, {}),
    ("0.3", "0.30000000000000004", {}, {"decimal_rtol": 0.0}),
    ("1.22", "1,22", {}, {"decimal_comma": False}),
    ("1, 2", "2, 1", {}, {"ordered_lists": True}),
    ("3", "\\{3\\}", {}, {"loose_shapes": False}),
    ("1:2", "\\frac12", {}, {"loose_shapes": False}),
    ("11", "x = 7 = 11", {"chains": "last"}, {}),
    ("84", "58 + 26", {}, {"evaluated": True}),
    ("84", "58 + 26 = 84", {"evaluated": True}, {"max_chars": 3}),
    ("58 + 26", "26 + 58", {"evaluated": True}, {"max_chars": 3}),
    ("7", "7 + 0 + 0 + 0 + 0", {}, {"max_chars": 10}),
]


@pytest.mark.parametrize(("gold", "answer", "paid", "unpaid"), POLICIES)
def test_each_policy_call_is_an_option(gold, answer, paid, unpaid):
    assert grade(f"\\boxed{{{answer}}}", gold, options=MathOptions(**paid)).score == 1.0
    assert grade(f"\\boxed{{{answer}}}", gold, options=MathOptions(**unpaid)).score == 0.0


def test_where_an_answer_may_stand_is_an_option():
    scores = {
        (mode, text): grade(text, "7", options=MathOptions(extraction=mode)).score
        for mode in ("any", "stated", "boxed")
        for text in ("\\boxed{7}", "The answer is 7.", "hence $x = 7$")
    }
    paid = {key for key, score in scores.items() if score == 1.0}
    assert paid == {
        ("any", "\\boxed{7}"),
        ("any", "The answer is 7."),
        ("any", "hence $x = 7$"),
        ("stated", "\\boxed{7}"),
        ("stated", "The answer is 7."),
        ("boxed", "\\boxed{7}"),
    }


def test_an_unknown_policy_is_refused_with_its_remedy():
    with pytest.raises(ValueError, match=r"percent='half' .* use one of \('either', 'hundredths', 'sign'\)"):
        MathOptions(percent="half")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="math_options has no 'unit'; did you mean 'units'"):
        math_reward([""], ["\\boxed{1}"], ["1"], math_options={"unit": "strict"})


def test_math_reward_takes_what_trl_passes():
    chats = [
        [{"role": "assistant", "content": "\\boxed{4}"}],
        [{"role": "assistant", "content": "\\boxed{5}"}],
    ]
    rewards = math_reward(["p", "p"], chats, ["4", "4"], options=["a column of the dataset"], task=[1, 2])
    assert [reward.score for reward in rewards] == [1.0, 0.0]


def test_an_answer_may_be_a_number_a_list_of_alternatives_or_a_gsm8k_solution():
    answers = [142.0, ["3.53 \\times 10^2", "3.52 \\times 10^2"], "9 * 2 = <<9*2=18>>18.\n#### 18", None, []]
    rewards = math_reward(
        [""] * 5, ["\\boxed{142}", "\\boxed{352}", "\\boxed{18}", "\\boxed{1}", "\\boxed{1}"], answers
    )
    assert [reward.score for reward in rewards] == [1.0, 1.0, 1.0, None, None]


HOSTILE = {
    "a tower": "\\boxed{10^{10^{10^{10}}}}",
    "a factorial": "\\boxed{((9!)!)!}",
    "a binomial": "\\boxed{\\binom{10^9}{5 \\cdot 10^8}}",
    "a sum": "\\boxed{\\sum_{k=1}^{10^{12}} k}",
    "sums in sums": "\\boxed{\\sum_{i=1}^{999}\\sum_{j=1}^{999}\\sum_{k=1}^{999} ijk}",
    "a product": "\\boxed{\\prod_{k=1}^{1999} k!}",
    "a power of a sum": "\\boxed{(((x+1)^{100})^{100})^{100}}",
    "a long polynomial": "\\boxed{" + "+".join(f"x^{{{i}}}" for i in range(400)) + "}",
    "a long sum": "\\boxed{" + "1+" * 20_000 + "1}",
    "many digits": "\\boxed{" + "9" * 200_000 + "}",
    "a long decimal": "\\boxed{0.\\overline{" + "1" * 5_000 + "}}",
    "deep brackets": "\\boxed{" + "(" * 10_000 + "7" + ")" * 10_000 + "}",
    "deep fractions": "\\boxed{" + "\\frac{1}{" * 5_000 + "1" + "}" * 5_000 + "}",
    "deep roots": "\\boxed{" + "\\sqrt{2+" * 25 + "2" + "}" * 25 + "}",
    "nested logarithms": "\\boxed{\\log(\\log(\\log(2^{2^{2^{2^{2^2}}}})))}",
    "special functions": "\\boxed{" + "\\Gamma(1/3)" * 100 + "}",
    "a large matrix": "\\boxed{\\begin{pmatrix}" + "\\\\".join(["1&" * 80 + "1"] * 80) + "\\end{pmatrix}}",
    "many signs": "\\boxed{" + "\\pm 1" * 500 + "}",
    "many items": "\\boxed{" + ",".join(f"\\sqrt{{{i}}}" for i in range(300)) + "}",
    "open boxes": "\\boxed{" * 100_000,
    "open braces": "\\boxed{8}" + "{" * 100_000 + "\\boxed{" + "{" * 100_000,
    "many boxes": "\\boxed{8} x " * 50_000,
    "open thoughts": "<think>" * 100_000 + "\\boxed{7}",
    "closed thoughts": "</think>" * 100_000,
    "open comments": "<!--" * 100_000,
    "comment signs": "\\boxed{8}" + "%x" * 100_000,
    "phantoms": "\\phantom{" * 50_000,
    "dollars": "$" * 200_000,
    "open formulas": "\\[ x " * 50_000,
    "blanks": "final answer" + " " * 500_000 + "8",
    "numbers": "8 " * 200_000,
    "statements": "answer is " * 50_000,
    "an unreadable sign": "\\boxed{\ud800}",
}


def grade_all_hostile() -> list[str]:
    """Names of completions that were paid, or took a second of this thread's work, or ten by the clock."""
    found = []
    for name, completion in HOSTILE.items():
        is_slow = clock()
        if grade(completion, "7").score != 0.0 or is_slow():
            found.append(name)
    if SHARED.exists():
        for row in map(json.loads, SHARED.read_text().splitlines()):
            is_slow = clock()
            if row["category"] == "hang/malicious" and grade(row["prediction"], row["gold"]).score == 1.0:
                found.append(row["id"])
            if is_slow():
                found.append(row["id"])
    return found


def clock() -> Callable[[], bool]:
    """Whether more has passed since then than a second of this thread's work, or ten seconds by the clock."""
    work, wall = time.thread_time(), time.perf_counter()
    return lambda: time.thread_time() - work > 1 or time.perf_counter() - wall > 10


def test_hostile_completions_are_unpaid_within_a_second_in_the_main_thread():
    assert grade_all_hostile() == []


def test_hostile_completions_are_unpaid_within_a_second_in_a_thread():
    found: list[list[str]] = []
    thread = threading.Thread(target=lambda: found.append(grade_all_hostile()))
    thread.start()
    thread.join(120)
    assert found == [[]]


def test_hostile_completions_are_unpaid_within_a_second_under_asyncio():
    async def inside_the_loop() -> list[str]:
        return grade_all_hostile()

    assert asyncio.run(inside_the_loop()) == []


@pytest.mark.parametrize("answer", ["P(1:2)", "\\sin(\\{1\\})", "\\zeta(\\{2\\})", "\\log_{(1,2)}(\\{3\\})"])
def test_an_argument_of_another_shape_is_zero_and_no_fault_of_the_gold(answer):
    assert grade(f"\\boxed{{{answer}}}", "5").score == 0.0


VOCABULARY = r"""
\sin \zeta \gcd \max \log_ \det \binom P C f \sqrt \frac \sum_{k=1}^{n} \angle \vec \mathbf {1} (1:2) \{1\}
[1,2] (1,2) 10^{10^9} {a,b} |x| (1|2) \pm2 3\text{cm} \mathbb{R} ... 5_2 x=1 \emptyset 7k+1
^ _ ! ' % : , ; = < + - \pm ^{-1} ^T ^\circ \pmod7 \text{or} \cup \\ \quad a.m. million
"""
READABLE_GOLDS = (
    r"5;x+1;(1,2);\{1,2\};5\text{ cm};3:05 PM;x\equiv3\pmod7;\pm\sqrt2;B;2A_{16};\sum_{k=1}^n k;i+j"
)


def test_random_formulas_neither_raise_nor_abstain_for_a_good_gold():
    rng = random.Random(1)
    words, golds = VOCABULARY.split(), READABLE_GOLDS.split(";")
    never = MathOptions(symbolic_timeout_s=0.0)
    for _ in range(3_000):
        text = " ".join(rng.choices(words, k=rng.randint(1, 7)))
        reward = grade(f"\\boxed{{{text}}}", rng.choice(golds), options=never)
        assert reward.score in (0.0, 1.0), text
        assert not reward.detail.startswith("unreadable"), (text, reward.detail)


@pytest.mark.parametrize(
    "answer", ["\\Gamma(\\arg 7)", "\\mp\\ldots^+", "8 != x = 2", "\\max(i, 1)", "\\sin", "f()"]
)
def test_a_value_that_no_function_has_is_no_answer(answer):
    assert grade(f"\\boxed{{{answer}}}", "7").score == 0.0


def test_no_text_makes_the_grader_raise():
    rng = random.Random(0)
    tokens = [f"\\{name}" for name in sorted({*COMMANDS, *DROPPED, *TEXT_STYLES})] + sorted(WORDS)
    tokens += (
        list("0123456789xyze+-*/^_=<>!'|,;:.()[]{}&%$~\" °π元甲") * 8
        + ["\\begin{pmatrix}", "\\end{pmatrix}"] * 5
    )
    golds = [
        "7",
        "x^2 + 1",
        "(1, 2)",
        "\\{1, 2\\}",
        "x > 2",
        "5\\text{ cm}",
        "1:2",
        "f(x) = x",
        "A",
        "[0, 1)",
    ]
    never = MathOptions(symbolic_timeout_s=0.0)
    for _ in range(4_000):
        text = "".join(rng.choices(tokens, k=rng.choice((1, 2, 4, 8, 16))))
        gold = rng.choice(golds)
        at = rng.randrange(len(gold) + 1)
        for answer in (text, gold[:at] + text + gold[at:]):
            assert grade(f"\\boxed{{{answer}}}", gold, options=never).reason is not Reason.INFRA_ERROR
            grade(f"The answer is {answer}.", answer, options=never)


def test_threads_and_the_main_thread_agree():
    rows = [
        json.loads(line) for line in (Path(__file__).parent / "math_cases.jsonl").read_text().splitlines()
    ]
    rows = [row for row in rows if row["category"] in ("symbolic", "algebra")]

    def verdicts() -> list[float | None]:
        fresh = MathOptions(max_chars=3_000 + threading.get_ident() % 1_000)  # its own part of the cache
        return [grade(f"\\boxed{{{row['answer']}}}", row["gold"], options=fresh).score for row in rows]

    expected = verdicts()
    found: list[list[float | None]] = []
    threads = [threading.Thread(target=lambda: found.append(verdicts())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == [expected] * 4


def test_grading_numbers_and_formulas_imports_neither_sympy_nor_torch():
    code = (
        "import sys; from rewards.math import grade; from rewards.math.symbolic import worker\n"
        "assert grade(r'\\boxed{\\sqrt{12}}', r'2\\sqrt3').score == 1.0\n"
        "assert grade(r'\\boxed{(x-1)(x+1)}', 'x^2-1').score == 1.0\n"
        "print('sympy' in sys.modules, 'torch' in sys.modules, worker.is_running)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT) == "False False False\n"


def test_a_gold_that_is_an_object_abstains_as_an_empty_one_does():
    golds = [None, {"value": 1}, [{"value": 1}], [{"value": 1}, "2"], [1, "2"], 1.0]
    rewards = math_reward([""] * 6, ["\\boxed{1}"] * 6, golds)
    assert [reward.score for reward in rewards] == [None, None, None, 0.0, 1.0, 1.0]
    assert rewards[1].reason is Reason.BAD_GOLD
