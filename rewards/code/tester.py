"""Runs the tests of a dataset against a solution in another process; this process is in the sandbox, too.

The tests see the solution through proxies (`rewards.code.remote`); every comparison happens here, between
values that the protocol has rebuilt from plain data. The solution lacks descriptor 5, for the verdict.

Tests are a script of asserts, `check(candidate)` as in HumanEval, functions and classes for pytest, cases of
unittest, or data (`cases` of arguments and expected outputs).
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import os
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from rewards.code.compare import same_value
from rewards.code.namespace import MODULE, Namespace
from rewards.code.objects import Remote
from rewards.code.protocol import Channel
from rewards.code.remote import OWN, SEED, Link, Misuse, SolutionFault
from rewards.code.soft_asserts import Sites, soften

VERDICT = 5
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
NOT_RUN = ("__unittest_skip__", "__unittest_expecting_failure__")  # as decorators of the tests say
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
            is_same = same_value(value, case["output"], given["tolerance"])
            problem = "" if is_same else f"wrong value {repr(value)[:100]}"
        except Exception as error:
            problem = _described(error)
        passed.append(not problem)
        detail = detail or (problem and f"case {index}: {problem}")
        if problem and not given["partial"]:
            break
    return {"outcome": "passed" if all(passed) else "failed", "passed": passed, "detail": detail}


def _run_code(given: dict[str, Any], link: Link) -> dict[str, Any]:
    source, entry_point = given["code"], given["entry_point"]
    sites = Sites()
    try:
        tree = _without(ast.parse(source, "<tests>"), entry_point)
        if given["partial"]:
            tree.body = soften(tree.body, sites)
        code = compile(tree, "<tests>", "exec", dont_inherit=True)
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
    """The module without its own definition of `name`, so that the solution's is tested, without calls of
    unittest.main, whose part `_collected` takes, and with tests under `if __name__ == "__main__"` unwrapped.
    """
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "unittest"]
    runners = ("unittest.main(", "main(") if imports else ("unittest.main(",)
    asserting = {getattr(node, "name", None) for node in tree.body if _asserts(node)}
    found: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, ast.If) and "'__main__'" in ast.unparse(node.test):
            found += node.body if _asserts(node) or _called([node]) & asserting else [node]
        elif getattr(node, "name", None) != name:
            found.append(node)
    tree.body = [n for n in found if not (isinstance(n, ast.Expr) and ast.unparse(n).startswith(runners))]
    return tree


def _asserts(node: ast.stmt) -> bool:
    return any(isinstance(part, ast.Assert) for part in ast.walk(node))


def _called(nodes: Iterable[ast.AST]) -> set[str | None]:
    calls = (part for node in nodes for part in ast.walk(node) if isinstance(part, ast.Call))
    return {call.func.id for call in calls if isinstance(call.func, ast.Name)}


def _collected(tree: ast.Module, namespace: Namespace) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, call) of each uncalled test: `check(candidate)`, `test*`, of classes `Test*`, unittest cases."""
    definitions = [node for node in tree.body if isinstance(node, (*FUNCTIONS, ast.ClassDef))]
    called = _called(node for node in tree.body if definitions and node not in definitions)
    unittest, result = sys.modules.get("unittest"), None
    if unittest:
        result = unittest.suite._DebugResult()  # remembers whose setUpClass has run, and raises
        result._testRunEntered = True
        sys.modules[MODULE].__dict__["setUpModule"] = dict.get(namespace, "setUpModule")
    for node in definitions:
        if isinstance(node, FUNCTIONS) and node.name not in called:
            function, required = namespace[node.name], _required(node)
            if (node.name == "check" and len(required) == 1) or required == ["candidate"]:
                yield node.name, partial(_run, function, namespace["candidate"])
            elif node.name.startswith("test") and not required:
                yield node.name, partial(_run, function)
            elif node.name.startswith("test") and not any(
                isinstance(part, ast.Name) and part.id == node.name for part in ast.walk(tree)
            ):
                raise Misuse(f"{node.name} needs the fixtures of pytest {', '.join(required)}")
        if isinstance(node, ast.ClassDef):
            found = namespace[node.name]
            if unittest and isinstance(found, type) and issubclass(found, unittest.TestCase):
                for case in unittest.defaultTestLoader.loadTestsFromTestCase(found):
                    parts = (case, getattr(case, case._testMethodName))
                    if not any(getattr(part, mark, None) for part in parts for mark in NOT_RUN):
                        run = partial(unittest.TestSuite([case]).run, result, True)
                        yield f"{node.name}.{case._testMethodName}", run
            elif (
                node.name.startswith("Test") and node.name not in called and found.__init__ is object.__init__
            ):
                yield from _methods(found)


def _methods(kind: type) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Those of a class for pytest and of its bases."""
    for name in dict.fromkeys(name for base in reversed(kind.__mro__) for name in vars(base)):
        if name.startswith("test") and callable(method := getattr(kind, name)):
            taken = [p.name for p in inspect.signature(method).parameters.values() if p.default is p.empty]
            if len(taken) > 1:
                raise Misuse(f"{name} needs the fixtures of pytest {taken[1:]}")
            yield f"{kind.__name__}.{name}", partial(_run_method, kind, name)


def _required(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    parameters = [argument.arg for argument in node.args.posonlyargs + node.args.args]
    return parameters[: len(parameters) - len(node.args.defaults)]


def _run(function: Callable[..., Any], *arguments: Any) -> None:
    if inspect.iscoroutine(result := function(*arguments)):
        asyncio.run(result)


def _run_method(kind: type, name: str) -> None:
    case = kind()
    for step in ("setup_class", "setup_method", name, "teardown_method", "teardown_class"):
        taken = inspect.signature(function := getattr(case, step, lambda: None)).parameters
        _run(function, *([getattr(case, name)] if taken and step != name else []))


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:MAX_DETAIL]
