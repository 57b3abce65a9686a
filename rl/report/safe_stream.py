"""A text stream that never raises, and what it can show: is a person watching, which characters work."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any


class SafeStream:
    """A text stream whose writes never raise: a broken pipe silences it, unknown characters become "?"."""

    def __init__(self, stream: Any) -> None:
        self._stream = self.inner = stream
        self._is_broken = stream is None

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        try:
            return bool(self._stream.isatty())
        except (AttributeError, ValueError, OSError):
            return False

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str, /) -> int:
        self._try(lambda: self._stream.write(_encodable(text, self.encoding)))
        return len(text)

    def flush(self) -> None:
        self._try(lambda: self._stream.flush())

    def _try(self, action: Callable[[], Any]) -> None:
        if self._is_broken:
            return
        try:
            action()
        except (BrokenPipeError, ValueError):  # ValueError: the file is closed
            self._is_broken = True
            _lead_nowhere(self._stream)
        except OSError:
            pass  # a full disk under a redirected stdout: this line is lost


def say(text: str, stream: Any = None) -> None:
    """Writes a line to a stream, by default standard output; it is lost, without an error, if that fails."""
    safe = SafeStream(sys.stdout if stream is None else stream)
    safe.write(text + "\n")
    safe.flush()


def own_stdout() -> Any:
    """Standard output by its own descriptor, which works even while an engine's start redirects 1 and 2.

    A `sys.stdout` that a test or a notebook has replaced is returned as it is.
    """
    if sys.stdout is None or sys.stdout is not sys.__stdout__:
        return sys.stdout
    try:
        fd = os.dup(sys.stdout.fileno())
    except (OSError, ValueError):
        return sys.stdout
    return os.fdopen(fd, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)


def settle(*streams: Any) -> None:
    """Flushes streams, by default the standard ones, and discards what cannot be flushed."""
    for stream in filter(None, streams or (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            _lead_nowhere(stream)


def _lead_nowhere(stream: Any) -> None:
    """Sends what it still holds to /dev/null: a flush that fails at exit makes Python's exit code 120."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _encodable(text: str, encoding: str) -> str:
    if can_encode(text, encoding):
        return text
    try:
        return text.encode(encoding, "replace").decode(encoding)
    except LookupError:  # a stream may name an encoding that Python does not have
        return text.encode("ascii", "replace").decode("ascii")


def can_encode(text: str, encoding: str) -> bool:
    """Whether the encoding exists and has every character of the text."""
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def is_watched(stream: SafeStream) -> bool:
    """Whether a live picture makes sense: a terminal, and neither NO_COLOR nor CI nor TERM=dumb."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("CI", "").lower() not in ("", "0", "false")
    return stream.isatty() and not plain and os.environ.get("TERM", "") not in ("dumb", "unknown")


def sparkline(values: Sequence[float], encoding: str = "utf-8") -> str:
    """One character per value, from the least to the greatest: ▁▂▃▄▅▆▇█, or .:-=+*#@ in a poor encoding."""
    ticks = "▁▂▃▄▅▆▇█" if can_encode("▁█", encoding) else ".:-=+*#@"
    finite = [value for value in values if value - value == 0]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    return "".join(
        " " if value - value != 0 else ticks[round((value - low) / span * 7) if span else 3]
        for value in values
    )
