"""Grades programs by running them against tests, in a sandbox.

    grade("def f(a): return a + 1", {"type": "asserts", "entry_point": "f", "code": "assert f(2) == 3"})

The program never shares a process with a test or an expected output. A fault of this library or of the tests
abstains (score None). Whatever the program does counts against it, its time and memory included.
"""

from __future__ import annotations

import atexit
import inspect
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rewards.code.extract import TAGS, extract_code
from rewards.code.judge import JUDGES, SOLUTION, CodeOptions, Verdict, judge_calls, judge_outputs
from rewards.code.languages import COMPILE_TIMEOUT_S, prepared
from rewards.code.tests import STDIO, CodeTests, parse_tests
from rewards.completion import last_message_text
from rewards.sandbox.reaper import SHARE
from rewards.sandbox.sandbox import Program, RunResult, Sandbox, SandboxError
from rl.types import Reason, Reward

SCRIPT = "rewards.sandbox.script"
MAX_DETAIL = 300
LONGEST_START_S = 30.0  # the start of a sandbox on a busy machine
ABSTAINING = (Reason.INFRA_ERROR, Reason.BAD_GOLD)


def code_reward(
    prompts: Sequence[Any], completions: Sequence[Any], tests: Sequence[Any], **given: Any
) -> list[Reward]:
    """The reward of each completion, one program per core at a time. Options as in `CodeOptions`."""
    options = {name: given[name] for name in OPTIONS if name in given}
    return grade_all(completions, tests, options=CodeOptions(**options))


def _time_limit_s(options: Mapping[str, Any]) -> float:
    """Seconds that one completion may take under these options of `code_reward`, compilation included."""
    limits = CodeOptions(**options)
    longest_s = max(limits.timeout_s, limits.total_timeout_s) + COMPILE_TIMEOUT_S
    return longest_s / SHARE + LONGEST_START_S


OPTIONS = inspect.signature(CodeOptions).parameters
_columns = list(inspect.signature(code_reward).parameters.values())[:3]
# `rewards.plugins` reads columns and options from this signature.
code_reward.__signature__ = inspect.Signature([*_columns, *OPTIONS.values()])  # pyright: ignore[reportFunctionMemberAccess]
code_reward.time_limit_s = _time_limit_s  # pyright: ignore[reportFunctionMemberAccess]


def grade_all(
    completions: Sequence[Any], tests: Sequence[Any], *, options: CodeOptions | None = None
) -> list[Reward]:
    """`grade` for each pair, in order, over all cores."""
    options = options or CodeOptions()
    pairs = list(zip(completions, tests, strict=True))
    try:
        sandbox = shared_sandbox(options)
    except SandboxError as error:
        return [Reward(None, Reason.INFRA_ERROR, str(error)) for _ in pairs]
    return sandbox.map(lambda pair: grade(last_message_text(pair[0]), pair[1], options=options), pairs)


def grade(
    completion: str,
    tests: Mapping[str, Any] | str,
    *,
    options: CodeOptions | None = None,
    sandbox: Sandbox | None = None,
) -> Reward:
    """Runs the code of `completion` against `tests` (see `parse_tests`); never raises for either of them.

    `sandbox`: made by `code_sandbox`, with the packages that programs may import; by default, one that this
        process shares and starts on first use.
    """
    options = options or CodeOptions()
    start = time.perf_counter()
    code, weights = None, ()
    try:
        parsed = parse_tests(tests)
        weights = parsed.weights
        verdict, code = _judge(completion, parsed, options, sandbox)
    except SandboxError as error:
        verdict = Verdict(Reason.INFRA_ERROR, str(error))
    except ValueError as error:
        verdict = Verdict(Reason.BAD_GOLD, str(error))
    score = None if verdict.reason in ABSTAINING else float(verdict.reason is Reason.CORRECT)
    if score is not None and options.scoring == "fraction" and (passed := verdict.passed):
        if weights and len(weights) != len(passed) and verdict.complete:
            score, verdict = None, Verdict(Reason.BAD_GOLD, f"{len(weights)} weights for {len(passed)} tests")
        else:
            score = _share(passed, weights or (1.0,) * len(passed), score)
    elapsed_ms = (time.perf_counter() - start) * 1e3
    return Reward(score, verdict.reason, verdict.detail[:MAX_DETAIL], code, elapsed_ms)


def _share(passed: Sequence[bool | None], weights: Sequence[float], otherwise: float) -> float:
    """The passed share of the weights that count; a test that a crash kept from running has failed."""
    results = list(zip(weights, passed, strict=False))  # after a crash their lengths may differ
    total = sum(weights) - sum(weight for weight, ok in results if ok is None)
    return sum(weight for weight, ok in results if ok) / total if total > 0 else otherwise


_sandboxes: dict[tuple[Any, ...], Sandbox] = {}
_lock = threading.Lock()


def code_sandbox(**options: Any) -> Sandbox:
    """A sandbox that can grade; `options` are those of `Sandbox`."""
    return Sandbox(modules=[SOLUTION], judges=JUDGES, **options)


def shared_sandbox(
    options: CodeOptions, *, packages: tuple[str, ...] = (), commands: bool = False
) -> Sandbox:
    """The sandbox of this process for these options, started once and closed at exit. Raises SandboxError."""
    key = (os.getpid(), options.memory_mib, options.output_mib, packages, commands)
    with _lock:
        if key not in _sandboxes:
            if not _sandboxes:
                atexit.register(close_sandboxes)
            _sandboxes[key] = code_sandbox(packages=packages, limits=options.limits(), commands=commands)
        return _sandboxes[key]


def close_sandboxes() -> None:
    """Ends the shared sandboxes; the next grade starts fresh ones."""
    with _lock:
        for sandbox in _sandboxes.values():
            sandbox.close()
        _sandboxes.clear()


def _judge(
    completion: str, tests: CodeTests, options: CodeOptions, sandbox: Sandbox | None
) -> tuple[Verdict, str | None]:
    language = tests.language if tests.language != "python" else options.language
    if language not in TAGS:
        raise ValueError(f"language {language!r} is unknown; use one of {', '.join(TAGS)}")
    if language != "python" and tests.kind != STDIO:
        raise ValueError(f"tests of type {tests.kind!r} are for Python; {language} needs type 'stdio'")
    code, reason = extract_code(completion, language)
    if code is None:
        return Verdict(reason, "no code in the completion"), None
    if language != "python":
        return _judge_other(code, language, tests, options), code
    if _continues_prompt(code, tests):
        code = tests.prompt + code
    if sandbox is None:
        words = "\n".join((code, tests.code, tests.prompt))
        packages = [name for name in options.packages if re.search(rf"\b{re.escape(name)}\b", words)]
        sandbox = shared_sandbox(options, packages=options.packages if packages else ())
    if tests.kind == STDIO:
        source = code.encode("utf-8", "surrogatepass")
        return judge_outputs(lambda stdin: Program(SCRIPT, source, stdin), tests, options, sandbox), code
    return judge_calls(code, tests, options, sandbox), code


def _judge_other(code: str, language: str, tests: CodeTests, options: CodeOptions) -> Verdict:
    sandbox = shared_sandbox(options, commands=True)
    with prepared(code, language, options.limits(), sandbox) as command:
        if isinstance(command, RunResult):
            last_words = command.stderr.decode("utf-8", "replace").strip()[:200]
            reason = Reason.TIMEOUT if command.timed_out else Reason.PARSE_ERROR
            return Verdict(reason, f"compiling: {last_words}")
        return judge_outputs(lambda stdin: replace(command, stdin=stdin), tests, options, sandbox)


def _continues_prompt(code: str, tests: CodeTests) -> bool:
    """Whether the prompt starts the function that the tests call and the completion does not define it."""
    name = re.escape(re.split(r"\W", tests.entry_point, maxsplit=1)[0])
    begun = rf"^(?:(?:async\s+)?def|class)\s+{name}\b"
    if tests.kind == STDIO or not name or not re.search(begun, tests.prompt, re.MULTILINE):
        return False
    if re.search(rf"{begun}|^{name}\s*[:=]", code, re.MULTILINE):
        return False
    # One look at each line after its first `import`: a pattern for both would try every pair of them.
    imported = re.findall(r"\bimport\b(.*)", code)
    return not any(re.search(rf"\b{name}\b", rest) for rest in imported)
