"""Imports from an archive in memory, for processes that may not open files. See `rewards.sandbox.pack`."""

from __future__ import annotations

import importlib.machinery
import json
import marshal
from types import CodeType, ModuleType
from typing import Any, cast


class ArchiveFinder:
    """Finds and loads modules of an archive; both the finder and the loader of the import protocol."""

    def __init__(self, archive: Any) -> None:
        """`archive`: bytes, or a read-only mmap, as `pack.build_archive` made them."""
        length = int.from_bytes(archive[:8], "little")
        self._archive = archive
        self._start = 8 + length
        self._index: dict[str, tuple[bool, bool, int, int]] = json.loads(archive[8 : self._start])

    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        entry = self._index.get(fullname)
        if entry is None:
            return None
        kind, loader, origin = importlib.machinery.ModuleSpec, cast(Any, self), f"<{fullname}>"
        return kind(fullname, loader, origin=origin, is_package=entry[0])

    def get_code(self, fullname: str) -> CodeType:
        _, is_code, offset, size = self._index[fullname]
        blob = self._archive[self._start + offset : self._start + offset + size]
        # The bytes come from this interpreter's own library folder, as a plain import would read them.
        return marshal.loads(blob) if is_code else compile(blob, f"<{fullname}>", "exec", dont_inherit=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        exec(self.get_code(module.__name__), module.__dict__)
