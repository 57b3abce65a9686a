"""Finds the block of code in a completion that is graded."""

from __future__ import annotations

import re

from rl.types import Reason

# Tags of a fence per language; the first is its name.
TAGS: dict[str, tuple[str, ...]] = {
    "python": ("python", "python3", "py", "py3"),
    "c": ("c",),
    "cpp": ("cpp", "c++", "cc", "cxx"),
    "javascript": ("javascript", "js", "node"),
}
# Possessive: a long line that is not a fence takes linear, not cubic, time.
FENCE = re.compile(r"^[ \t]{0,3}(`{3,}+|~{3,}+)[ \t]*+([\w+#.-]*+)[^`\n]*+$", re.MULTILINE)


def extract_code(text: str, language: str) -> tuple[str | None, Reason]:
    """The last fenced block in `language`, else the last untagged block, else a whole text without fences.

    Only the text after the last `</think>` counts. Without a block, the reason is NO_ANSWER, or TRUNCATED
    inside `<think>`.
    """
    text = text.replace("\r\n", "\n").rpartition("</think>")[2]
    if text.lstrip().startswith("<think>"):
        return None, Reason.TRUNCATED
    blocks = _blocks(text)
    if blocks is None:
        return (text, Reason.SCORED) if text.strip() else (None, Reason.NO_ANSWER)
    for wanted in (TAGS[language], ("",)):
        found = [code for tag, code in blocks if tag.lower() in wanted and code.strip()]
        if found:
            return found[-1], Reason.SCORED
    return None, Reason.NO_ANSWER


def _blocks(text: str) -> list[tuple[str, str]] | None:
    """(tag, content) of each fenced block; None without any. The next tag or the end closes an open block."""
    fences = list(FENCE.finditer(text))
    if not fences:
        return None
    untagged = all(not fence[2] for fence in fences)
    blocks: list[tuple[str, str]] = []
    # An odd number of bare fences: the prompt opened the first block.
    marker, tag, start = ("```", "", 0) if untagged and len(fences) % 2 else ("", "", 0)
    for fence in fences:
        closes = marker and not fence[2] and fence[1].startswith(marker)
        if marker and not closes and not fence[2]:
            continue  # a shorter or different fence inside the block
        if marker:
            blocks.append((tag, text[start : fence.start()]))
        marker, tag, start = ("", "", 0) if closes else (fence[1], fence[2], fence.end() + 1)
    if marker:
        blocks.append((tag, text[start:]))
    return blocks
