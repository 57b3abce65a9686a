"""When an output or a value counts as the expected one."""

from __future__ import annotations

from typing import Any


def same_output(actual: str, expected: str, tolerance: float = 0.0) -> bool:
    """Equal line by line, but for white space at the ends of lines and empty lines at the end; numbers
    within `tolerance`.
    """
    lines = [[line.rstrip() for line in text.rstrip().splitlines()] for text in (actual, expected)]
    if lines[0] == lines[1]:
        return True
    if tolerance <= 0 or len(lines[0]) != len(lines[1]):
        return False
    return all(_same_line(a.split(), b.split(), tolerance) for a, b in zip(*lines, strict=True))


def _same_line(actual: list[str], expected: list[str], tolerance: float) -> bool:
    if len(actual) != len(expected):
        return False
    for a, b in zip(actual, expected, strict=True):
        if a != b:
            try:
                if not abs(float(a) - float(b)) <= tolerance * max(1.0, abs(float(b))):
                    return False
            except ValueError:
                return False
    return True


def same_value(value: Any, expected: Any, tolerance: float) -> bool:
    """Equality of plain data: sequences by their items, numbers within `tolerance`, absolute or relative."""
    if isinstance(expected, list):
        if not isinstance(value, list | tuple) or len(value) != len(expected):
            return False
        return all(same_value(a, b, tolerance) for a, b in zip(value, expected, strict=True))
    if isinstance(expected, dict) and isinstance(value, dict):
        renamed = {str(key): item for key, item in value.items()}
        return renamed.keys() == expected.keys() and all(
            same_value(renamed[key], item, tolerance) for key, item in expected.items()
        )
    if isinstance(expected, bool) or isinstance(value, bool):
        return value is expected
    if isinstance(expected, int | float) and isinstance(value, int | float):
        return value == expected or (
            isinstance(value + 0.0, float) and abs(value - expected) <= tolerance * max(1.0, abs(expected))
        )
    return type(value) is type(expected) and value == expected
