"""Reads files that somebody else may have written: regular files only, and never more than was asked for."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from io import BufferedIOBase, BufferedReader
from pathlib import Path
from typing import Any, TypeGuard


def open_regular(path: str | Path) -> BufferedReader:
    """Opens a file for reading; never waits for a pipe, and never reads a device.

    Raises:
        OSError: it is missing, cannot be read, or is not a regular file.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def read_at_most(path: str | Path, max_bytes: int) -> bytes:
    """The whole file.

    Raises:
        OSError: see `open_regular`.
        ValueError: it is larger than `max_bytes`.
    """
    with open_regular(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"larger than {max_bytes >> 10:,} KiB")
    return data


def bounded_lines(file: BufferedIOBase, max_bytes: int) -> Iterator[bytes | None]:
    """The lines of a file without their ends; None in place of one that is longer than `max_bytes`.

    The rest of such a line is read only if another line is asked for.
    """
    while line := file.readline(max_bytes + 2):
        if line.endswith(b"\n"):
            yield line[:-1]
        elif len(line) <= max_bytes:
            yield line  # the last line, perhaps half written
        else:
            yield None
            while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
                pass


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a number that arithmetic can handle: finite, and far from the ends of a float's range."""
    return type(value) in (int, float) and -1e100 <= value <= 1e100


def is_nested_beyond(value: Any, max_depth: int) -> bool:
    """Whether a list or dict holds others more than `max_depth` deep."""
    level = [value]
    for _ in range(max_depth):
        items = (part.values() if isinstance(part, dict) else part for part in level)
        level = [item for parts in items for item in parts if isinstance(item, dict | list)]
    return bool(level)


def plain_tree(value: Any, max_depth: int = 32, max_values: int = 20_000) -> Any:
    """A copy of text, numbers, lists and dicts with text keys only; other values become their text.

    Raises:
        ValueError: it is nested too deeply, or holds too many values; an alias counts each time it occurs.
    """
    left = max_values

    def copy(part: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth < 0:
            raise ValueError("nested too deeply" if depth < 0 else f"more than {max_values:,} values")
        if isinstance(part, dict):
            return {str(name): copy(item, depth - 1) for name, item in part.items()}
        if isinstance(part, list | tuple | set):
            return [copy(item, depth - 1) for item in part]
        if isinstance(part, int):
            return part if abs(part) < 1 << 63 else hex(part)[:100]
        return part if part is None or isinstance(part, str | float) else str(part)[:100]

    return copy(value, max_depth)
