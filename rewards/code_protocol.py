"""How the tester and the solution talk: length-prefixed JSON frames of plain values, with no type that
could run code.

Both ends speak it, and neither trusts the other: a frame is capped, decoding makes only built-in values,
`Remote` handles of objects that stay in the solution, and objects of classes that the decoding side itself
defines. A value whose class overrides `__eq__`, `__repr__` or arithmetic arrives as the plain value
underneath, or as a handle that equals nothing else.

A value is a JSON scalar (None, bool, int, float, str) or `[tag, ...]`; objects of shared classes stand in a
table beside it, so that linked lists and trees of any depth, and cycles, are flat.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import json
import os
from collections.abc import Callable, Iterable
from typing import Any

MAX_FRAME_BYTES = 16 << 20
MAX_DEPTH = 100
# larger integers travel in hexadecimal, whose conversion is linear and has no digit limit
MAX_EXACT = 1 << 53
HEADER_BYTES = 4
SCALARS = frozenset({str, bool, float, type(None)})

dumps = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


def _no_mapping(pairs: list[Any]) -> Any:
    raise ValueError("a JSON object is no value")


loads = json.JSONDecoder(object_pairs_hook=_no_mapping).decode


class BadValue(Exception):
    """The other side sent what the protocol does not allow, or a value cannot cross."""


class NoPlainForm(BadValue):
    """A value of a type that the protocol does not know."""


class Closed(Exception):
    """The other side is gone."""


class Channel:
    """Frames over a pair of descriptors."""

    def __init__(self, read_end: int, write_end: int) -> None:
        self._read_end = read_end
        self._write_end = write_end

    def send(self, message: Any) -> None:
        """Raises BadValue above the cap, Closed if nobody reads."""
        body = dumps(message).encode("ascii")
        if len(body) > MAX_FRAME_BYTES:
            raise BadValue(f"a value of {len(body)} bytes is above the cap of {MAX_FRAME_BYTES}")
        frame = len(body).to_bytes(HEADER_BYTES, "little") + body
        try:
            sent = os.write(self._write_end, frame)
            while sent < len(frame):
                sent += os.write(self._write_end, frame[sent : sent + (1 << 20)])
        except OSError as error:
            raise Closed(str(error)) from None

    def receive(self) -> Any:
        """Raises Closed at the end of the stream, BadValue for anything but one capped frame of JSON."""
        data = self._read(1 << 16)
        while len(data) < HEADER_BYTES:
            data += self._read(1 << 16)
        size = int.from_bytes(data[:HEADER_BYTES], "little") + HEADER_BYTES
        if size > MAX_FRAME_BYTES + HEADER_BYTES:
            raise BadValue(f"a frame of {size} bytes is above the cap of {MAX_FRAME_BYTES}")
        if len(data) < size:
            parts, have = [data], len(data)
            while have < size:
                parts.append(self._read(min(1 << 20, size - have)))
                have += len(parts[-1])
            data = b"".join(parts)
        if len(data) > size:
            raise BadValue("bytes after the frame: each answer follows a question")
        try:
            return loads(data[HEADER_BYTES:].decode("ascii"))
        except (ValueError, RecursionError) as error:
            raise BadValue(f"not a frame of JSON: {type(error).__name__}") from None

    def _read(self, size: int) -> bytes:
        data = os.read(self._read_end, size)
        if not data:
            raise Closed("end of stream")
        return data


class Encoder:
    """Turns values into frames' contents.

    Args:
        refer: names an object that cannot cross, as `[tag, id]`; raises BadValue to refuse it.
        shared: tells whether objects of a class cross by their attributes.
    """

    def __init__(self, refer: Callable[[Any], list[Any]], shared: Callable[[type], bool]) -> None:
        self._refer = refer
        self._shared = shared
        self.objects: list[Any] = []
        self._indices: dict[int, int] = {}
        self._alive: list[Any] = []
        self._filling = False

    def encode(self, value: Any, depth: int = 0) -> Any:
        kind = type(value)
        if kind in SCALARS:
            return value
        if kind is int:
            return value if -MAX_EXACT < value < MAX_EXACT else ["int", format(value, "x")]
        if depth > MAX_DEPTH:
            raise BadValue(f"nested deeper than {MAX_DEPTH}, or a part of itself")
        if kind is list:
            return ["list", self._items(value, depth)]
        if kind is tuple:
            return ["tuple", self._items(value, depth)]
        if kind is dict:
            return ["dict", self._pairs(value, depth)]
        encode = _BY_TYPE.get(kind)
        if encode is not None:
            return encode(self, value, depth)
        if self._shared(kind):
            return self._object(value)
        for base, encode in _BY_BASE:
            if issubclass(kind, base):
                return encode(self, value, depth)
        return self._refer(value)

    def _items(self, values: Iterable[Any], depth: int) -> list[Any]:
        values = [*values]
        kinds = {*map(type, values)}
        if kinds <= SCALARS or (kinds == {int} and min(values) > -MAX_EXACT and max(values) < MAX_EXACT):
            return values
        return [self.encode(value, depth + 1) for value in values]

    def _pairs(self, values: Any, depth: int) -> list[Any]:
        return [self.encode(part, depth + 1) for pair in dict.items(values) for part in pair]

    def _object(self, value: Any) -> list[Any]:
        known = self._indices.get(id(value))
        if known is None:
            known = self._indices[id(value)] = len(self.objects)
            self.objects.append([type(value).__name__, None])
            self._alive.append(value)
            if not self._filling:
                self._fill(known)
        return ["object", known]

    def _fill(self, index: int) -> None:
        """Works through the table, which grows on the way: no recursion along chains."""
        self._filling = True
        while index < len(self._alive):
            self.objects[index][1] = self._pairs(attributes_of(self._alive[index]), 0)
            index += 1
        self._filling = False


def attributes_of(value: Any) -> dict[str, Any]:
    """Instance attributes, those in `__slots__` included."""
    found = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name) and name not in ("__dict__", "__weakref__"):
                found[name] = getattr(value, name)
    return found


_BY_TYPE: dict[type, Callable[[Encoder, Any, int], Any]] = {
    set: lambda coder, value, depth: ["set", coder._items(value, depth)],
    frozenset: lambda coder, value, depth: ["frozenset", coder._items(value, depth)],
    bytes: lambda coder, value, depth: ["bytes", value.hex()],
    bytearray: lambda coder, value, depth: ["bytearray", value.hex()],
    complex: lambda coder, value, depth: ["complex", value.real, value.imag],
    range: lambda coder, value, depth: ["range", *coder._items((value.start, value.stop, value.step), depth)],
    fractions.Fraction: lambda coder, value, depth: [
        "fraction",
        *coder._items((value.numerator, value.denominator), depth),
    ],
    decimal.Decimal: lambda coder, value, depth: ["decimal", str(value)],
    datetime.date: lambda coder, value, depth: ["date", value.isoformat()],
    datetime.datetime: lambda coder, value, depth: ["datetime", value.isoformat()],
    datetime.timedelta: lambda coder, value, depth: [
        "timedelta",
        [value.days, value.seconds, value.microseconds],
    ],
    collections.deque: lambda coder, value, depth: ["deque", coder._items(value, depth)],
    collections.Counter: lambda coder, value, depth: ["counter", coder._pairs(value, depth)],
    collections.OrderedDict: lambda coder, value, depth: ["ordered", coder._pairs(value, depth)],
    collections.defaultdict: lambda coder, value, depth: ["dict", coder._pairs(value, depth)],
}
# Subclasses (named tuples, IntEnum, but also a list with an `__eq__` of its own) cross as the plain value
# underneath.
_BY_BASE: tuple[tuple[type, Callable[[Encoder, Any, int], Any]], ...] = (
    (int, lambda coder, value, depth: coder.encode(int.__add__(value, 0), depth)),
    (float, lambda coder, value, depth: float.__add__(value, 0.0)),
    (str, lambda coder, value, depth: str.__str__(value)[:]),
    (list, lambda coder, value, depth: ["list", coder._items(list.__iter__(value), depth)]),
    (tuple, lambda coder, value, depth: ["tuple", coder._items(tuple.__iter__(value), depth)]),
    (dict, lambda coder, value, depth: ["dict", coder._pairs(value, depth)]),
    (set, lambda coder, value, depth: ["set", coder._items(set.__iter__(value), depth)]),
)


class Decoder:
    """Turns frames' contents into values, strictly.

    Args:
        resolve: makes what a `[tag, id]` of the other side's `refer` stands for; raises KeyError for an
            unknown tag.
        classes: name -> class whose objects may be made, without calling it.
    """

    def __init__(self, resolve: Callable[[str, Any], Any], classes: Callable[[str], type]) -> None:
        self._resolve = resolve
        self._classes = classes
        self._objects: list[Any] = []

    def decode_message(self, values: list[Any], objects: list[Any]) -> list[Any]:
        """The decoded `values`. Raises BadValue for whatever an `Encoder` would not have sent."""
        try:
            self._objects = [self._new(entry[0]) for entry in objects]
            for made, (_, attributes) in zip(self._objects, objects, strict=True):
                for name, value in self._mapping(attributes).items():
                    if type(name) is not str or name.startswith("__"):
                        raise BadValue(f"attribute {name!r}")
                    object.__setattr__(made, name, value)
            return [self.decode(value) for value in values]
        except BadValue:
            raise
        except Exception as error:
            raise BadValue(f"{type(error).__name__} while decoding a value") from None

    def decode(self, value: Any) -> Any:
        if type(value) is not list:
            return value
        make = _MAKE.get(value[0])
        return self._resolve(value[0], value[1]) if make is None else make(self, value)

    def _new(self, name: str) -> Any:
        return object.__new__(self._classes(name))

    def _list(self, values: list[Any]) -> list[Any]:
        if type(values) is not list:
            raise BadValue("items are no list")
        decode = self.decode
        return [value if type(value) is not list else decode(value) for value in values]

    def _mapping(self, values: list[Any]) -> dict[Any, Any]:
        items = iter(self._list(values))
        return dict(zip(items, items, strict=True))


def _whole(text: Any) -> int:
    if type(text) is not str or not text.lstrip("-").isalnum():
        raise BadValue("not an integer")
    return int(text, 16)


def _plain(value: Any, *kinds: type) -> Any:
    if type(value) not in kinds:
        raise BadValue(f"{type(value).__name__} where {kinds[0].__name__} belongs")
    return value


async def _done(value: Any) -> Any:
    return value


def _integers(coder: Decoder, values: list[Any]) -> list[int]:
    return [_plain(value, int) for value in coder._list(values)]


_MAKE: dict[str, Callable[[Decoder, list[Any]], Any]] = {
    "list": lambda coder, value: coder._list(value[1]),
    "tuple": lambda coder, value: tuple(coder._list(value[1])),
    "dict": lambda coder, value: coder._mapping(value[1]),
    "set": lambda coder, value: set(coder._list(value[1])),
    "frozenset": lambda coder, value: frozenset(coder._list(value[1])),
    "int": lambda coder, value: _whole(value[1]),
    "bytes": lambda coder, value: bytes.fromhex(value[1]),
    "bytearray": lambda coder, value: bytearray.fromhex(value[1]),
    "complex": lambda coder, value: complex(_plain(value[1], float, int), _plain(value[2], float, int)),
    "range": lambda coder, value: range(*_integers(coder, value[1:4])),
    "fraction": lambda coder, value: fractions.Fraction(*_integers(coder, value[1:3])),
    "decimal": lambda coder, value: decimal.Decimal(_plain(value[1], str)),
    "date": lambda coder, value: datetime.date.fromisoformat(_plain(value[1], str)),
    "datetime": lambda coder, value: datetime.datetime.fromisoformat(_plain(value[1], str)),
    "timedelta": lambda coder, value: datetime.timedelta(*_integers(coder, value[1])),
    "awaitable": lambda coder, value: _done(coder.decode(value[1])),
    "deque": lambda coder, value: collections.deque(coder._list(value[1])),
    "counter": lambda coder, value: collections.Counter(coder._mapping(value[1])),
    "ordered": lambda coder, value: collections.OrderedDict(coder._mapping(value[1])),
    "object": lambda coder, value: coder._objects[_plain(value[1], int)],
}
