"""Language consistency of DeepSeek-R1: the share of a completion's words that are in the target language.

Languages are told apart by their script, because mixed-language thoughts mix scripts. Languages that share a
script (English and French) count as the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rewards.completion import completion_text
from rl.types import Reason, Reward

LATIN = "A-Za-z\u00aa\u00b5\u00ba\u00c0-\u024f\u1e00-\u1eff\ufb00-\ufb06"
HAN, KANA = "\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003134f", "\u3040-\u30ff\u31f0-\u31ff"
HANGUL, CYRILLIC, GREEK = "\u1100-\u11ff\uac00-\ud7af", "\u0400-\u052f", "\u0370-\u03ff\u1f00-\u1fff"
ARABIC, HEBREW = "\u0600-\u06ff\u0750-\u077f", "\u0590-\u05ff"
DEVANAGARI, BENGALI, TAMIL, THAI = "\u0900-\u097f", "\u0980-\u09ff", "\u0b80-\u0bff", "\u0e00-\u0e7f"
SCRIPTS = {
    **dict.fromkeys(["en", "fr", "de", "es", "it", "pt", "nl", "pl", "sv", "tr", "vi", "id"], LATIN),
    **dict.fromkeys(["ru", "uk", "bg", "sr"], CYRILLIC),
    **dict.fromkeys(["ar", "fa", "ur"], ARABIC),
    **dict.fromkeys(["hi", "mr", "ne"], DEVANAGARI),
    **{"zh": HAN, "ja": HAN + KANA, "ko": HANGUL, "el": GREEK, "he": HEBREW, "bn": BENGALI, "ta": TAMIL},
    "th": THAI,
}
UNSPACED = HAN + KANA + THAI
WORD = re.compile(rf"[{UNSPACED}]|(?:(?![{UNSPACED}\d_])\w)+")
NEUTRAL = re.compile(r"```.*?```|\\[A-Za-z]+|</?[a-z]+>|https?://\S+", re.DOTALL)


class LanguageConsistency:
    """Words in the target language / words (DeepSeek-R1, arXiv:2501.12948, section 2.3.2), in 0..1.

    A word is a run of letters, which all must be of the target's script; in scripts without spaces each
    character is a word. Numbers, LaTeX commands, tags and code fences do not count. A completion without
    words scores 0. Greek letters count as Greek words, in formulas too.
    """

    def __init__(self, language: str = "en") -> None:
        if language not in SCRIPTS:
            known = ", ".join(SCRIPTS)
            raise ValueError(f"language_consistency: language={language!r} is unknown; use one of {known}")
        self.of_target = re.compile(f"[{SCRIPTS[language]}]")
        others = {*SCRIPTS.values(), KANA} - {HAN + KANA}
        self.of_another = re.compile(f"[{''.join(each for each in others if each not in SCRIPTS[language])}]")

    def __call__(self, completions: Sequence[Any]) -> list[Reward]:
        return [self._score(completion_text(completion)) for completion in completions]

    def _score(self, text: str) -> Reward:
        words = WORD.findall(NEUTRAL.sub(" ", text))
        if not words:
            return Reward(0.0, Reason.NO_ANSWER, "no words")
        foreign = [word for word in words if not self.of_target.match(word) or self.of_another.search(word)]
        share = (len(words) - len(foreign)) / len(words)
        return Reward(share, Reason.SCORED, f"other words: {' '.join(foreign[:5])}" if foreign else "")
