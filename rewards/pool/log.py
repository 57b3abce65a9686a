"""`graders.log`: the output of graders in whole lines, without escape sequences, of bounded size."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

HALF_BYTES = 4 << 20
MAX_LINE = 1 << 16  # bytes; the rest of a longer line becomes another line


class GraderLog:
    """A file that several processes may append to. Beyond `HALF_BYTES` it is renamed to NAME.1."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def take(self, unfinished: bytearray, *, ended: bool = False) -> None:
        """Moves the whole lines of `unfinished` to the file; once it has ended, everything."""
        whole = len(unfinished) if ended or len(unfinished) > MAX_LINE else unfinished.rfind(b"\n") + 1
        if not whole:
            return
        text = bytes(unfinished[:whole]).decode("utf-8", "replace")
        del unfinished[:whole]
        lines = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
        with suppress(OSError):  # a full disk costs the line, not the run
            if self.path.exists() and self.path.stat().st_size > HALF_BYTES:
                os.replace(self.path, f"{self.path}.1")
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                os.write(fd, (lines if lines.endswith("\n") else lines + "\n").encode("utf-8", "replace"))
            finally:
                os.close(fd)
