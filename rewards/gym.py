"""reasoning-gym's own scoring. The column `entry` holds its entry (question, answer, metadata)."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rewards.completion import completion_text
from rewards.format import answer_part, braced
from rl.types import Reason, Reward

# reasoning-gym hands answers to these tasks to eval() or sympy.parse_expr(), which run Python. What passes
# can call nothing but an elementary function, reach no attribute, and raise nothing to a power of a power.
_NAME = (
    r"(?<![A-Za-z_0-9.])(?:sqrt|exp|log|ln|a?sin|a?cos|a?tan|sinh|cosh|tanh|sec|csc|cot|pi|[A-Za-z])"
    r"(?![A-Za-z_0-9])"
)
_POWER = r"\*\*\s*(?:\d{1,2}|[a-z]|\(\s*-?\d{1,2}(?:\s*/\s*\d{1,2})?\s*\))(?![\w.])(?!\s*\*\*)"
_SIGNS = r"[-+/()\s\d]|\*(?!\*)|(?<=\d)\.(?=\d)"
ARITHMETIC = re.compile(rf"(?:{_SIGNS})*+")
ALGEBRA = re.compile(rf"(?:{_POWER}|{_SIGNS}|{_NAME})*+")
LIST = re.compile(r"(?:[\w\s,\-+#:|'\"\[\]]|(?<=\d)\.(?=\d))*+")
ALLOWED = {
    **dict.fromkeys(("countdown", "puzzle24"), ARITHMETIC),
    **dict.fromkeys(("simple_integration", "intermediate_integration", "polynomial_multiplication"), ALGEBRA),
    **dict.fromkeys(("string_insertion", "spiral_matrix", "binary_matrix", "n_queens"), LIST),
}
ANYTHING = re.compile(".*", re.DOTALL)
MAX_ANSWER_CHARS = 10_000


class ReasoningGym:
    """Score of reasoning-gym for the answer found in a completion, in 0..1.

    Args:
        strict: only a full score counts. Many tasks give partial credit for an answer that merely contains
            the right one, so a list of guesses pays, and 0.01 for no answer; strict=False keeps it.
        answer_in: "tag" (the last <answer>...</answer>), "box" (the last \\boxed{...}), "text" (all after any
            think block), or "auto": the first of these that is present.
    """

    def __init__(self, strict: bool = True, answer_in: str = "auto") -> None:
        if answer_in not in ("auto", "tag", "box", "text"):
            raise ValueError(f"reasoning_gym: answer_in={answer_in!r} must be auto, tag, box or text")
        # The import takes 3 s, so it happens when the pool starts and not in a call.
        from reasoning_gym.factory import DATASETS, get_score_answer_fn

        self.strict, self.answer_in, self.tasks = strict, answer_in, DATASETS
        self.scorer_of: Callable[[str], Any] = functools.cache(get_score_answer_fn)

    def __call__(self, completions: Sequence[Any], entry: Sequence[Mapping[str, Any]]) -> list[Reward]:
        pairs = zip(completions, entry, strict=True)
        return [self._grade(completion_text(completion), row) for completion, row in pairs]

    def _grade(self, text: str, entry: Mapping[str, Any]) -> Reward:
        task = entry.get("metadata", {}).get("source_dataset")
        if task not in self.tasks or "answer" not in entry:
            return Reward(
                None, Reason.BAD_GOLD, f"entry names an unknown task of reasoning-gym: {task!r:.60}"
            )
        form = ALLOWED.get(task, ANYTHING)
        if not form.fullmatch(str(entry["answer"])):
            detail = f"the entry's own answer cannot be scored: {entry['answer']!r:.60}"
            return Reward(None, Reason.BAD_GOLD, detail)
        try:
            answer = find_answer(text, self.answer_in)
        except ValueError as error:
            reason = Reason.TRUNCATED if "never closed" in str(error) else Reason.NO_ANSWER
            return Reward(0.0, reason, str(error))
        if len(answer) > MAX_ANSWER_CHARS or not form.fullmatch(answer):
            return Reward(0.0, Reason.FORBIDDEN, f"an answer to {task} does not have this form", answer)
        score = float(self.scorer_of(task)(answer=answer, entry=entry))
        if self.strict:
            score = float(score >= 1)
        reason = Reason.CORRECT if score >= 1 else Reason.WRONG_ANSWER if score <= 0 else Reason.SCORED
        return Reward(score, reason, extracted=answer)


def find_answer(text: str, answer_in: str = "auto") -> str:
    """The answer in a completion, found as `answer_in` says, after any think block.

    Raises:
        ValueError: there is no answer, or it is cut off.
    """
    text = answer_part(text)
    opening, box = text.rfind("<answer>"), text.rfind("\\boxed{")
    if answer_in == "tag" or (answer_in == "auto" and opening >= 0):
        closing = text.find("</answer>", opening)
        if opening < 0 or closing < 0:
            raise ValueError("<answer> is never closed" if opening >= 0 else "no <answer>")
        answer = text[opening + len("<answer>") : closing]
    elif answer_in == "box" or (answer_in == "auto" and box >= 0):
        if box < 0:
            raise ValueError("no \\boxed{")
        answer = braced(text, box + len("\\boxed"))
    else:
        answer = text
    if not answer.strip():
        raise ValueError("no answer")
    return answer.strip()
