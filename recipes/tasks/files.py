"""Rows of JSON and CSV files, each value as the file has it.

A table would give each column one type: 7 beside 0.5 becomes 7.0, and the text 2024-01-31 a date; in CSV, 007
becomes 7, and the texts NA and None become nothing. A reward that compares texts is then silently wrong.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

INTEGER = re.compile(r"0|-?[1-9][0-9]{0,999}")  # int() refuses more than 4,300 digits
WORD = re.compile(r"\S")
MAX_CELL = 1 << 30  # characters; the csv module's own limit is 131,072


class Unfinished(ValueError):
    """The text ends within a value, which may go on in the next line."""


def read_file(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl, .json or .csv file.

    Raises:
        ValueError: a line is not a row, with its number and the reason.
    """
    if path.suffix == ".csv":
        yield from _csv_rows(path)
        return
    values = _values(path)
    where, first = next(values, ("", []))
    rows = [(where, first)]
    if isinstance(first, list):
        rows = [(f"item {number} of the list", row) for number, row in enumerate(first, 1)]
    for place, row in chain(rows, values):
        if not isinstance(row, dict):
            raise ValueError(f'{place}: a row is an object such as {{"prompt": "..."}}, not {row!r:.40}')
        yield row


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"line {number}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
                ) from None


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    """The JSON values of a file, with the lines where they start; most files have one in each line."""
    lines = _lines(path)
    for number, line in lines:
        try:
            found = list(_parsed(line.rstrip(), number))
        except Unfinished:
            yield from _parsed(line + "".join(more for _, more in lines), number)
            return
        yield from found


def _parsed(text: str, first: int) -> Iterator[tuple[str, Any]]:
    """The JSON values of a text that starts in line `first` of its file."""
    decoder, end, number = json.JSONDecoder(object_pairs_hook=_object), 0, first
    while found := WORD.search(text, end):
        number, begin = number + text.count("\n", end, found.start()), found.start()
        try:
            value, end = decoder.raw_decode(text, begin)
            _check_characters(value, text[begin:end])
        except json.JSONDecodeError as error:
            line = first + error.lineno - 1
            place = f"column {error.colno}"
            # In a file of one object a line the fault may be noticed in the next line only.
            if text[begin] == "{" and line != number:
                line, place = number, f"line {line}, {place}"
            kind = Unfinished if error.pos >= len(text.rstrip()) else ValueError
            raise kind(f"line {line}: not JSON ({error.msg}, {place}); fix or remove it") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: not JSON ({error}); fix or remove it") from None
        yield f"line {number}", value
        number += text.count("\n", begin, end)


def _check_characters(value: Any, text: str) -> None:
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair, which is not a character") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice in an object")
    return found


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    """A column of plain numbers, or of True and False, has such values; empty is None.

    All others hold text, also those with 007, 1e5, 1.50 or `true`, which a reward must read by itself.
    """
    csv.field_size_limit(MAX_CELL)
    lines = (line for _, text in _lines(path) for line in io.StringIO(text, newline=""))  # ends in \n or \r
    reader = csv.reader(lines, strict=True)  # else an open quote swallows the rest of the file
    begin, rows = 1, []
    try:
        names = next((cells for cells in reader if cells), [])
        if len(set(names)) < len(names):
            raise ValueError(f"line 1: two columns have the same name: {', '.join(names)}")
        begin = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(names):
                raise ValueError(
                    f"line {begin}: {len(cells)} cells, but line 1 names {len(names)} columns; put "
                    'a text that holds a comma, a quote or a line break into "quotes"'
                )
            rows += [cells] if cells else []
            begin = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f'line {begin}: not CSV ({error}); write a quote in a quoted text twice: "say ""no"" to it"'
        ) from None
    columns = [_typed(column) for column in zip(*rows, strict=True)]
    yield from (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))


def _typed(cells: tuple[str, ...]) -> list[Any]:
    full = [cell for cell in cells if cell]
    if all(cell in ("True", "False") for cell in full):
        return [cell == "True" if cell else None for cell in cells]
    if all(INTEGER.fullmatch(cell) or _is_float(cell) for cell in full):
        return [(int if INTEGER.fullmatch(cell) else float)(cell) if cell else None for cell in cells]
    return [cell or None for cell in cells]


def _is_float(cell: str) -> bool:
    try:
        return repr(float(cell)) == cell and cell[-1].isdigit()
    except ValueError:
        return False
