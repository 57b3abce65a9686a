"""Partial credit for scripts of asserts: each `assert` becomes a test that does not end the script."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

PASSED, FAILED, ERROR = "__assert_holds__", "__assert_failed__", "__assert_error__"


class Sites:
    """Every assert of the tests, in source order: how often it ran and whether it always held."""

    def __init__(self) -> None:
        self.held: list[bool | None] = []  # None: not reached
        self.optional: list[bool] = []  # under an `if`, so that not reaching it is not a failure
        self.holders: set[str] = set()  # functions that hold some of these asserts
        self.num_crashes = 0  # crashes of test functions outside their asserts
        self.first_failure = ""

    def add(self, optional: bool) -> int:
        self.held.append(None)
        self.optional.append(optional)
        return len(self.held) - 1

    def names(self) -> dict[str, Any]:
        """The names that the rewritten tests call."""
        return {PASSED: self._holds, FAILED: self._failed}

    def _holds(self, site: int, value: Any) -> None:
        self.held[site] = bool(value) and self.held[site] is not False
        if not self.held[site]:
            self.first_failure = self.first_failure or f"assert {site} does not hold"

    def _failed(self, site: int, error: Exception) -> None:
        self.held[site] = False
        self._note(f"assert {site}", error)

    def _note(self, what: str, error: Exception) -> None:
        self.first_failure = self.first_failure or f"{what}: {type(error).__name__}: {error}"

    def attempt(self, name: str, run: Callable[[], Any]) -> None:
        """Runs a test function. It counts as one test if none of its asserts does, or if it raises."""
        try:
            run()
        except Exception as error:
            if name in self.holders:
                self.num_crashes += 1
                self._note(name, error)
            else:
                self._failed(self.add(False), error)
            return
        if name not in self.holders:
            self.held[self.add(False)] = True

    def results(self, aborted: bool) -> list[bool | None]:
        """One per test, then a failure per crash. Unreached: failed; None under an `if` of a whole run."""
        sites = zip(self.held, self.optional, strict=True)
        held = [None if h is None and optional and not aborted else h is True for h, optional in sites]
        return [*held, *[False] * (self.num_crashes + aborted)]


def soften(body: list[ast.stmt], sites: Sites, optional: bool = False) -> list[ast.stmt]:
    """Rewrites asserts, but not in classes or under `try` and `with`, where failing is control flow."""
    return [_softened(node, sites, optional) for node in body]


def _softened(node: ast.stmt, sites: Sites, optional: bool) -> ast.stmt:
    if isinstance(node, ast.Assert):
        return _site(node, sites.add(optional))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        num_before = len(sites.held)
        node.body = soften(node.body, sites, optional)
        if len(sites.held) > num_before:
            sites.holders.add(node.name)
    elif isinstance(node, ast.For | ast.AsyncFor | ast.While):
        node.body = soften(node.body, sites, optional)
        node.orelse = soften(node.orelse, sites, optional)
    elif isinstance(node, ast.If):
        node.body = soften(node.body, sites, True)
        node.orelse = soften(node.orelse, sites, True)
    return node


def _site(node: ast.Assert, number: int) -> ast.stmt:
    """`try: holds(number, test)`, `except Exception as error: failed(number, error)`."""

    def call(name: str, value: ast.expr) -> ast.stmt:
        return ast.Expr(ast.Call(ast.Name(name, ast.Load()), [ast.Constant(number), value], []))

    failed = call(FAILED, ast.Name(ERROR, ast.Load()))
    handler = ast.ExceptHandler(ast.Name("Exception", ast.Load()), ERROR, [failed])
    guarded = ast.Try([call(PASSED, node.test)], [handler], [], [])
    return ast.fix_missing_locations(ast.copy_location(guarded, node))
