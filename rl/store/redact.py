"""Removes from text what must not reach a screen or a file: secrets, and characters that mislead a reader."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

HIDDEN = "***"

# `token_budget`, `stop_token_ids`, `max_tokens` and `mask_token` are not secrets.
_SECRET_KEY = re.compile(
    r"(^|[_\-.])(?<!mask_)(?<!pad_)(?<!eos_)(?<!bos_)(?<!unk_)(?<!sep_)(?<!cls_)(?<!stop_)"
    r"(token(_secret|_value)?|(api|auth|access|hf)_?tokens|secrets?|passw(or)?ds?|passphrase|(api|access|private|secret|auth|account|"
    r"encryption|signing|hf|openai|anthropic|wandb)[_\-]?keys?|credentials?|authorization|bearer)$",
    re.IGNORECASE,
)
_names_secret = lru_cache(1024)(_SECRET_KEY.search)
_SECRET_TEXT = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_\-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16})\b"
    r"|((?<=://)|(?<=:/))[^/\s:@]*:[^/\s]+(?=@)"  # user:password@host of a URL, even of one read as a path
)
_SUSPECT = re.compile(r"[^ -~\n\t]")
_MARKS = ("hf_", "sk-", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "AKIA", "@")  # of what _SECRET_TEXT finds
# CSI, then the strings (OSC, DCS, SOS, PM, APC) with their terminators, then two-character escapes.
_ESCAPE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f]).*?(?:\x07|\x1b\\|\x9c)"
    r"|\x1b[ -/]*[0-~]",
    re.DOTALL,
)


def redact(value: Any, key: str = "") -> Any:
    """The value with `***` for secrets: under keys such as `api_key`, in URLs, tokens, in this environment.

    Mappings and lists are copied; types other than text are returned as they are.
    """
    if key and _SECRET_KEY.search(key) and value is not None:
        return HIDDEN
    if isinstance(value, Mapping):
        return {name: redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return _redact_text(value) if isinstance(value, str) else value


def _redact_text(text: str) -> str:
    for name in filter(_names_secret, os.environ):
        if len(secret := os.environ.get(name, "")) >= 8:
            text = text.replace(secret, HIDDEN)
    return _SECRET_TEXT.sub(HIDDEN, text) if any(mark in text for mark in _MARKS) else text


def safe_text(text: str) -> str:
    """Text of unknown origin for a terminal or a log: no secrets, no escapes, later lines indented."""
    return strip_controls(redact(text)).replace("\n", "\n    ")


def strip_controls(text: str) -> str:
    """Text that cannot steer a terminal: without escapes, control, bidi, zero-width and surrogate characters.

    Line feeds and tabs stay.
    """
    return "".join(c for c in _ESCAPE.sub("", text) if c in "\n\t" or not _misleads(c))


def show_controls(text: str) -> str:
    """Text that shows its control, bidi, zero-width and surrogate characters as numbers: ⟨U+202E⟩.

    Line feeds and tabs stay.
    """
    return _SUSPECT.sub(lambda m: f"⟨U+{ord(m[0]):04X}⟩" if _misleads(m[0]) else m[0], text)


def _misleads(character: str) -> bool:
    if character.isascii():
        return not character.isprintable()
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
