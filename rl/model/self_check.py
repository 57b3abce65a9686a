"""Checks that a fast path computes what the plain one does, before it is used."""

from __future__ import annotations

import warnings
from collections.abc import Callable


def reproduces(name: str, gap: Callable[[], float], limit: float) -> bool:
    """Whether `gap()`, the difference of a fast path from the plain one, is below `limit`.

    If it is not, or cannot be measured, a warning gives the reason.
    """
    try:
        found = gap()
        reason = None if found < limit else f"it differs by {found:.2g} from plain torch"
    except Exception as error:  # a compiler, a driver or a private operator may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
    if reason is not None:
        warnings.warn(f"{name} is off, plain torch is slower: {reason}", stacklevel=3)
    return reason is None
