"""Runs a program against its tests and returns a verdict."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rewards.code.compare import same_output
from rewards.code.extract import TAGS
from rewards.code.tests import CodeTests
from rewards.sandbox.reaper import own_seconds
from rewards.sandbox.sandbox import Command, Limits, Program, RunResult, Sandbox
from rl.types import Reason

SOLUTION, TESTER = "rewards.code.solution", "rewards.code.tester"
_BESIDE = ("compare", "namespace", "objects", "remote", "soft_asserts")
JUDGES = (TESTER, *(f"rewards.code.{name}" for name in _BESIDE))
REASONS = {"passed": Reason.CORRECT, "failed": Reason.WRONG_ANSWER, "missing": Reason.NO_ANSWER}


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeOptions:
    """How programs are graded.

    Attributes:
        scoring: "all": 1 if every test passes, else 0; "fraction": share of tests passed, by weight where
            tests have weights.
        timeout_s: for each stdin/stdout case; for all asserts or calls together. Waiting for a processor that
            others keep busy does not count, up to five times as long by the clock.
        total_timeout_s: for all stdin/stdout cases of one completion.
        memory_mib: address space beyond the interpreter's own.
        output_mib: each of stdout and stderr.
        float_tolerance: absolute or relative, for numbers in outputs of types stdio and calls, except two
            integers. An infinity equals only itself, NaN nothing.
        language: language of completions whose tests name none.
        packages: third-party packages that programs may import if they are installed.
    """

    scoring: Literal["all", "fraction"] = "all"
    timeout_s: float = 5.0
    total_timeout_s: float = 30.0
    memory_mib: int = 1024
    output_mib: int = 8
    float_tolerance: float = 0.0
    language: str = "python"
    packages: tuple[str, ...] = ("numpy",)

    def __post_init__(self) -> None:
        if self.scoring not in ("all", "fraction"):
            raise ValueError(f"scoring={self.scoring!r} is unknown; use 'all' or 'fraction'")
        if self.language not in TAGS:
            raise ValueError(f"language={self.language!r} is unknown; use one of {', '.join(TAGS)}")
        if not 0 <= self.float_tolerance < float("inf"):
            raise ValueError(f"float_tolerance={self.float_tolerance} must be >= 0 and finite, such as 1e-6")
        object.__setattr__(self, "packages", tuple(self.packages))  # a config gives a list
        self.limits()

    def limits(self) -> Limits:
        return Limits(timeout_s=self.timeout_s, memory_mib=self.memory_mib, output_mib=self.output_mib)


@dataclass(slots=True)
class Verdict:
    """`passed`: one entry per test if tests were counted, else empty; None marks a test that was left out.
    `complete`: False if a crash ended the tests early; the crash then counts as one more test.
    """

    reason: Reason
    detail: str = ""
    passed: Sequence[bool | None] = ()
    complete: bool = True


def judge_outputs(
    program: Callable[[bytes], Program | Command], tests: CodeTests, options: CodeOptions, sandbox: Sandbox
) -> Verdict:
    """Runs `program` on each case's input and compares its output; stops at a failure if all must pass."""
    limits, total_timeout_s = options.limits(), options.total_timeout_s
    remaining = total_timeout_s
    passed: list[bool] = []
    first = Verdict(Reason.CORRECT)
    for index, case in enumerate(tests.cases):
        if remaining <= 0.01:
            found = Verdict(Reason.TIMEOUT, f"all cases together exceed {total_timeout_s} s")
        else:
            stdin = case["input"].encode("utf-8", "surrogatepass")
            left = replace(limits, timeout_s=min(limits.timeout_s, remaining))
            began = time.monotonic()
            result = sandbox.run_programs([program(stdin)], limits=left)[0]
            remaining -= own_seconds(result.cpu_s, time.monotonic() - began)
            found, actual = fault_of(result), result.stdout.decode("utf-8", "surrogateescape")
            if found is None and not same_output(actual, case["output"], options.float_tolerance):
                found = Verdict(Reason.WRONG_ANSWER, f"wrong output {actual[:100]!r}")
            found = found or Verdict(Reason.CORRECT)
        passed.append(found.reason is Reason.CORRECT)
        if not passed[-1] and first.reason is Reason.CORRECT:
            first = Verdict(found.reason, f"case {index}: {found.detail}")
        if not passed[-1] and options.scoring == "all":
            break
    first.passed = passed
    return first


def judge_calls(code: str, tests: CodeTests, options: CodeOptions, sandbox: Sandbox) -> Verdict:
    """Runs asserts or calls against `code`; tester and solution each have a process of their own."""
    # A completion that repeats the prompt does not need it again.
    prompt = "" if tests.prompt.strip() and tests.prompt.strip() in code else tests.prompt
    own = re.split(r"\W", tests.entry_point, maxsplit=1)[:1]
    # LeetCode's tests name a class; such solutions rely on the imports of its judge.
    is_class = own[0][:1].isupper() or (not own[0] and "Solution()." in tests.code)
    solution = {"code": code, "prompt": prompt, "own": own, "leetcode": is_class}
    given = {"code": tests.code, "prompt": tests.prompt, "entry_point": tests.entry_point}
    given |= {"partial": options.scoring == "fraction", "tolerance": options.float_tolerance}
    try:
        asked = json.dumps({**given, "cases": list(tests.cases) or None}).encode()
        served = json.dumps(solution).encode()
        programs = [Program(TESTER, asked, judge=True), Program(SOLUTION, served, one_output=True)]
    except (TypeError, RecursionError) as error:
        raise ValueError(f"the cases hold what JSON cannot: {error}") from None
    tester, solution_result = sandbox.run_programs(programs, limits=options.limits())
    records = [json.loads(line) for line in tester.extra.splitlines()]
    if not records or "outcome" not in records[-1]:
        starved = solution_result.cpu_s >= options.timeout_s / 2  # the tests, by the solution
        if {"called": True} not in records and not starved:
            what = "do not end" if tester.timed_out else "end the tester"
            return Verdict(Reason.BAD_GOLD, f"the tests {what} before they call the solution")
        reason = Reason.TIMEOUT if tester.timed_out else Reason.TEST_ERROR
        return Verdict(reason, "no verdict before the deadline")
    return _verdict(records[-1], solution_result)


def _verdict(record: Mapping[str, Any], solution: RunResult) -> Verdict:
    """What the tester's record means."""
    outcome, detail = record["outcome"], record.get("detail", "")
    if outcome == "gone":
        return fault_of(solution) or Verdict(Reason.CRASH, "the solution ended before it answered")
    if outcome in ("passed", "failed", "test_error") and not record["num_calls"]:
        return Verdict(Reason.BAD_GOLD, f"the tests never call the solution {detail}")
    if outcome in ("raised", "fatal"):
        reason = _reason_of_exception(detail)
    else:  # bad_value, bad_gold and test_error are reasons themselves
        reason = REASONS.get(outcome) or Reason(outcome)
    passed = record.get("passed", ())
    if reason is Reason.CORRECT and False in passed:
        reason = Reason.WRONG_ANSWER
    return Verdict(reason, detail, passed, record.get("complete", True))


def fault_of(result: RunResult) -> Verdict | None:
    """Why a program failed; None if it ended well."""
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
