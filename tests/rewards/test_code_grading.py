"""What counts as solved: every style of tests, partial credit, extraction, and who is to blame."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from rewards.code.compare import same_output, same_value
from rewards.code.extract import extract_code
from rewards.code.grader import CodeOptions, close_sandboxes, code_reward, code_sandbox, grade
from rewards.code.tests import parse_tests
from rewards.sandbox.sandbox import Sandbox
from rl.types import Reason, Reward

PATIENT = CodeOptions(timeout_s=30.0)
FRACTION = CodeOptions(timeout_s=30.0, scoring="fraction")
ADD_TESTS = {"type": "asserts", "entry_point": "add", "code": "assert add(2, 3) == 5\nassert add(-1, 1) == 0"}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with code_sandbox(num_workers=1) as made:
        yield made


def run(sandbox: Sandbox, code: str, tests: object, options: CodeOptions = PATIENT) -> Reward:
    return grade(code, tests, options=options, sandbox=sandbox)  # pyright: ignore[reportArgumentType]


def asserts(entry_point: str, code: str, **more: object) -> dict[str, object]:
    return {"type": "asserts", "entry_point": entry_point, "code": code, **more}


STYLES = {
    "a script of asserts": ("def add(a, b): return a + b", ADD_TESTS),
    "a list of asserts": (
        "def add(a, b): return a + b",
        {"type": "asserts", "entry_point": "add", "code": ["assert add(1, 1) == 2", "assert add(0, 0) == 0"]},
    ),
    "check(candidate), uncalled": (
        "def add(a, b): return a + b",
        asserts("add", "def check(candidate):\n    assert candidate(2, 3) == 5"),
    ),
    "check with helpers of the prompt": (
        "def undo(s):\n    return s[::-1]",
        asserts(
            "undo",
            "def check(f):\n    for s in ('ab', 'abc'):\n        assert f(do(s)) == s",
            prompt="def do(s):\n    return s[::-1]\n\ndef undo(s):\n    '''Undoes do.'''\n",
        ),
    ),
    "a body that continues the prompt": (
        "    return a + b\n",
        {**ADD_TESTS, "prompt": "def add(a, b):\n    '''Adds.'''\n"},
    ),
    "the prompt's stub repeated in the tests": (
        "def add(a, b): return a + b",
        asserts("add", "def add(a, b):\n    '''Adds.'''\nassert add(1, 2) == 3"),
    ),
    "test functions": (
        "def add(a, b): return a + b",
        asserts("add", "from solution import add\ndef test_one():\n    assert add(1, 2) == 3"),
    ),
    "unittest": (
        "def add(a, b): return a + b",
        asserts(
            "add",
            "import unittest\nclass Tests(unittest.TestCase):\n"
            "    def test_sum(self): self.assertEqual(add(1, 2), 3)",
        ),
    ),
    "Solution().method of LeetCode": (
        "class Solution:\n    def double(self, xs: List[int]) -> List[int]:\n        return xs + xs",
        asserts(
            "Solution().double", "def check(candidate):\n    assert candidate(xs=[1, 2]) == [1, 2, 1, 2]"
        ),
    ),
    "cases of arguments": (
        "class Solution:\n    def pair(self, a, b):\n        return (a, b)",
        {
            "type": "calls",
            "entry_point": "Solution().pair",
            "cases": [
                {"args": [1, 2], "output": [1, 2]},
                {"args": [1], "kwargs": {"b": "x"}, "output": [1, "x"]},
            ],
        },
    ),
    "a class with state": (
        "class Stack:\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x)\n"
        "    def pop(self): return self.items.pop()\n    def __len__(self): return len(self.items)",
        asserts(
            "Stack",
            "s = Stack(); t = Stack()\ns.push((1, 'a')); s.push(2)\nassert len(s) == 2 and len(t) == 0\n"
            "assert s.pop() == 2\nassert s.items == [(1, 'a')]",
        ),
    ),
    "a linked list that the prompt defines": (
        "def reverse(head):\n    last = None\n    while head:\n"
        "        head.next, last, head = last, head, head.next\n    return last",
        asserts(
            "reverse",
            "head = None\nfor v in range(3000): head = ListNode(v, head)\nnode, values = reverse(head), []\n"
            "while node:\n    values.append(node.val); node = node.next\nassert values == list(range(3000))",
            prompt="class ListNode:\n    def __init__(self, val=0, next=None):\n"
            "        self.val = val\n        self.next = next\n",
        ),
    ),
    "an argument changed in place": (
        "def sort_rows(rows):\n    for row in rows: row.sort()\n    rows.reverse()",
        asserts(
            "sort_rows", "x = [[2, 1], [4, 3]]\nassert sort_rows(x) is None\nassert x == [[3, 4], [1, 2]]"
        ),
    ),
    "a function as an argument": (
        "def apply(f, xs): return [f(x) for x in xs]",
        asserts(
            "apply", "assert apply(lambda x: x * 10, [1, 2]) == [10, 20]\nassert apply(str, (1,)) == ['1']"
        ),
    ),
    "an expected exception": (
        "class Negative(ValueError): pass\n"
        "def root(x):\n    if x < 0: raise Negative('no')\n    return x ** 0.5",
        asserts(
            "root",
            "try:\n    root(-1)\n    assert False\n"
            "except ValueError as e:\n    assert str(e) == 'no'\nassert root(4) == 2",
        ),
    ),
    "a generator that the tests walk": (
        "def count(n):\n    yield from range(n)",
        asserts("count", "assert list(count(3)) == [0, 1, 2]\nassert next(count(1)) == 0"),
    ),
    "a class of the solution in the tests (MBPP)": (
        "class Pair:\n    def __init__(self, a, b): self.a = a; self.b = b\n"
        "def longest(pairs): return max(p.b - p.a for p in pairs)",
        asserts("longest", "assert longest([Pair(1, 4), Pair(2, 3)]) == 3"),
    ),
    "values of every kind": (
        "import collections, decimal, fractions\ndef same(x): return x",
        asserts(
            "same",
            "from fractions import Fraction\nfrom decimal import Decimal\n"
            "for x in [None, True, 10**30, -0.5, 'ü\\ud800', b'\\x00', (1, (2,)), {1: {2, 3}},"
            " frozenset({1}),"
            " 1 + 2j, range(3), Fraction(1, 3), Decimal('0.10'), [[]], float('inf')]:\n"
            "    y = same(x)\n    assert y == x and type(y) is type(x), x",
        ),
    ),
    "stdin and stdout": (
        "import sys\nfor line in sys.stdin:\n    print(sum(map(int, line.split())))",
        {"type": "stdio", "cases": [{"input": "1 2\n3 4\n", "output": "3\n7"}, {"input": "", "output": ""}]},
    ),
    "APPS columns": (
        "print(int(input()) * 2)",
        {"inputs": ["2\n", ["3"]], "outputs": ["4\n", ["6"]]},
    ),
    "APPS columns with a function": (
        "def double(x): return 2 * x",
        {"inputs": [[1], [2]], "outputs": [2, 4], "fn_name": "double"},
    ),
}


@pytest.mark.parametrize("style", STYLES)
def test_an_honest_solution_gets_one(sandbox: Sandbox, style: str) -> None:
    code, tests = STYLES[style]
    assert (run(sandbox, code, tests).score, run(sandbox, code, json.dumps(tests)).score) == (1.0, 1.0)


@pytest.mark.parametrize("style", STYLES)
def test_an_empty_function_gets_zero(sandbox: Sandbox, style: str) -> None:
    """The same tests, and a program that defines every name they use without doing the work."""
    tests = STYLES[style][1]
    names = ("add", "undo", "reverse", "sort_rows", "apply", "root", "count", "longest", "same", "double")
    code = "".join(f"def {name}(*a, **k): return 'wrong'\n" for name in names)
    code += "class Solution:\n    double = pair = lambda *a, **k: 'wrong'\nclass Pair(Solution): pass\n"
    code += "class Stack:\n    __init__ = __len__ = push = pop = lambda *a: None\nprint('wrong')\n"
    assert run(sandbox, code, tests).score == 0.0


def test_standard_library_and_idioms_of_contests_work(sandbox: Sandbox) -> None:
    programs = {
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**26)\ndef main():\n"
        "    def f(n): return n and 1 + f(n - 1)\n    print(f(20000))\n"
        "t = threading.Thread(target=main); t.start(); t.join()": "20000",
        "import sys\nsys.stdout = open(1, 'w')\nprint(5)": "5",
        "import atexit, io, sys\nout = io.StringIO()\n"
        "atexit.register(lambda: sys.__stdout__.write(out.getvalue()))\n"
        "sys.stdout = out\nprint(6)": "6",
        "print(*map(str.upper, open(0)), sep='', end='')": "XY",
        "import sys\nsys.stdin = open('/dev/stdin')\nprint(input())": "xy",
        "import os, io\nprint(io.BytesIO(os.read(0, os.fstat(0).st_size)).read().decode())": "xy",
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_STACK, (2**27, resource.RLIM_INFINITY))\nprint(1)": "1",
        "import unittest.mock, asyncio, uuid, difflib, hashlib, zoneinfo, csv, pprint, queue, tempfile\n"
        "print(hashlib.sha256(b'').hexdigest()[:6], asyncio.run(asyncio.sleep(0, 7)))": "e3b0c4 7",
        "import os\nif os.path.exists('input.txt'): raise SystemExit(1)\n"
        "try: open('input.txt')\nexcept FileNotFoundError: print('none')": "none",
        "import time, random, uuid\n"
        "assert time.time() > 1e9 and random.random() < 1 and uuid.uuid4()\nexit()": "",
    }
    for code, output in programs.items():
        reward = run(sandbox, code, {"type": "stdio", "cases": [{"input": "xy", "output": output}]})
        assert reward.score == 1.0, (code, reward)


def test_partial_credit_counts_asserts_cases_and_weights(sandbox: Sandbox) -> None:
    half = "def sign(x): return 1 if x > 0 else -1"  # wrong at 0
    code = "assert sign(3) == 1\nassert sign(-3) == -1\nassert sign(0) == 0\nassert sign(2) == 1"
    tests = asserts("sign", code)
    assert run(sandbox, half, tests).score == 0.0
    assert run(sandbox, half, tests, FRACTION).score == 0.75
    assert run(sandbox, half, {**tests, "weights": [1, 1, 6, 0]}, FRACTION).score == 0.25  # 2 of 8
    wrapped = "def check(f):\n    for x in (1, 0):\n        assert f(x) == (x > 0)\n    assert f(-1) == -1"
    assert run(sandbox, half, asserts("sign", wrapped), FRACTION).score == 0.5  # the loop's assert fails once
    calls = [{"args": [x], "output": (x > 0) - (x < 0)} for x in (5, 0, -5)]
    data = {"type": "calls", "entry_point": "sign", "cases": calls}
    assert run(sandbox, half, data, FRACTION).score == pytest.approx(2 / 3)
    cases = [{"input": "1", "output": "1"}, {"input": "2", "output": "4", "weight": 3.0}]
    assert run(sandbox, "print(input())", {"type": "stdio", "cases": cases}, FRACTION).score == 0.25
    assert run(sandbox, "print(int(input()) ** 2)", {"type": "stdio", "cases": cases}, FRACTION).score == 1.0


def test_a_crash_in_mid_script_fails_the_asserts_after_it(sandbox: Sandbox) -> None:
    code = "assert f(1) == 1\nx = f(0)\nassert f(2) == 2"
    reward = run(sandbox, "def f(x): return x // x * x", asserts("f", code), FRACTION)
    assert reward.score == pytest.approx(
        1 / 3
    )  # one of two asserts holds, and the crash counts as a third test
    assert run(sandbox, "import os\ndef f(x): os._exit(0)", asserts("f", code), FRACTION).score == 0.0


def test_a_fault_of_the_tests_abstains(sandbox: Sandbox) -> None:
    add = "def add(a, b): return a + b"
    unusable = [
        asserts("add", "assert add(2, 3 == 5"),
        asserts("add", "assert True"),
        asserts("add", "import nowhere\nassert add(1, 1) == 2"),
        asserts("add", "assert add(object(), 1)"),
        {"type": "asserts", "entry_point": "add"},
        {"type": "stdio", "cases": []},
        {"type": "stdio", "cases": [{"input": "1"}]},
        {"type": "other"},
        "not json",
        {"type": "stdio", "cases": [{"input": "1", "output": "1"}], "weights": [0]},
    ]
    for tests in unusable:
        reward = run(sandbox, add, tests)
        assert (reward.score, reward.reason) == (None, Reason.BAD_GOLD), (tests, reward)


def test_tests_that_hang_by_themselves_abstain_and_a_solution_that_hangs_gets_zero(sandbox: Sandbox) -> None:
    quick = CodeOptions(timeout_s=1.0)
    patient = CodeOptions(timeout_s=4.0)  # it answers, and only then are the tests to blame
    hanging = asserts("add", "import time\ntime.sleep(60)\nassert add(1, 1) == 2")
    assert run(sandbox, "def add(a, b): return a + b", hanging, patient).reason is Reason.BAD_GOLD
    for code in ("def add(a, b):\n    while True: pass", "import time\ntime.sleep(60)"):
        reward = run(sandbox, code, ADD_TESTS, quick)
        assert (reward.score, reward.reason) == (0.0, Reason.TIMEOUT)


@pytest.fixture
def starved() -> Iterator[Sandbox]:
    """A sandbox on one processor, which another program keeps busy."""
    before, busy = os.sched_getaffinity(0), [sys.executable, "-c", "while True: pass"]
    os.sched_setaffinity(0, {min(before)})
    with subprocess.Popen(busy, start_new_session=True) as other:
        try:
            with code_sandbox(num_workers=1) as made:
                yield made
        finally:
            other.kill()
            os.sched_setaffinity(0, before)


def test_a_program_is_not_to_blame_for_a_busy_processor(starved: Sandbox) -> None:
    """It needs 1.2 s of its own, twice as long by the clock, and has 1.9."""
    burn = "import time\nwhile time.process_time() < {}: pass"
    options = CodeOptions(timeout_s=1.9, total_timeout_s=3.2)
    stdio = {"type": "stdio", "cases": [{"input": "1", "output": "1"}] * 2}
    assert run(starved, burn.format(1.2) + "\nprint(input())", stdio, options).score == 1.0
    code = "def add(a, b):\n    " + burn.format(0.6).replace("\n", "\n    ") + "\n    return a + b"
    assert run(starved, code, ADD_TESTS, CodeOptions(timeout_s=1.0)).score == 1.0
    late = run(starved, burn.format(60), stdio, options)
    assert late.reason is Reason.TIMEOUT and "after 1.9" in late.detail


def test_the_reason_names_what_went_wrong(sandbox: Sandbox) -> None:
    expected = {
        "": Reason.NO_ANSWER,
        "x = 1": Reason.NO_ANSWER,
        "<think>def add(a, b): return a + b": Reason.TRUNCATED,
        "def add(a, b) return a": Reason.PARSE_ERROR,
        "def add(a, b): return a - b": Reason.WRONG_ANSWER,
        "def add(a, b): return a / 0": Reason.CRASH,
        "def add(a, b): return bytearray(1 << 40)": Reason.MEMORY,
        "def add(a, b): return [0] * 10**7": Reason.BAD_VALUE,
        "import ctypes\ndef add(a, b): return ctypes.string_at(0)": Reason.CRASH,
    }
    for code, reason in expected.items():
        reward = run(sandbox, code, ADD_TESTS)
        assert (reward.score, reward.reason) == (0.0, reason), (code, reward)
    stdio = {"type": "stdio", "cases": [{"input": "", "output": "5"}]}
    loud = "import sys\ntry:\n    while True: sys.stdout.write('5' * 65536)\nexcept OSError: pass"
    assert run(sandbox, loud, stdio).reason is Reason.OUTPUT_LIMIT
    assert run(sandbox, "raise MemoryError", stdio).reason is Reason.MEMORY
    assert run(sandbox, "print(5)\nraise SystemExit(3)", stdio).reason is Reason.CRASH


def test_what_the_prompt_defines_is_no_answer(sandbox: Sandbox) -> None:
    for prompt in ("from operator import *\n", "from operator import add\n", "def add(a, b):\n    'Adds.'\n"):
        assert run(sandbox, "x = 1", {**ADD_TESTS, "prompt": prompt}).score == 0.0


DOCUMENTED = "def f():\n    '''\n    ```\n    f()\n    ```\n    '''"
TAGGED = DOCUMENTED.replace("```\n    f", "```python\n    f")


def test_the_last_block_of_the_language_is_the_answer() -> None:
    texts = {
        "plain = 1": "plain = 1",
        "See:\n```python\nx = 1\n```\nand\n```python\nx = 2\n```\n": "x = 2\n",
        "```python\nx = 1\n```\nOutput:\n```\n5\n```\n": "x = 1\n",
        "```py\nx = 1": "x = 1",
        "```\nx = 1\n```\ntext\n```\nx = 2\n```": "x = 2\n",
        "x = 1\n```\nThat is it.": "x = 1\n",
        "<think>```python\nx = 1\n```</think>```text\nno\n```\n```python\nx = 2\n```": "x = 2\n",
        "x = 0\n```\nsome text\n```python\nx = 3\n": "x = 3\n",
        "````python\ns = '''\n```\n'''\n````": "s = '''\n```\n'''\n",
        "```Python3\r\nx = 1\r\n```": "x = 1\n",
        "1. Code:\n   ```python\n   def f():\n       return 1\n   ```": "def f():\n    return 1\n",
        "1.\n\n    ```python\n    if a:\n\n        b()\n    ```": "if a:\n\n    b()\n",
        "- ```python\n  x = 1\n  ```": "x = 1\n",
        "\t```python\n\tx = 1\n\t```": "x = 1\n",
        "> ```python\n> x = 1\n> ```": "x = 1\n",
        "~~~py\nx = 1\n~~~": "x = 1\n",
        "```python3.10\nx = 1\n```": "x = 1\n",
        "Here it is:```python\nx = 1\n```": "x = 1\n",
        "```python\nx = 1```": "x = 1",
        "```python\nx = 1```\nThis is `x`.": "x = 1",
        "<think>a</think><answer>```python\nx = 1\n```</answer>": "x = 1\n",
        "<think>a</think>\n<answer>\nx = 1\n</answer>": "\nx = 1\n",
        DOCUMENTED: DOCUMENTED,
        f"```python\n{DOCUMENTED}\n```": DOCUMENTED + "\n",
        f"```python\n{TAGGED}\n```": TAGGED + "\n",
        "x = s.split('<think>')": "x = s.split('<think>')",
    }
    for text, code in texts.items():
        assert extract_code(text, "python")[0] == code, text
    assert extract_code("```javascript\n1\n```", "python") == (None, Reason.NO_ANSWER)
    assert extract_code("<think>```python\nx\n```", "python") == (None, Reason.TRUNCATED)
    assert extract_code("So. <think>```python\nx\n```", "python") == (None, Reason.TRUNCATED)
    assert extract_code("```C++17\nint x;\n```", "cpp")[0] == "int x;\n"


def test_outputs_compare_by_line_and_numbers_within_the_tolerance() -> None:
    assert same_output("1 2 \n3\n\n", "1 2\n3")
    assert not same_output("1\n2", "1")
    assert not same_output("1", "1\n2")
    assert not same_output("", "0")
    assert not same_output("1.0", "1")
    assert same_output("1.0000001 x", "1 x", 1e-6)
    assert not same_output("1.1 x", "1 x", 1e-6)
    assert not same_output("nan", "1", 1e-6)
    assert not same_output("1\n2", "1", 1e-6)
    assert same_output("5\r\n6\r\n", "5\n6") and not same_output("1\x0c2", "1\n2")
    assert same_output("2.9999999", "3", 1e-6) and same_output("+07", "7", 1e-6)
    for actual, expected in (("1000000008", "1000000007"), ("1_0", "10"), ("１０", "10")):
        assert not same_output(actual, expected, 1e-6)
    assert not same_value([10**9 + 8], [10**9 + 7], 1e-6) and same_value([1e9 + 8], [10**9 + 7], 1e-6)
    assert same_value({1: 2}, {"1": 2}, 0.0) and not same_value({1: 2, "1": 3}, {"1": 3}, 0.0)


@pytest.mark.parametrize("tolerance", [1e-6, 0.5, 10.0])
def test_an_infinity_is_close_to_itself_only_and_nan_to_nothing(tolerance: float) -> None:
    for actual, expected in (
        *(("1", "inf"), ("-inf", "inf"), ("inf", "1"), ("nan", "inf"), ("inf", "nan"), ("nan", "1")),
        *(("1e999", "inf"), ("9" * 400, "1" * 400), ("x 3", "x inf")),
    ):
        assert not same_output(actual, expected, tolerance), (actual, expected)
    assert same_output("inf", "Infinity", tolerance) and same_output("nan", "nan", tolerance)
    inf, nan, huge = float("inf"), float("nan"), 10**400
    for value, wanted in (
        *((1, inf), (-inf, inf), (inf, 1.0), (nan, inf), (nan, nan), (nan, 1), (huge, inf), (inf, huge)),
        *((1.5, huge), (huge, 1.5), ([1], [inf]), ({"a": 1}, {"a": inf}), (-1e308, inf), (1e308, -1e308)),
    ):
        assert not same_value(value, wanted, min(tolerance, 1.0)), (value, wanted)
    assert same_value([inf, {"a": -inf}], [inf, {"a": -inf}], tolerance) and same_value(huge, huge, tolerance)


def test_unknown_options_and_weights_are_refused_with_a_remedy() -> None:
    for tolerance in (float("inf"), float("nan"), -1.0):
        with pytest.raises(ValueError, match="must be >= 0 and finite, such as 1e-6"):
            CodeOptions(float_tolerance=tolerance)
    with pytest.raises(ValueError, match="use 'all' or 'fraction'"):
        CodeOptions(scoring="some")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="timeout_s=0 is below"):
        CodeOptions(timeout_s=0)
    with pytest.raises(ValueError, match="one for each of the 1 tests"):
        parse_tests({"type": "stdio", "cases": [{"input": "", "output": ""}], "weights": [1, 2]})


def test_the_reward_follows_the_convention_of_trl() -> None:
    completions = [
        [{"role": "assistant", "content": "```python\ndef add(a, b): return a + b\n```"}],
        "def add(a, b): return a - b",
    ]
    try:
        rewards = code_reward(
            ["p", "p"], completions, [ADD_TESTS, json.dumps(ADD_TESTS)], timeout_s=30.0, answer=["", ""]
        )
    finally:
        close_sandboxes()
    assert [reward.score for reward in rewards] == [1.0, 0.0]
    assert rewards[0].extracted == "def add(a, b): return a + b\n"
