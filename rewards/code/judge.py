"""Runs a program against its tests and says what became of it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rewards.code.compare import same_output
from rewards.code.tests import CodeTests
from rewards.sandbox.sandbox import Limits, Program, RunResult, Sandbox
from rl.types import Reason

SOLUTION, TESTER = "rewards.code.solution", "rewards.code.tester"
JUDGES = (
    TESTER,
    *("rewards.code.compare", "rewards.code.namespace", "rewards.code.objects", "rewards.code.remote"),
    "rewards.code.soft_asserts",
)


@dataclass(slots=True)
class Verdict:
    """`passed`: one entry per test where tests were counted, else empty; None: the tests left it out.
    `complete`: False where a crash ended tests early, and stands among them as one more.
    """

    reason: Reason
    detail: str = ""
    passed: Sequence[bool | None] = ()
    complete: bool = True


def judge_outputs(
    cases: Sequence[Mapping[str, Any]],
    run: Callable[[bytes, Limits], RunResult],
    limits: Limits,
    *,
    total_timeout_s: float,
    tolerance: float,
    all_cases: bool,
) -> Verdict:
    """Runs a program on each case's input and compares what it prints; stops at the first failure unless
    `all_cases`.
    """
    deadline = time.monotonic() + total_timeout_s
    passed: list[bool] = []
    first = Verdict(Reason.CORRECT)
    for index, case in enumerate(cases):
        remaining = deadline - time.monotonic()
        if remaining <= 0.01:
            found = Verdict(Reason.TIMEOUT, f"all cases together exceed {total_timeout_s} s")
        else:
            stdin = case["input"].encode("utf-8", "surrogatepass")
            result = run(stdin, replace(limits, timeout_s=min(limits.timeout_s, remaining)))
            found = fault_of(result) or _compared(result, case["output"], tolerance)
        passed.append(found.reason is Reason.CORRECT)
        if not passed[-1] and first.reason is Reason.CORRECT:
            first = Verdict(found.reason, f"case {index}: {found.detail}")
        if not passed[-1] and not all_cases:
            break
    first.passed = passed
    return first


def _compared(result: RunResult, expected: str, tolerance: float) -> Verdict:
    actual = result.stdout.decode("utf-8", "replace")
    if same_output(actual, expected, tolerance):
        return Verdict(Reason.CORRECT)
    return Verdict(Reason.WRONG_ANSWER, f"wrong output {actual[:100]!r}")


def judge_calls(
    code: str, tests: CodeTests, sandbox: Sandbox, limits: Limits, *, partial: bool, tolerance: float
) -> Verdict:
    """Lets the tester run asserts or calls against `code`, each in a process of its own."""
    # A completion that repeats the prompt needs it no second time.
    prompt = "" if tests.prompt.strip() and tests.prompt.strip() in code else tests.prompt
    own = re.split(r"\W", tests.entry_point, maxsplit=1)[:1]
    solution = {"code": code, "prompt": prompt, "own": own, "leetcode": _is_leetcode(own[0], tests.code)}
    given = {
        "code": tests.code,
        "cases": list(tests.cases) or None,
        "prompt": tests.prompt,
        "entry_point": tests.entry_point,
        "partial": partial,
        "tolerance": tolerance,
    }
    try:
        programs = [
            Program(TESTER, json.dumps(given).encode(), judge=True),
            Program(SOLUTION, json.dumps(solution).encode(), one_output=True),
        ]
    except (TypeError, RecursionError) as error:
        raise ValueError(f"the cases hold what JSON cannot: {error}") from None
    tester, solution_result = sandbox.run_programs(programs, limits=limits)
    records = [json.loads(line) for line in tester.extra.splitlines()]
    called = {"called": True} in records
    if not records or "outcome" not in records[-1]:
        if not called:
            what = "do not end" if tester.timed_out else "end the tester"
            if solution_result.cpu_s < limits.timeout_s / 2:  # else the solution starved the tests
                return Verdict(Reason.BAD_GOLD, f"the tests {what} before they call the solution")
        return Verdict(
            Reason.TIMEOUT if tester.timed_out else Reason.TEST_ERROR, "no verdict before the deadline"
        )
    return _verdict(records[-1], solution_result)


def _is_leetcode(entry: str, test_code: str) -> bool:
    """Whether tests name a class, as LeetCode's do: such solutions rely on what its judge has imported."""
    return entry[:1].isupper() or (not entry and "Solution()." in test_code)


def _verdict(record: Mapping[str, Any], solution: RunResult) -> Verdict:
    """What the tester's record means."""
    outcome, detail = record["outcome"], record.get("detail", "")
    if outcome == "gone":
        found = fault_of(solution) or Verdict(Reason.CRASH, "the solution ended before it answered")
        return Verdict(found.reason, found.detail)
    if outcome in ("passed", "failed", "test_error") and not record["num_calls"]:
        return Verdict(Reason.BAD_GOLD, f"the tests never call the solution {detail}")
    reasons = {
        "passed": Reason.CORRECT,
        "failed": Reason.WRONG_ANSWER,
        "raised": Reason.CRASH,
        "fatal": Reason.CRASH,
        "missing": Reason.NO_ANSWER,
        "bad_value": Reason.BAD_VALUE,
        "bad_gold": Reason.BAD_GOLD,
        "test_error": Reason.TEST_ERROR,
    }
    reason = reasons[outcome]
    if reason is Reason.CRASH:
        reason = _reason_of_exception(detail)
    passed = record.get("passed", ())
    if reason is Reason.CORRECT and False in passed:
        reason = Reason.WRONG_ANSWER
    return Verdict(reason, detail, passed, record.get("complete", True))


def fault_of(result: RunResult) -> Verdict | None:
    """Why a program did not end well; None if it did."""
    if result.timed_out:
        return Verdict(Reason.TIMEOUT, f"still running after {result.cpu_s:.2f} s of CPU time")
    if result.truncated:
        return Verdict(Reason.OUTPUT_LIMIT, "more output than allowed")
    if result.exit_code == 0 or result.killed:
        return None
    if result.signal is not None:
        return Verdict(Reason.CRASH, f"signal {result.signal}")
    last_line = result.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
    return Verdict(_reason_of_exception(last_line), f"exit status {result.exit_code}: {last_line}")


def _reason_of_exception(text: str) -> Reason:
    name = text.partition(":")[0].strip()
    if name in ("SyntaxError", "IndentationError", "TabError"):
        return Reason.PARSE_ERROR
    return Reason.MEMORY if name == "MemoryError" else Reason.CRASH
