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
    r'^\s*"""(?:Of|Behind) [a-z]': "name the thing",
    r"\bmend(?:s|ed|ing)?\b": "fix",
    r"\bbehind (?:the (?:prompt|token|call|turn|completion|header|end))\b": "after",
    r"\bbelongs into\b": "belongs in",
    r"\b(?:computes?|names?|labels?) otherwise\b|\botherwise than\b": "differently",
    r"\bin silence\b|\bwithout a word\b": "silently",
    r"\bof the user's\b": "the user's ...",
    r"\bdata sets?\b": "dataset",
    r"\b(?:what|who) became of\b": "how ... ended",
    r"\b(?:lest|in vain|by right|of late|as ever|not any more|let go again|none of the two)\b": "plain words",
    r"\b(?:counts? in nothing|leads? nowhere|as a kill would|from which on|up to which)\b": "name the thing",
    r"\b(?:is taken for|is not to be|gives? way)\b": "is read as, must not be, is dropped",
    # "each of which", "81 s, of which 50.9 are imports" are English.
    r"(?<!each )(?<!some )(?<!all )\bof which (?:the|a|an|its|every|none|one|another|there|those)\b": "whose",
    r"\b(?:with|of|on|a) so many (?!that\b)[a-z]+": "that many",
    r"\bbehind (?:its|these|those|what|a prompt|prompts|contexts|all of)\b": "after",
    r"\b(?:reckon|another pair of|in the second place|nothing of the gain|gone? on with)\b": "plain words",
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
        for m in re.finditer(phrase, text, re.I | re.M)
        if (HOUSE / name) != Path(__file__)
    ]
    assert len(names) > 300
    assert not found
