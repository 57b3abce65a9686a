"""YAML from a file or an override: plain data of bounded size, in which no key is given twice.

PyYAML alone keeps the last of two equal keys, shares what aliases name, so that ten lines can stand for 10^10
values, and fails on deep nesting inside its own recursion.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1 << 20
MAX_DEPTH = 50
MAX_VALUES = 100_000
_TOO_DEEP = (
    f"sections and lists are nested more than {MAX_DEPTH} levels deep, and a config has fewer than ten"
)

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds; None for an empty one.

    Raises:
        ValueError: it is not a regular file of UTF-8 text of at most `MAX_BYTES`; or as `parse_yaml` says.
        OSError: it cannot be opened.
    """
    # Without O_NONBLOCK opening a pipe waits for its writer.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "not a regular file")
            raise ValueError(f"{path} is {kind}; a config is a regular YAML file")
        with open(fd, "rb", closefd=False) as file:
            content = file.read(MAX_BYTES + 1)
    finally:
        os.close(fd)
    if len(content) > MAX_BYTES:
        raise ValueError(
            f"{path} is larger than {MAX_BYTES:,} bytes, which no config needs; give the YAML file of a run "
            "(data goes into a file of its own, named by data.source)"
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
    """What YAML text stands for, by PyYAML's safe loader.

    Raises:
        ValueError: it is not YAML, nests deeper than `MAX_DEPTH`, gives a key twice, or stands for more than
            `MAX_VALUES` values once its aliases are written out. The message says where.
    """
    loader = None
    try:
        loader = _BoundedLoader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _check_keys(root)
        _measure(root, {})
        return _unshared(loader.construct_document(root))
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    finally:
        if loader is not None:
            loader.dispose()


class _BoundedLoader(yaml.SafeLoader):
    """Refuses deep nesting while it reads: PyYAML composes what is nested by recursion."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError(f"line {self.get_mark().line + 1}: {_TOO_DEEP}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _check_keys(root: yaml.Node) -> None:
    """Raises ValueError for the first key that a mapping has twice, however it is quoted."""
    for node in _nodes(root):
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if (first := lines.get((key.tag, key.value))) is not None:
                raise ValueError(
                    f"{key.value!r} is given twice, in line {first} and in line {line}, and only one of "
                    "them would count; remove one, or put what they hold together"
                )
            lines[key.tag, key.value] = line


def _nodes(root: yaml.Node) -> Iterator[yaml.Node]:
    """Every node once, however many aliases name it, in the order of the text."""
    seen: set[int] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            stack += reversed(_children(node))


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _unshared(tree: Any) -> Any:
    """A copy in which every alias is a value of its own: an override of one must not change the others."""
    if isinstance(tree, dict):
        return {key: _unshared(value) for key, value in tree.items()}
    return [_unshared(value) for value in tree] if isinstance(tree, list) else tree


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """(number of values, levels) of what a node stands for, each alias counted as a copy of its value.

    Raises:
        ValueError: there are more than `MAX_VALUES` or `MAX_DEPTH`, or a value holds itself.
    """
    where = f"line {node.start_mark.line + 1}"
    if id(node) in known:
        if (found := known[id(node)]) is None:
            raise ValueError(f"{where}: the value holds itself, through an alias (*name)")
        return found
    known[id(node)] = None
    inner = [_measure(child, known) for child in _children(node)]
    size, levels = 1 + sum(size for size, _ in inner), 1 + max((n for _, n in inner), default=0)
    if size > MAX_VALUES:
        raise ValueError(
            f"{where}: with its aliases (*name) written out it holds more than {MAX_VALUES:,} values, and no "
            "config needs as many"
        )
    if levels > MAX_DEPTH:
        raise ValueError(f"{where}: {_TOO_DEEP}")
    known[id(node)] = size, levels
    return size, levels
