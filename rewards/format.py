r"""Rewards for the form of a completion: think block, <think>/<answer>, tag count, \boxed{...}, code fence.

Each is 1 for a well-formed completion, else 0 (tag count: quarters), in linear time. Text that a reader takes
for a tag (other case, blanks or invisible characters inside, full-width brackets) counts as a surplus tag.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from rewards.code.extract import TAGS, VERSION, fenced_blocks
from rewards.completion import completion_text
from rewards.math.boxes import closing_brace
from rewards.math.extract import extract
from rewards.math.lex import lex
from rewards.math.text import clean
from rewards.math.tree import MathError
from rl.types import Reason, Reward

_UNSEEN = (  # white space, controls, joiners, direction marks, fillers, variation selectors, tag characters
    "\\s\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\U000e0000-\U000e0fff"
)
UNSEEN, SEEN = re.compile(f"[{_UNSEEN}]+"), re.compile(f"[^{_UNSEEN}]")
FORM_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
OPEN_R1_TAGS = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")


def is_blank(text: str) -> bool:
    """Whether nothing of a text is visible: it holds only white space, format and filler characters."""
    return SEEN.search(text) is None


def split_think(text: str, *, open_in_prompt: bool = False) -> tuple[str, str]:
    """(thought, rest) of a completion that starts with exactly one closed, non-empty <think> block.

    Args:
        open_in_prompt: the chat template ends the prompt with `<think>`, so the completion starts inside the
            block.

    Raises:
        ValueError: the form is broken; the message says how.
    """
    text = ("<think>" + text if open_in_prompt else text).lstrip()
    _check_tags(text, "think")
    if not text.startswith("<think>"):
        raise ValueError("text before <think>")
    thought, closing, rest = text[len("<think>") :].partition("</think>")
    if not closing:
        raise ValueError("</think> before <think>")
    if is_blank(thought):
        raise ValueError("nothing inside <think>")
    return thought, rest


def _check_tags(text: str, *names: str) -> None:
    """Raises ValueError unless each tag occurs once and nothing else looks like one."""
    for name in names:
        for tag in (f"<{name}>", f"</{name}>"):
            if (count := text.count(tag)) != 1:
                raise ValueError(f"{tag} occurs {count} times" if count else f"no {tag}")
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    if plain.count("<") == sum(text.count(tag) for tag in FORM_TAGS):
        return  # every bracket belongs to a proper tag
    shown = UNSEEN.sub("", plain).casefold()
    for name in names:
        for tag in (f"<{name}>", f"</{name}>", f"<{name}/>"):
            if shown.count(tag) != (not tag.endswith("/>")):
                raise ValueError(f"something that looks like {tag} but is not")


def think_format(completions: Sequence[Any], *, open_in_prompt: bool = False, **columns: Any) -> list[Reward]:
    """1 if the completion is one closed, non-empty <think> block followed by visible text."""
    return [_verdict(_check_think, completion, open_in_prompt) for completion in completions]


def _check_think(text: str, open_in_prompt: bool) -> str:
    _, answer = split_think(text, open_in_prompt=open_in_prompt)
    if is_blank(answer):
        raise ValueError("nothing after </think>")
    return answer.strip()


def think_answer_format(
    completions: Sequence[Any], *, open_in_prompt: bool = False, **columns: Any
) -> list[Reward]:
    """1 if the completion is <think>...</think><answer>...</answer>, both non-empty (DeepSeek-R1, table 1).

    White space may surround the tags. Any other text outside them, or a second tag anywhere, breaks the form.
    """
    return [_verdict(_check_think_answer, completion, open_in_prompt) for completion in completions]


def _check_think_answer(text: str, open_in_prompt: bool) -> str:
    _, rest = split_think(text, open_in_prompt=open_in_prompt)
    _check_tags(text, "answer")
    rest = rest.strip()
    if not rest.startswith("<answer>"):
        between = "text between </think> and <answer>"
        raise ValueError(between if "<answer>" in rest else "<answer> inside <think>")
    if not rest.endswith("</answer>"):
        raise ValueError("text after </answer>")
    answer = rest[len("<answer>") : -len("</answer>")]
    if is_blank(answer):
        raise ValueError("nothing inside <answer>")
    return answer.strip()


def tag_count(completions: Sequence[Any], **columns: Any) -> list[Reward]:
    """0.25 for each of open-r1's four tags, with their newlines, that occurs exactly once."""
    texts = [completion_text(completion) for completion in completions]
    return [Reward(sum(0.25 for tag in OPEN_R1_TAGS if text.count(tag) == 1)) for text in texts]


def answer_part(text: str) -> str:
    """The text after the last </think>, or the whole text if there is no think block.

    Raises:
        ValueError: a <think> is never closed, so the completion was cut off before its answer.
    """
    answer = text.rpartition("</think>")[2]
    if "<think>" in answer:
        raise ValueError("<think> is never closed")
    return answer


def boxed_format(completions: Sequence[Any], **columns: Any) -> list[Reward]:
    r"""1 if the last \boxed{...} that the math grader reads is closed and holds visible text."""
    return [_verdict(_check_boxed, completion) for completion in completions]


def _check_boxed(text: str) -> str:
    found = extract(answer_part(text), "boxed")
    if not found.answers:
        raise ValueError(found.detail)
    if is_blank("".join(map(_shown, found.answers))):
        raise ValueError("nothing inside \\boxed{}")
    return ", ".join(found.answers)


def _shown(answer: str) -> str:
    """What a reader sees of a formula: not its spaces, styles and phantoms."""
    try:
        return "".join(raw for _, _, raw in lex(clean(answer)) if raw not in "{}")
    except MathError:
        return answer


def braced(text: str, start: int) -> str:
    r"""The text between the brace at `start` and its partner; `\{` and `\}` do not count as braces.

    Raises:
        ValueError: the brace is never closed.
    """
    end = closing_brace(text, start)
    if end is None:
        raise ValueError("\\boxed{ is never closed")
    return text[start + 1 : end]


def code_format(completions: Sequence[Any], *, language: str = "python", **columns: Any) -> list[Reward]:
    """1 if the answer has a closed, non-empty fence that the code grader takes for `language` ("": any)."""
    return [_verdict(_check_code, completion, language) for completion in completions]


def _check_code(text: str, language: str) -> str:
    blocks = fenced_blocks(answer_part(text))
    if blocks and not blocks[-1][2]:
        raise ValueError("a code fence is never closed")
    tags = TAGS.get(name := VERSION.sub("", language.casefold()), (name,))
    for tag, code, _ in reversed(blocks):
        if (not language or tag in tags) and not is_blank(code):
            return code
    raise ValueError(f"no non-empty ```{language} fence")


def _verdict(check: Any, completion: Any, *arguments: Any) -> Reward:
    try:
        extracted = check(completion_text(completion), *arguments)
    except ValueError as error:
        return Reward(0.0, Reason.FORMAT, str(error))
    return Reward(1.0, Reason.SCORED, extracted=extracted)
