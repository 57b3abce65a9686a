"""Finds the block of code in a completion that is graded."""

from __future__ import annotations

import re

from rl.types import Reason

# Tags of a fence per language, without a version; the first is its name.
TAGS: dict[str, tuple[str, ...]] = {
    "python": ("python", "py"),
    "c": ("c",),
    "cpp": ("cpp", "c++", "cc", "cxx"),
    "javascript": ("javascript", "js", "node"),
}
# In a list or a quotation, too. Possessive: a long line that is not a fence takes linear, not cubic, time.
FENCE = re.compile(
    r"^([ \t>]*+(?:(?:[-*+]|\d{1,9}[.)])[ \t]++)?+)(?:[^`\n~]*+(?=```[a-z]))?+"
    r"(`{3,}+|~{3,}+)[ \t]*+([\w+#.-]*+)[^`\n]*+$",
    re.MULTILINE | re.IGNORECASE,
)
VERSION = re.compile(r"[\d.]+$")


def extract_code(text: str, language: str) -> tuple[str | None, Reason]:
    """The last fenced block in `language`, else the last untagged block, else a whole text without fences.

    Only the text after the last `</think>` counts, without <answer> around it. Without a block, the reason is
    NO_ANSWER, or TRUNCATED inside `<think>`.
    """
    text = text.replace("\r\n", "\n").rpartition("</think>")[2]
    if re.search(r"(?<![`'\"])<think>", text.partition("```")[0]):
        return None, Reason.TRUNCATED
    text = text.strip().removeprefix("<answer>").removesuffix("</answer>") if "<answer>" in text else text
    blocks = fenced_blocks(text, from_prompt=True)
    if not blocks:
        return (text, Reason.SCORED) if text.strip() else (None, Reason.NO_ANSWER)
    for wanted in (TAGS[language], ("",)):
        found = [code for tag, code, _ in blocks if tag in wanted and code.strip()]
        if found:
            return found[-1], Reason.SCORED
    return None, Reason.NO_ANSWER


def fenced_blocks(text: str, *, from_prompt: bool = False) -> list[tuple[str, str, bool]]:
    """(tag without its version, content, is closed) of each fenced block; the next tag ends an open one.

    Args:
        from_prompt: of an odd number of bare fences, the first closes a block that the prompt opened.
    """
    fences = [fence for fence in FENCE.finditer(text) if fence[3] or not fence[1].strip(" \t>")]
    outer = [bool(fence[3]) or len(fence[1]) < 4 for fence in fences]  # an indented bare fence opens nothing
    bare = from_prompt and sum(outer) % 2 and not any(fence[3] for fence in fences)
    blocks: list[tuple[str, str, bool]] = []
    marker, tag, start, indent = "```" if bare else "", "", 0, ""
    for fence, opens in zip(fences, outer, strict=True):
        closes = marker and not fence[3] and fence[2].startswith(marker) and len(fence[1]) < len(indent) + 4
        is_inside = marker and (not fence[3] or len(fence[1]) >= len(indent) + 4)
        if not closes and (not opens or is_inside):
            continue  # a shorter, different or indented fence inside the block
        if marker:
            blocks.append((tag, _without_indent(text[start : fence.start()], indent), bool(closes)))
        marker, start, indent = "" if closes else fence[2], fence.end() + 1, fence[1]
        tag = VERSION.sub("", fence[3].casefold())
    if marker:
        content = re.split(r"(?<=\S)```[ \t]*$", text[start:], maxsplit=1, flags=re.MULTILINE)[0]
        blocks.append((tag, _without_indent(content, indent), False))
    return blocks


def _without_indent(code: str, indent: str) -> str:
    """The lines of a block without what stands before its fence: the indentation of a list, or ">"."""
    marks = r"[ \t>]" if ">" in indent else r"[ \t]"
    return re.sub(rf"^{marks}{{1,{len(indent)}}}", "", code, flags=re.MULTILINE) if indent else code
