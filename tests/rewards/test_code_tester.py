"""What the tests of a dataset see and leave behind: whose names they use, and whose word counts."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from settings import ROOT

from rewards.code.grader import CodeOptions, code_sandbox, grade
from rewards.sandbox.sandbox import Sandbox
from rl.types import Reason

PATIENT = CodeOptions(timeout_s=30.0)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with code_sandbox(num_workers=1) as made:
        yield made


def score(sandbox: Sandbox, code: str, entry_point: str, tests: str) -> float | None:
    asserts = {"type": "asserts", "entry_point": entry_point, "code": tests}
    return grade(code, asserts, options=PATIENT, sandbox=sandbox).score


LYING = "class M:\n    def __getattr__(self, n): return lambda *a, **k: True\ndef area(r): return 0\n"
HONEST = "import math\nfrom math import isclose\ndef area(r): return math.pi * r * r\n"


@pytest.mark.parametrize("entry_point", ["area", ""])
@pytest.mark.parametrize(
    ("name", "test"),
    [
        ("math", "assert math.isclose(area(2), 12.566, rel_tol=1e-3)"),
        ("isclose", "assert isclose(area(2), 12.566, rel_tol=1e-3)"),
    ],
)
def test_a_library_name_that_tests_do_not_import_is_the_librarys(sandbox, entry_point, name, test):
    alias = f"{name} = M()\n" if name == "math" else f"def {name}(*a, **k): return True\n"
    assert score(sandbox, LYING + alias, entry_point, test) == 0.0
    assert score(sandbox, HONEST, entry_point, test) == 1.0


@pytest.mark.parametrize("name", ["check_equal", "assertAlmostEqual", "almost_equal", "np_allclose"])
def test_a_function_of_the_solution_that_is_called_like_a_judge_is_none(sandbox, name):
    tests = {"type": "asserts", "entry_point": "area", "code": f"assert {name}(area(2), 12.566)"}
    reward = grade(LYING + f"def {name}(a, b): return True\n", tests, options=PATIENT, sandbox=sandbox)
    assert (reward.score, reward.reason) == (None, Reason.BAD_GOLD)
    assert f"'{name}'" in reward.detail


def test_without_an_entry_point_every_other_name_is_the_solutions(sandbox):
    code = "def flip(s): return s[::-1]\ndef calendar(s): return s[::-1]\n"
    assert score(sandbox, code, "", "assert calendar(flip('ab')) == 'ab' and flip('ab') == 'ba'") == 1.0


EXPECTED_ERROR = "try:\n    f(-1)\n    assert False\nexcept Bad:\n    pass\nassert f(1) == 1"


@pytest.mark.parametrize(
    ("definition", "expected"),
    [
        ("class Bad(ValueError): pass\nclass Raised(Bad): pass", 1.0),
        ("class Bad(Exception): pass\nclass Raised(Bad): pass", 1.0),
        ("class Bad(Exception): pass\nclass Raised(Exception): pass", 0.0),
        ("Raised = Bad = Exception", 0.0),  # it would catch `assert False`, too
        ("Bad = AssertionError\nclass Raised(ValueError): pass", 0.0),
    ],
)
def test_tests_may_expect_an_exception_that_the_solution_defines(sandbox, definition, expected):
    code = f"{definition}\ndef f(x):\n    if x < 0: raise Raised('no')\n    return x\n"
    assert score(sandbox, code, "f", EXPECTED_ERROR) == expected


def test_an_alias_of_exception_does_not_stand_for_the_error_of_the_tests(sandbox):
    for bad in ("Bad = Exception", "Bad = AssertionError", "class Bad(AssertionError): pass"):
        assert score(sandbox, f"{bad}\ndef f(x): return 1\n", "f", EXPECTED_ERROR) == 0.0


OBJECTS = {
    "isinstance": ("class P: pass\ndef make(): return P()", "make", "assert isinstance(make(), P)"),
    "isinstance of the entry point": ("class P: pass", "P", "assert isinstance(P(), P)"),
    "an attribute of a class": ("class P:\n    size = 4", "P", "assert P.size == 4"),
    "a static method": (
        "class P:\n    @staticmethod\n    def f(x): return x + 1",
        "P",
        "assert P.f(1) == 2",
    ),
    "a context manager": (
        "class P:\n    def __enter__(self): return self\n    def __exit__(self, *a): self.left = True\n",
        "P",
        "with P() as p:\n    pass\nassert p.left is True",
    ),
    "a sum of two objects": (
        "class V:\n    def __init__(self, x): self.x = x\n    def __add__(self, o): return V(self.x + o.x)",
        "V",
        "assert (V(1) + V(2)).x == 3",
    ),
    "a date": (
        "import datetime\ndef day(y): return datetime.date(y, 1, 2)",
        "day",
        "import datetime\nassert day(2020) == datetime.date(2020, 1, 2)",
    ),
    "times": (
        "from datetime import *\ndef later(t): return t + timedelta(days=1), timedelta(1, 2, 3)",
        "later",
        "from datetime import *\nt = datetime(2020, 2, 28, 1, 2, 3, 4)\n"
        "assert later(t) == (datetime(2020, 2, 29, 1, 2, 3, 4), timedelta(1, 2, 3))",
    ),
    "an async function": (
        "async def f(x): return x + 1",
        "f",
        "import asyncio\nassert asyncio.run(f(1)) == 2",
    ),
}


@pytest.mark.parametrize("what", OBJECTS)
def test_objects_of_the_solution_can_be_used(sandbox, what):
    code, entry_point, tests = OBJECTS[what]
    assert score(sandbox, code, entry_point, tests) == 1.0


@pytest.mark.parametrize(
    "code",
    [
        "class V:\n    def __sub__(s, o): return 0\n    __abs__ = __sub__\ndef f(x): return V()",
        "class V:\n    def __rsub__(s, o): return 0\ndef f(x): return V()",
        "class V:\n    def __add__(s, o): return 5\n    __radd__ = __add__\ndef f(x): return V()",
    ],
)
def test_an_object_of_the_solution_never_meets_an_operand_of_the_tests(sandbox, code):
    tests = "x = f(1)\nassert abs(x - 5) < 1e-6 or abs(5 - x) < 1e-6 or x + 0 == 5"
    assert score(sandbox, code, "f", tests) == 0.0


TRACES = {
    "an attribute of a module": (
        "import math\nmath.floor = lambda x: 0",
        "import math",
        "math.floor(2.5) == 2",
    ),
    "setattr": ("import math\nsetattr(math, 'floor', int)", "import math", "math.floor(-2.5) == -3"),
    "a method of a class": (
        "import collections\ncollections.Counter.__eq__ = lambda s, o: True",
        "import collections",
        "collections.Counter('a') != collections.Counter()",
    ),
    "decimal's precision": (
        "import decimal\ndecimal.getcontext().prec = 3",
        "import decimal",
        "len(str(decimal.Decimal(1) / 3)) > 20",
    ),
    "the recursion limit": (
        "import sys\nsys.setrecursionlimit(99)",
        "import sys",
        "sys.getrecursionlimit() > 99",
    ),
    "the environment": ("import os\nos.environ['A'] = '1'", "import os", "'A' not in os.environ"),
    "a module": ("import sys\nsys.modules['json'] = None", "import json", "json.dumps(1) == '1'"),
    "stdout": (
        "import io, sys\nsys.stdout = io.StringIO()",
        "import io, sys",
        "type(sys.stdout) != io.StringIO",
    ),
    "warnings": (
        "import warnings\nwarnings.simplefilter('error')",
        "import warnings",
        "warnings.warn('x') is None",
    ),
}


@pytest.mark.parametrize("what", TRACES)
def test_tests_that_change_the_library_do_not_change_the_next_grade(sandbox, what):
    change, use, holds = TRACES[what]
    code = "def f(x): return x\n"
    for _ in range(2):
        assert score(sandbox, code, "f", f"{change}\nassert f(1) == 1") == 1.0
        assert score(sandbox, code, "f", f"{use}\nassert f(1) == 1\nassert {holds}") == 1.0


LAST_WORD = """
import json, os, sys
def add(a, b):
    body = json.dumps({answer}).encode()
    frame = len(body).to_bytes(4, "little") + body
    while frame:
        frame = frame[os.write(4, frame) :]
"""


@pytest.mark.parametrize("scoring", ["all", "fraction"])
@pytest.mark.parametrize("answer", ["['fatal', ['x'], 'y' * 9_000_000]", "['raise', ['x'], 'y' * 9_000_000]"])
def test_an_error_larger_than_the_output_does_not_cut_the_verdict(sandbox, scoring, answer):
    asserts = {
        "type": "asserts",
        "entry_point": "add",
        "code": "assert add(2, 3) == 5\nassert add(0, 1) == 1",
    }
    options = CodeOptions(scoring=scoring, timeout_s=30.0)
    reward = grade(LAST_WORD.replace("{answer}", answer), asserts, options=options, sandbox=sandbox)
    assert (reward.score, reward.reason is Reason.BAD_GOLD) == (0.0, False), reward


@pytest.mark.parametrize(
    "text", ["```\n" * 50_001, "import " * 12_000, f"{'~' * 12_000}{' ' * 12_000}{'w' * 12_000}`"]
)
def test_a_long_line_costs_its_length_and_not_the_square(sandbox, text):
    asserts = {"type": "asserts", "entry_point": "add", "code": "assert add(2, 3) == 5"}
    asserts["prompt"] = "def add(a, b):\n"
    started = time.thread_time()
    assert grade(text, asserts, options=PATIENT, sandbox=sandbox).score == 0.0
    assert time.thread_time() - started < 3


def test_a_judge_that_has_used_half_of_its_cpu_time_is_replaced_before_it_runs_out():
    code = (
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (4, 4))\n"
        "from rewards.code import CodeOptions, code_sandbox, grade\n"
        "own = {'options': CodeOptions(timeout_s=60.0)}\n"
        "burn = 'import time\\nend = time.process_time() + 0.7\\nwhile time.process_time() < end: pass\\n'\n"
        "tests = {'type': 'asserts', 'entry_point': 'f', 'code': burn + 'assert f(1) == 1'}\n"
        "with code_sandbox(num_workers=1) as sandbox:\n"
        "    print([grade('def f(x): return x', tests, sandbox=sandbox, **own).score for _ in range(8)])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.stdout == f"{[1.0] * 8}\n", done.stderr


FUNCTIONS = "def test_a():\n    assert f(1) == 1\ndef test_b():\n    x = f(2)\n    assert x == 2\n"
WITHOUT_ASSERTS = "def test_c():\n    if f(3) != 3: raise ValueError\n"


@pytest.mark.parametrize(
    ("tests", "weights", "expected"),
    [
        ("assert f(1) == 1\nx = f(2)\nassert x == 2", [1, 3], 0.25),
        (FUNCTIONS, [1, 3], 0.25),
        (FUNCTIONS + WITHOUT_ASSERTS, [1, 3, 4], 0.625),  # the crash of test_b shifts no weight
        ("y = f(2)\n" + FUNCTIONS + WITHOUT_ASSERTS, [1, 3, 4], 0.0),
    ],
)
def test_a_solution_that_crashes_between_weighted_asserts_does_not_abstain(sandbox, tests, weights, expected):
    asserts = {"type": "asserts", "entry_point": "f", "code": tests, "weights": weights}
    options = CodeOptions(scoring="fraction", timeout_s=30.0)
    crashing = "def f(x):\n    if x == 2: raise KeyError\n    return x"
    assert grade(crashing, asserts, options=options, sandbox=sandbox).score == expected
    assert grade("def f(x): return x", asserts, options=options, sandbox=sandbox).score == 1.0
    for code in ("def f(x): return x", "def f(x): return 0"):
        wrong = grade(code, {**asserts, "weights": [1]}, options=options, sandbox=sandbox)
        assert (wrong.score, wrong.reason) == (None, Reason.BAD_GOLD)


def test_a_solution_that_skips_a_weighted_assert_under_an_if_does_not_abstain(sandbox):
    tests = "if f(1) == 1:\n    assert f(2) == 2\nassert f(3) == 3\nassert f(4) == 4"
    asserts = {"type": "asserts", "entry_point": "f", "code": tests, "weights": [4, 1, 3]}
    options = CodeOptions(scoring="fraction", timeout_s=30.0)
    for code, expected in (
        ("def f(x): return x", 1.0),
        ("def f(x): return 3", 0.25),  # without the first assert: 1 / (1 + 3)
        ("def f(x): return max(x, 3)", 1.0),
        ("def f(x): return x if x != 2 else 0", 0.5),
    ):
        assert grade(code, asserts, options=options, sandbox=sandbox).score == expected, code
