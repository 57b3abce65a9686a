"""The solution's own objects in the tests: honest ones answer, liars gain nothing, and none abstains."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewards.code.grader import CodeOptions, code_sandbox, grade
from rewards.sandbox.sandbox import Sandbox
from rl.types import Reason, Reward

ROWS = [
    json.loads(row) for row in Path(__file__).with_name("code_object_cases.jsonl").read_text().splitlines()
]
HONEST, HOSTILE, ODD = (
    {row["name"]: row for row in ROWS if row["kind"] == kind} for kind in ("honest", "hostile", "odd")
)
ASKED = [row["tests"] for row in ROWS if row["kind"] == "asked"]  # of what `f` of the liar returns
LIAR = next(row["code"] for row in ROWS if row["kind"] == "liar")  # each of its answers suits its author
BUILT_IN = ("int", "list", "str", "float", "tuple", "dict", "set", "bytes", "Exception")
EQUAL_INSIDE = ("f(3)==f(4)", "f(3)<=f(4)", "f(4) in [f(3)]")  # holds of the plain values underneath, too


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with code_sandbox(num_workers=2) as made:
        yield made


def run(sandbox: Sandbox, code: str, entry_point: str, tests: str, timeout_s: float = 30.0) -> Reward:
    asserts = {"type": "asserts", "entry_point": entry_point, "code": tests}
    return grade(code, asserts, options=CodeOptions(timeout_s=timeout_s), sandbox=sandbox)


@pytest.mark.parametrize("what", HONEST)
def test_tests_may_use_the_solutions_objects(sandbox: Sandbox, what: str) -> None:
    row = HONEST[what]
    reward = run(sandbox, row["code"], row["entry_point"], row["tests"])
    assert reward.score == 1.0, reward


@pytest.mark.parametrize("question", ASKED)
def test_an_object_that_lies_scores_nothing(sandbox: Sandbox, question: str) -> None:
    codes = [f"{LIAR}def f(x): return L()"]
    for kind in BUILT_IN if not question.endswith(EQUAL_INSIDE) else ():
        own_class = f"class L({kind}):\n    pub = 1\n    def __new__(c, *a): return {kind}.__new__(c)"
        liar = LIAR.replace("class L:", own_class).replace(
            "def __init__(s,*a): s.x=1", "__init__ = object.__init__"
        )
        codes.append(f"{liar}def f(x): return L()")
    rewards = sandbox.map(lambda code: run(sandbox, code, "f", question, 5.0), codes)
    assert [reward.score for reward in rewards] == [0.0] * len(codes), rewards


@pytest.mark.parametrize(
    "tests",
    [
        "assert dec(enc('ab')) == 'ab'",
        "for s in ('ab', 'c'):\n    v = enc(s)\n    assert dec([v, {'a': (v,)}]) == s == dec(key=v)",
        "v = enc('ab')\nassert dec(lambda: v) == 'ab'\nassert dec(iter(v))",
        "v = enc('ab')\nassert dec(v)[::-1] == 'ba'",
        "v = enc('ab')\nassert dec(type(v)) == str",
        "class Box: pass\nbox = Box()\nbox.v = enc('ab')\nassert dec(box) == 'ab'",
    ],
)
def test_an_odd_value_handed_back_is_the_solutions_fault(sandbox: Sandbox, tests: str) -> None:
    helpers = (
        "async def co(): return 1\ndef cyc():\n    l = []; l.append(l); return l\n"
        "def deep():\n    x = []\n    for _ in range(99): x = [x]\n    return x\n"
    )
    codes = [f"{helpers}def enc(x): return {row['code']}\ndef dec(x): return 0\n" for row in ODD.values()]
    rewards = sandbox.map(lambda code: run(sandbox, code, "dec", tests, 5.0), codes)
    assert dict(zip(ODD, (reward.score for reward in rewards), strict=True)) == dict.fromkeys(ODD, 0.0)


@pytest.mark.parametrize("trick", HOSTILE)
def test_a_hostile_object_scores_nothing(sandbox: Sandbox, trick: str) -> None:
    row, timeout_s = HOSTILE[trick], 1.0 if "endless" in trick else 10.0
    assert run(sandbox, row["code"], row["entry_point"], row["tests"], timeout_s).score == 0.0


CANNOT_BE_ASKED = {
    "a replaced function of a module": (
        "import os\ndef f(): return os.path.exists('/x')",
        "from unittest.mock import patch\nwith patch('os.path.exists', return_value=True):\n    assert f()",
        "'patch(' in the tests does not reach",
    ),
    "a fixture of pytest": (
        "def f(): print('x')",
        "def test_f(capsys):\n    f()\n    assert capsys.readouterr().out == 'x\\n'",
        "test_f needs the fixtures of pytest capsys",
    ),
    "a module that is not there": (
        "def f(): return 1",
        "assert f() == 1\nimport pytest",
        "ModuleNotFoundError: No module named 'pytest': the tests need what the sandbox does not offer",
    ),
    "a file": (
        "def f(p): return open(p).read()",
        "open('/tmp/zzz', 'w').write('x')\nassert f('/tmp/zzz') == 'x'",
        "the tests need what the sandbox does not offer",
    ),
    "an argument without a plain form": (
        "def f(x): return x.sub('', 'ab')",
        "import re\nassert f(re.compile('a')) == 'b'",
        "an argument of the tests cannot cross: a Pattern has no plain form",
    ),
}


@pytest.mark.parametrize("what", CANNOT_BE_ASKED)
def test_tests_that_cannot_be_asked_abstain_and_say_why(sandbox: Sandbox, what: str) -> None:
    code, tests, why = CANNOT_BE_ASKED[what]
    reward = run(sandbox, code, "f", tests)
    assert (reward.score, reward.reason) == (None, Reason.BAD_GOLD), reward
    assert why in reward.detail


@pytest.mark.parametrize(
    ("code", "tests"),
    [
        ("def f(): raise ImportError('x')", "assert f() == 1"),
        ("def f(): raise PermissionError('x')", "try:\n    f()\nexcept Exception as e:\n    raise e"),
        ("def f(): return ImportError('x')", "raise f()"),
        ("def f(x=0): return lambda y: 1", "import re\nassert f(1)(re.compile('a')) == 2"),
        ("def f(): return 2", "def test_f(candidate):\n    assert candidate() == 1"),
    ],
)
def test_a_solution_cannot_pass_for_tests_that_cannot_be_asked(
    sandbox: Sandbox, code: str, tests: str
) -> None:
    assert run(sandbox, code, "f", tests).score == 0.0


def test_a_crash_does_not_make_the_weights_of_asserts_unusable(sandbox: Sandbox) -> None:
    tests = {
        "type": "asserts",
        "entry_point": "f",
        "weights": [1, 3],
        "code": "x = f(1)\nassert x == 1\nassert f(2) == 2",
    }
    options = CodeOptions(timeout_s=30.0, scoring="fraction")
    for code, score in (
        ("def f(x): raise ValueError", 0.0),
        ("def f(x): return 1", 0.25),
        ("def f(x): return x", 1.0),
    ):
        assert grade(code, tests, options=options, sandbox=sandbox).score == score


@pytest.mark.parametrize("skipped", ["SkipTest('x')", "case._ShouldStop()"])
def test_a_skipped_test_is_not_a_share_of_the_tests_passed(sandbox: Sandbox, skipped: str) -> None:
    row = HOSTILE[f"unittest.{skipped} for a runner"]
    tests = {"type": "asserts", "entry_point": "add", "code": row["tests"]}
    options = CodeOptions(timeout_s=30.0, scoring="fraction")
    assert grade(row["code"], tests, options=options, sandbox=sandbox).score == 0.0
    assert grade("def add(a, b): return a + b", tests, options=options, sandbox=sandbox).score == 1.0
