"""YAML from a file or an override: plain data of bounded size, in which no key is given twice.

PyYAML alone keeps the last of two equal keys, and fails on deep nesting inside its own recursion. It shares
aliased values, so that ten lines can stand for 10^10 values.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1 << 20
MAX_DEPTH = 50
MAX_VALUES = 100_000
_TOO_DEEP = f"sections and lists are nested more than {MAX_DEPTH} levels deep; a config needs fewer than ten"

_KINDS = {"d": "a folder", "p": "a pipe", "c": "a device", "b": "a device", "s": "a socket"}
"""First character of a mode as `ls -l` shows it -> kind of file."""


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds; None for an empty one.

    Raises:
        ValueError: it is not a regular file of UTF-8 text of at most `MAX_BYTES`; or as `parse_yaml` says.
        OSError: it cannot be opened.
    """
    # Without O_NONBLOCK opening a pipe waits for its writer.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(mode := os.fstat(fd).st_mode):
            kind = _KINDS.get(stat.filemode(mode)[0], "not a regular file")
            raise ValueError(f"{path} is {kind}; a config is a regular YAML file")
        with open(fd, "rb", closefd=False) as file:
            content = file.read(MAX_BYTES + 1)
    finally:
        os.close(fd)
    if len(content) > MAX_BYTES:
        raise ValueError(
            f"{path} is larger than {MAX_BYTES:,} bytes, which no config needs; give the YAML file of a run "
            "(data goes into a separate file, named by data.source)"
        )
    try:
        return parse_yaml(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not valid YAML: it is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None


def parse_yaml(text: str) -> Any:
    """The value of YAML text, by PyYAML's safe loader.

    Raises:
        ValueError: it is not YAML, nests deeper than `MAX_DEPTH`, gives a key twice, or stands for more than
            `MAX_VALUES` values once its aliases are written out. The message says where.
    """
    try:
        return _unshared(yaml.load(text, Loader=_BoundedLoader))
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


class _BoundedLoader(yaml.SafeLoader):
    """Refuses deep nesting, too many values and equal keys while it reads, before it makes values of them."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[yaml.Node, tuple[int, int]] = {}
        """Node read so far -> (number of values, levels) of what it stands for."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        is_alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > MAX_DEPTH:  # PyYAML reads nested values by recursion
            raise ValueError(f"line {self.get_mark().line + 1}: {_TOO_DEEP}")
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if not is_alias:
            self._sizes[node] = self._size(node)
        elif node not in self._sizes:
            where = f"line {node.start_mark.line + 1}"
            raise ValueError(f"{where}: the value holds itself, through an alias (*name)")
        return node

    def _size(self, node: yaml.Node) -> tuple[int, int]:
        children = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            children = [child for pair in node.value for child in pair]
        sizes = [self._sizes[child] for child in children]
        size, levels = 1 + sum(size for size, _ in sizes), 1 + max((n for _, n in sizes), default=0)
        where = f"line {node.start_mark.line + 1}"
        if size > MAX_VALUES:
            raise ValueError(
                f"{where}: with its aliases (*name) written out it holds more than {MAX_VALUES:,} values, "
                "which no config needs"
            )
        if levels > MAX_DEPTH:
            raise ValueError(f"{where}: {_TOO_DEEP}")
        return size, levels


def _check_keys(mapping: yaml.MappingNode) -> None:
    """Raises ValueError for the first key that it has twice, however it is quoted."""
    lines: dict[tuple[str, str], int] = {}
    for key, _ in mapping.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        line = key.start_mark.line + 1
        if (first := lines.get((key.tag, key.value))) is not None:
            raise ValueError(
                f"{key.value!r} is given twice, in line {first} and in line {line}, but only one of them "
                "would count; remove one, or merge what they hold"
            )
        lines[key.tag, key.value] = line


def _unshared(tree: Any) -> Any:
    """A copy in which aliases share nothing, so that an override of one does not change the others."""
    if isinstance(tree, dict):
        return {key: _unshared(value) for key, value in tree.items()}
    return [_unshared(value) for value in tree] if isinstance(tree, list) else tree
