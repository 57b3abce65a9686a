"""Phrases that read as a translation do not come back (STYLE.md, English)."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1]
INSTEAD = {
    # "there is no file" and "is no longer" are English.
    r"(?<!there )\b(?:is|are|was|were) no (?!longer\b|more\b|less\b|slower\b|one\b)[a-z]+": "is not a",
    r"\bin the mean\b": "on average",
    r"\bbut for\b": "except for",
    r", that is none\b": "a malformed ...",
}


@pytest.mark.parametrize(("phrase", "instead"), INSTEAD.items())
def test_no_text_of_ours_says(phrase: str, instead: str) -> None:
    """In code, comments, messages and pages alike."""
    names = subprocess.run(
        ["git", "ls-files", "*.py", "*.md", "*.yaml", "*.j2"], cwd=HOUSE, capture_output=True, text=True
    ).stdout.split()
    texts = [(name, (HOUSE / name).read_text(encoding="utf-8")) for name in names]
    found = [
        f"{name}:{text.count(chr(10), 0, m.start()) + 1}: {m[0]!r}; say {instead!r}"
        for name, text in texts
        for m in re.finditer(phrase, text, re.I)
        if (HOUSE / name) != Path(__file__)
    ]
    assert len(names) > 300
    assert not found
