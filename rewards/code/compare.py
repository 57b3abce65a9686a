"""When an output or a value counts as the expected one."""

from __future__ import annotations

import itertools
import math
from typing import Any


def same_output(actual: str, expected: str, tolerance: float = 0.0) -> bool:
    """Whether lines agree, ignoring blanks at their ends and empty last lines; numbers within `tolerance`."""
    lines = [[line.rstrip() for line in text.rstrip().split("\n")] for text in (actual, expected)]
    if lines[0] == lines[1]:
        return True
    if tolerance <= 0 or len(lines[0]) != len(lines[1]):
        return False
    words = [(a.split(), b.split()) for a, b in zip(*lines, strict=True)]
    pairs = (pair for a, b in words for pair in itertools.zip_longest(a, b, fillvalue=""))
    return all(a == b or _close(_number(a), _number(b), tolerance) for a, b in pairs)


def _number(text: str) -> float:
    """NaN for a text that is not a number; 1e999 is not an infinity."""
    try:
        value = int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        return math.nan
    is_odd = "_" in text or not text.isascii() or (abs(value) == math.inf and text[-1].isdigit())
    return math.nan if is_odd else value


def _close(value: Any, expected: Any, tolerance: float) -> bool:
    """Whether numbers agree within `tolerance`, absolute or relative; two integers and infinities exactly."""
    if value == expected or type(value) is type(expected) is int:
        return value == expected
    try:
        difference, size = abs(value - expected), abs(expected)
        return difference < math.inf and size < math.inf and difference <= tolerance * max(1.0, size)
    except OverflowError:  # integers too large for a float
        return False


def same_value(value: Any, expected: Any, tolerance: float) -> bool:
    """Whether plain data is equal: sequences item by item, numbers within `tolerance`."""
    if isinstance(expected, list):
        if not isinstance(value, list | tuple) or len(value) != len(expected):
            return False
        return all(same_value(a, b, tolerance) for a, b in zip(value, expected, strict=True))
    if isinstance(expected, dict) and isinstance(value, dict):
        renamed = {str(key): item for key, item in value.items()}
        same_keys = renamed.keys() == expected.keys() and len(value) == len(renamed)
        return same_keys and all(same_value(renamed[k], item, tolerance) for k, item in expected.items())
    if isinstance(expected, bool) or isinstance(value, bool):
        return value is expected
    if type(expected) in (int, float) and type(value) in (int, float):
        return _close(value, expected, tolerance)
    return type(value) is type(expected) and value == expected
