"""The tests of a coding problem, read from a dataset's column and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SCRIPT, CALLS, STDIO = "asserts", "calls", "stdio"


@dataclass(frozen=True, slots=True)
class CodeTests:
    """Tests of one of three kinds.

    Attributes:
        kind: "asserts": `code` runs against `entry_point`; "calls": `entry_point` is called with each
            case's `args` and `kwargs` and must return its `output`; "stdio": each case's `input` on stdin
            must give its `output` on stdout.
        entry_point: `add`, `Solution().twoSum`, `Stack`; empty: the tests use the solution's names.
        prompt: the problem's own code, if it is code: imports, classes and helpers that tests and solution
            may use.
        weights: one per test, or empty for equal ones.
        language: language of the solution.
    """

    kind: str
    code: str = ""
    cases: tuple[Mapping[str, Any], ...] = ()
    entry_point: str = ""
    prompt: str = ""
    weights: tuple[float, ...] = ()
    language: str = "python"


def parse_tests(tests: Mapping[str, Any] | str) -> CodeTests:
    """Reads {"type": "asserts"|"calls"|"stdio", ...} or APPS's {"inputs", "outputs", ...}, also as JSON text.

    Raises:
        ValueError: the tests cannot be used; the message says why.
    """
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except ValueError as error:
            raise ValueError(f"tests are text, but not JSON: {error}") from None
    if not isinstance(tests, Mapping):
        raise ValueError(f"tests are {type(tests).__name__}; give a mapping with type, and code or cases")
    if "type" not in tests and "inputs" in tests:
        tests = _from_columns(tests)
    kind = tests.get("type")
    named = ("entry_point", "prompt", "language")
    texts: dict[str, Any] = {name: _text(tests, name) for name in named if tests.get(name)}
    if kind == SCRIPT:
        code = tests.get("code")
        if isinstance(code, Sequence) and not isinstance(code, str):
            code = "\n".join(map(str, code))
        if not isinstance(code, str) or not code.strip():
            raise ValueError("tests of type 'asserts' need code: a script, or a list of assert statements")
        return CodeTests(SCRIPT, code=code, weights=_weights(tests.get("weights"), None), **texts)
    if kind not in (CALLS, STDIO):
        raise ValueError(f"tests have type {kind!r}; known are 'asserts', 'calls' and 'stdio'")
    cases = tests.get("cases")
    if not isinstance(cases, Sequence) or isinstance(cases, str) or not cases:
        raise ValueError(f"tests of type {kind!r} need cases: a list that is not empty")
    if kind == CALLS and "entry_point" not in texts:
        raise ValueError("tests of type 'calls' need entry_point, such as 'add' or 'Solution().twoSum'")
    read = tuple(_case(kind, index, case) for index, case in enumerate(cases))
    weights = tests.get("weights")
    if weights is None and any("weight" in case for case in cases):
        weights = [case.get("weight", 1.0) for case in cases]
    return CodeTests(kind, cases=read, weights=_weights(weights, len(cases)), **texts)


def _from_columns(tests: Mapping[str, Any]) -> dict[str, Any]:
    inputs, outputs = tests["inputs"], tests.get("outputs")
    if not isinstance(outputs, Sequence) or len(inputs) != len(outputs):
        raise ValueError("tests with inputs need as many outputs")
    name = "args" if tests.get("fn_name") else "input"
    cases = [{name: given, "output": wanted} for given, wanted in zip(inputs, outputs, strict=True)]
    kind = {"type": CALLS, "entry_point": tests["fn_name"]} if name == "args" else {"type": STDIO}
    return {**tests, **kind, "cases": cases}


def _case(kind: str, index: int, case: Any) -> dict[str, Any]:
    if not isinstance(case, Mapping) or "output" not in case:
        raise ValueError(f"case {index} has no output")
    if kind == STDIO:
        return {name: _lines(case.get(name, ""), index, name) for name in ("input", "output")}
    args, kwargs = case.get("args", ()), case.get("kwargs", {})
    if not isinstance(args, Sequence) or isinstance(args, str) or not isinstance(kwargs, Mapping):
        raise ValueError(f"case {index}: args must be a list and kwargs a mapping")
    return {"args": list(args), "kwargs": dict(kwargs), "output": case["output"]}


def _lines(value: Any, index: int, name: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    raise ValueError(f"case {index}: {name} is {type(value).__name__}; give text, or a list of lines")


def _text(tests: Mapping[str, Any], name: str) -> str:
    if not isinstance(tests[name], str):
        raise ValueError(f"{name} is {type(tests[name]).__name__}; give text")
    return tests[name]


def _weights(weights: Any, num_tests: int | None) -> tuple[float, ...]:
    if weights is None:
        return ()
    numbers = weights if isinstance(weights, Sequence) else [None]
    good = all(isinstance(w, int | float) and 0 <= w < float("inf") for w in numbers)
    if not good or sum(weights) <= 0 or (num_tests is not None and len(weights) != num_tests):
        rule = f"finite numbers >= 0, not all 0, one for each of the {num_tests or ''} tests"
        raise ValueError(f"weights must be {rule}")
    return tuple(float(w) for w in weights)
