"""The list of slow tests names tests that exist."""

from __future__ import annotations

import ast
from pathlib import Path

HERE = Path(__file__).parent


def test_every_slow_test_of_the_list_exists() -> None:
    """A name may be the beginning of several; parameters are left to pytest."""
    lines = (HERE / "rotated.txt").read_text(encoding="utf-8").splitlines()
    named = [line for line in lines if line and not line.startswith("#")]
    assert named == sorted(named)
    for line in named:
        file, _, test = line.partition("::")
        tree = ast.parse((HERE.parent / file).read_text(encoding="utf-8"))
        functions = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        assert any(name.startswith(test.partition("[")[0]) for name in functions), line
