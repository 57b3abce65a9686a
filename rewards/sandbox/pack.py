"""Packs the standard library, so that a confined program can import without opening a file.

`rewards.sandbox.archive` imports from the packed bytes. Extension modules cannot be packed: the zygote
imports them before it confines itself.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator
from importlib.util import MAGIC_NUMBER, cache_from_source
from pathlib import Path

SKIPPED_FOLDERS = """
    test tests idle_test idlelib lib2to3 turtledemo tkinter ensurepip pydoc_data curses venv
    __pycache__ site-packages dist-packages lib-dynload
""".split()  # noqa: SIM905
SKIPPED_MODULES = frozenset({"antigravity", "this", "turtle"})
PYC_HEADER_BYTES = 16
REWARDS = Path(__file__).parents[1]


def _fresh_bytecode(source: Path) -> bytes | None:
    """A source file's cached code without its header; None if absent or older than the source (PEP 552)."""
    try:
        cached = Path(cache_from_source(str(source))).read_bytes()
        status = source.stat()
    except (OSError, NotImplementedError):
        return None
    mtime, size = int(status.st_mtime) & 0xFFFFFFFF, status.st_size & 0xFFFFFFFF
    fresh = cached.startswith(struct.pack("<4sIII", MAGIC_NUMBER, 0, mtime, size))
    return cached[PYC_HEADER_BYTES:] if fresh else None


def build_archive(modules: Iterable[str] = ()) -> bytes:
    """Packs the standard library and `modules`, `rewards.FOLDER.NAME` each.

    The format: length of the index (8 bytes), the index {module: [is package, is code, offset, size]} as
    JSON, then the modules.
    """
    index: dict[str, tuple[bool, bool, int, int]] = {}
    blobs: list[bytes] = []
    offset = 0
    own = [(name, REWARDS.joinpath(*name.split(".")[1:]).with_suffix(".py")) for name in modules]
    for name, source in [*_library_sources(), *own]:
        code = _fresh_bytecode(source)
        blob = source.read_bytes() if code is None else code
        index[name] = (source.stem == "__init__", code is not None, offset, len(blob))
        blobs.append(blob)
        offset += len(blob)
    head = json.dumps(index).encode()
    return b"".join([len(head).to_bytes(8, "little"), head, *blobs])


def _library_sources() -> Iterator[tuple[str, Path]]:
    library = Path(os.__file__).parent
    for folder, names, files in os.walk(library):
        names[:] = [name for name in names if name not in SKIPPED_FOLDERS and name.isidentifier()]
        package = Path(folder).relative_to(library).parts
        for file in files:
            stem, extension = os.path.splitext(file)
            if extension == ".py" and stem not in SKIPPED_MODULES:
                yield ".".join(package if stem == "__init__" else (*package, stem)), Path(folder, file)
