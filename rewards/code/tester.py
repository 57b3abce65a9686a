"""Runs the tests of a dataset against a solution in another process; this process is in the sandbox, too.

The tests see the solution through proxies (`rewards.code.remote`); every comparison happens here, between
values that the protocol has rebuilt from plain data. The verdict goes to descriptor 5, which the solution
does not have.

Tests are a script of asserts, `check(candidate)` as in HumanEval, `test_*` functions, `unittest` classes, or
data (`cases` of arguments and expected outputs).
"""

from __future__ import annotations

import ast
import json
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rewards.code.compare import same_value
from rewards.code.namespace import Namespace
from rewards.code.objects import Remote
from rewards.code.protocol import Channel
from rewards.code.remote import OWN, SEED, Link, Misuse, SolutionFault
from rewards.code.soft_asserts import Sites, soften

VERDICT = 5
MAX_DETAIL = 500
# What may outlast a script of tests: attributes that it sets, except on its own `self`, and settings of the
# interpreter and the library.
LEAVES_TRACES = re.compile(
    r"(?<!\bself)\.\w+(?:\[[^\]\n]*\])?\s*(?:[-+*/%|&^@]|//|\*\*|<<|>>)?=(?!=)|\bdel\s+\w+\.|__dict__"
    r"|\b(?:setattr|delattr|set\w*context|getcontext|environ|putenv|simplefilter|filterwarnings|patch|mock"
    r"|signal|chdir|locale|reload|threading|atexit|vars|globals)\b|\bsys\.(?:set|modules|path)|\bgc\."
)

# Tests read or replace these in their own process only, which may be why such tests fail.
NOT_SHARED = re.compile(
    r"\bpatch(?:\.object)?\((?!\s*(?:['\"](?:builtins\.(?:input|print)|sys\.std\w+)['\"]|builtins,|sys,))"
    r"|\bpatch\.dict|(?m:^\s*\w+ *= *(?:mock\.)?(?:Magic|Async)?Mock\()|\bmonkeypatch\b"
    r"|\b(?:assertLogs|assertWarns|catch_warnings|tracemalloc|getrefcount)"
    r"|\b(?:np|numpy)\.random\.seed|\bgetsource|\bsignature\(|__code__|\bsys\.argv|\benviron\b"
)


def main(source: bytes) -> int:
    """`source`: {"code" | "cases", "prompt", "entry_point", "partial", "tolerance"} as JSON. Writes the
    verdict as JSON lines. Returns 1 if the tests may have changed the interpreter for those that follow.
    """
    given = json.loads(source)
    random.seed()
    link = Link(Channel(3, 4), on_first_call=lambda: _write({"called": True}))
    random.seed = link.seed
    try:
        verdict = _run_cases(given, link) if given["cases"] is not None else _run_code(given, link)
    except SolutionFault as fault:
        verdict = {"outcome": fault.kind, "detail": fault.detail}
    except RecursionError:
        verdict = {"outcome": "test_error", "detail": "recursion without end in the tests"}
    finally:
        random.seed = SEED
    if link.fault is not None:  # even if the tests caught it
        verdict = {**verdict, "outcome": link.fault.kind, "detail": link.fault.detail}
    # Bounded, whatever the solution said: a verdict cut by the output cap would not be JSON.
    verdict["detail"] = verdict["detail"][:MAX_DETAIL]
    _write({**verdict, "num_calls": link.num_calls})
    return int(any(LEAVES_TRACES.search(given[name] or "") for name in ("code", "prompt")))


def _write(record: dict[str, Any]) -> None:
    os.write(VERDICT, json.dumps(record).encode() + b"\n")


def _run_cases(given: dict[str, Any], link: Link) -> dict[str, Any]:
    """LeetCode-style data: each case calls the entry point. Tuples equal lists: JSON has no tuples."""
    call: Any = Remote(link, given["entry_point"])
    passed: list[bool] = []
    detail = ""
    for index, case in enumerate(given["cases"]):
        try:
            value = call(*case.get("args", ()), **case.get("kwargs", {}))
            passed.append(same_value(value, case["output"], given["tolerance"]))
            if not passed[-1]:
                detail = detail or f"case {index}: wrong value {_brief(value)}"
        except Exception as error:
            passed.append(False)
            detail = detail or f"case {index}: {_described(error)}"
        if not passed[-1] and not given["partial"]:
            break
    return {"outcome": "passed" if all(passed) else "failed", "passed": passed, "detail": detail}


def _run_code(given: dict[str, Any], link: Link) -> dict[str, Any]:
    source, entry_point = given["code"], given["entry_point"]
    sites = Sites()
    tree = ast.Module([], [])
    try:
        if given["partial"] or _has_more_than_a_script(source, entry_point):
            tree = _without(ast.parse(source, "<tests>"), entry_point)
            if given["partial"]:
                tree.body = soften(tree.body, sites)
            code = compile(tree, "<tests>", "exec", dont_inherit=True)
        else:
            code = compile(source, "<tests>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError) as error:
        return {"outcome": "bad_gold", "detail": f"the tests do not compile: {_described(error)}"}
    namespace = Namespace(
        link, entry_point, source, lambda names: _run_prompt(given["prompt"], entry_point, names)
    )
    namespace.install_modules()
    namespace.update(sites.names())
    outcome, detail = "passed", ""
    try:
        exec(code, namespace)
        for name, run in _collected(tree, namespace):
            sites.attempt(name, run) if given["partial"] else run()
    except AssertionError as error:
        outcome, detail = "failed", str(error)
    except Misuse as error:
        outcome, detail = "bad_gold", str(error)
    except SystemExit as leaving:  # unittest.main()
        outcome, detail = ("failed", f"exit status {leaving.code}") if leaving.code else ("passed", "")
    except Exception as error:
        outcome, detail = "test_error", _described(error)
        if hasattr(error, OWN):
            outcome = "raised"
        elif isinstance(error, ImportError | OSError):
            outcome, detail = "bad_gold", f"{detail}: the tests need what the sandbox does not offer"
    verdict: dict[str, Any] = {"outcome": outcome, "detail": detail[:MAX_DETAIL]}
    if given["partial"]:
        verdict["passed"] = sites.results(aborted=outcome != "passed")
        verdict["complete"] = outcome == "passed" and not sites.num_crashes
        verdict["detail"] = verdict["detail"] or sites.first_failure
    found = NOT_SHARED.search(source)
    if found and (outcome in ("failed", "test_error", "raised") or not all(verdict.get("passed", ()))):
        verdict["outcome"] = "bad_gold"
        verdict["detail"] = f"{found[0]!r} in the tests does not reach the solution's process: {detail}"
    return verdict


def _run_prompt(prompt: str, entry_point: str, namespace: Namespace) -> None:
    """Runs the prompt, if it is code, without its stub of the solution."""
    try:
        tree = _without(ast.parse(prompt, "<prompt>"), entry_point)
        exec(compile(tree, "<prompt>", "exec", dont_inherit=True), namespace)
    except Exception:
        return  # prose, or an unfinished function


def _without(tree: ast.Module, name: str) -> ast.Module:
    """The module without its own definition of `name`, so that the solution's is tested."""
    tree.body = [node for node in tree.body if getattr(node, "name", None) != name]
    return tree


def _has_more_than_a_script(source: str, entry_point: str) -> bool:
    """Whether `source` may need more than a run from top to bottom: it holds an uncalled test function, a
    class, or a stub of the solution. (Parsing a tree takes three times as long as compiling.)
    """
    lines = "\n" + source
    uncalled_check = "\ndef check(" in lines and "\ncheck(" not in lines
    stub = bool(entry_point) and f"\ndef {entry_point}(" in lines
    return uncalled_check or stub or "\nclass " in lines or "\ndef test" in lines or "\nasync def" in lines


def _collected(tree: ast.Module, namespace: Namespace) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, call) of each test for a runner: uncalled `check(candidate)` and `test*`, unittest cases."""
    script = (node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef))
    calls = (node for part in script for node in ast.walk(part) if isinstance(node, ast.Call))
    called = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name not in called:
            function = namespace[node.name]
            parameters = [argument.arg for argument in node.args.posonlyargs + node.args.args]
            required = parameters[: len(parameters) - len(node.args.defaults)]
            if (node.name == "check" and len(required) == 1) or required == ["candidate"]:
                yield node.name, lambda function=function: function(namespace["candidate"])
            elif node.name.startswith("test") and not required:
                yield node.name, function
            elif node.name.startswith("test") and not any(
                isinstance(part, ast.Name) and part.id == node.name for part in ast.walk(tree)
            ):
                raise Misuse(f"{node.name} needs the fixtures of pytest {', '.join(required)}")
        if isinstance(node, ast.ClassDef) and "unittest" in sys.modules:
            found = namespace[node.name]
            if isinstance(found, type) and issubclass(found, sys.modules["unittest"].TestCase):
                for case in sys.modules["unittest"].defaultTestLoader.loadTestsFromTestCase(found):
                    yield f"{node.name}.{case._testMethodName}", case.debug


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:MAX_DETAIL]


def _brief(value: Any) -> str:
    try:
        return repr(value)[:100]
    except Exception as error:
        return type(error).__name__
