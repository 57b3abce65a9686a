"""The environment of grader processes: this process's, without secrets that text must not reach."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

KEEP = "COHORT_GRADER_ENV"
"""Names, separated by commas, of secret-looking variables that the graders of a run need all the same."""

_SECRET_PART = re.compile(
    "tokens?|secrets?|(?:api)?key|keys|password|passwd|passphrase|pwd|pass|credentials?|creds?|auth|authorization"
    "|bearer|cookie|jwt|pat|dsn"
)
_NO_SECRETS = {"PWD", "OLDPWD"}
_SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_\-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16})\b"
    r"|://[^/\s:@]*:[^/\s@]+@"  # scheme://user:password@host
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)


def grader_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables that a grader inherits: those whose name and value do not look like a secret.

    `COHORT_GRADER_ENV=OPENAI_API_KEY,HF_TOKEN` passes these on, for rewards that call a service.
    """
    given = os.environ if environment is None else environment
    kept = {name.strip() for name in given.get(KEEP, "").split(",")}
    return {name: value for name, value in given.items() if name in kept or not is_secret(name, value)}


def is_secret(name: str, value: str) -> bool:
    """Whether a variable looks like a secret; TOKENIZERS_PARALLELISM and KEYBOARD do not."""
    if name in _NO_SECRETS or name.endswith("PUBLIC_KEY"):
        return False
    parts = re.split(r"[_\W]+", name.lower())
    squeezed = name.lower().endswith(("token", "password", "secret", "apikey", "passwd"))
    return squeezed or any(map(_SECRET_PART.fullmatch, parts)) or _SECRET_VALUE.search(value) is not None
