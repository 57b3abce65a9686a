"""The list of slow tests names tests and marks that exist, and is dealt as a whole into even parts."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

from tests.conftest import ROTATED, dealt

HOUSE = Path(__file__).parents[1]
LINES = [line for line in ROTATED.read_text(encoding="utf-8").splitlines() if line[:1] not in ("", "#")]


def test_every_slow_test_of_the_list_exists() -> None:
    """A name may be the beginning of several; parameters are left to pytest."""
    assert not [(a, b) for i, a in enumerate(LINES) for b in LINES[:i] + LINES[i + 1 :] if b.startswith(a)]
    for line in LINES:
        file, _, test = line.partition("::")
        file, _, mark = file.partition(" ")
        text = (HOUSE / file).read_text(encoding="utf-8")
        functions = [node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        assert any(name.startswith(test.partition("[")[0]) for name in functions), line
        near = (path.read_text(encoding="utf-8") for path in (HOUSE / file).parent.glob("*.py"))
        assert not mark or any(f'pytest.mark.rotation("{mark}")' in text for text in near), line


def test_parts_are_even_and_together_all() -> None:
    assert dealt("abbcdefgh", 3) == dict(zip("abcdefgh", (0, 1, 2, 2, 1, 0, 0, 1), strict=True))
    assert set(dealt(LINES, 1).values()) == {0}
    for n in (2, 6):
        counts = Counter(dealt(LINES, n).values())
        assert sorted(counts) == list(range(n)) and max(counts.values()) - min(counts.values()) <= 2
