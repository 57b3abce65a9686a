"""The protocol between tester and solution: length-prefixed JSON frames of plain values that cannot run code.

Neither end trusts the other. Frames have a maximal size. Decoding makes only built-in values, `Remote`
handles of objects that stay in the solution, and objects of classes that the decoding side itself defines. A
value whose class overrides `__eq__`, `__repr__` or arithmetic arrives as the plain value underneath, or as a
handle that equals nothing else.

A value is a JSON scalar (None, bool, int, float, str) or `[tag, ...]`; objects of shared classes go into a
table beside it, so that linked lists, deep trees and cycles become flat.
"""

from __future__ import annotations

import collections
import functools
import io
import json
import operator
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_FRAME_BYTES = 16 << 20
MAX_DEPTH = 100
# larger integers travel in hexadecimal, whose conversion is linear and has no digit limit
MAX_EXACT = 1 << 53
HEADER_BYTES = 4
OF_USE = {"__init__", "__missing__", "__getattr__", "__getitem__", "__setitem__", "__call__", "__enter__"}
SCALARS = frozenset({str, bool, float, type(None)})

dumps = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


def _no_mapping(pairs: list[Any]) -> Any:
    raise ValueError("a JSON object is not a value")


loads = json.JSONDecoder(object_pairs_hook=_no_mapping).decode


class BadValue(Exception):
    """The other side broke the protocol, or a value cannot cross."""


class NoPlainForm(BadValue):
    """A value has a type that the protocol does not know."""


class Closed(Exception):
    """The other side is gone."""


class Channel:
    """Frames over a pair of descriptors."""

    def __init__(self, read_end: int, write_end: int) -> None:
        self._read_end = read_end
        self._write_end = write_end

    def send(self, message: Any) -> None:
        """Sends one frame. Raises BadValue above the cap, Closed if nobody reads."""
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
        """Receives one frame. Raises Closed at the end of the stream, BadValue if it is not a JSON frame."""
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
        shared: whether objects of a class cross by their attributes.
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
        if kind is list or kind is tuple:
            return [kind.__name__, self._items(value, depth)]
        if kind is dict:
            return ["dict", self._pairs(value, depth)]
        if kind in _TAGS:
            tag = _TAGS[kind]
            return [tag, self._items(FORMS[tag][1](value), depth)]
        if self._shared(kind) and not issubclass(kind, tuple):
            return self._object(value)
        if kind.__module__ == "solution" and _has_members(kind):
            return self._refer(value)
        return self.encode_plain(value, depth)

    def encode_plain(self, value: Any, depth: int = 0) -> Any:
        """Encodes an object of a subclass as the plain value underneath, any other object by reference."""
        fields = getattr(type(value), "_fields", ())
        for base, plain in _BY_BASE.items():
            if issubclass(type(value), base):
                encoded = self.encode(plain(value), depth)
                is_named = base is tuple and fields
                return ["named", encoded[1], type(value).__name__, *fields] if is_named else encoded
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
        """Fills the table, which grows meanwhile; so chains of objects need no recursion."""
        self._filling = True
        while index < len(self._alive):
            self.objects[index][1] = self._pairs(parts_of(self._alive[index]), 0)
            index += 1
        self._filling = False


def parts_of(value: Any) -> dict[str, Any]:
    """Instance attributes, including those in `__slots__`."""
    found = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name) and name not in ("__dict__", "__weakref__"):
                found[name] = getattr(value, name)
    return found


def _has_members(kind: type) -> bool:
    """Whether a class of the solution defines usable names beyond the fields of a named tuple."""
    fields = getattr(kind, "_fields", ())
    names = {name for base in kind.__mro__ if base.__module__ == "solution" for name in vars(base)}
    return any(name in OF_USE or not name.startswith("_") for name in names.difference(fields))


def names_of(kind: type) -> list[str]:
    """The names of an exception class and its bases except `object`; library classes include their module."""
    modules = [base.__module__.replace("builtins", "") for base in kind.__mro__[:-1]]
    found = [module if module.partition(".")[0] in sys.stdlib_module_names else "" for module in modules]
    return [f"{place}.{base.__name__}".lstrip(".") for place, base in zip(found, kind.__mro__, strict=False)]


def _opened(kind: Any, parts: list[Any]) -> Any:
    file = kind(parts[0])
    file.seek(parts[1])
    return file


def _forms(kinds: Iterable[type], split: Any, make: Callable[..., Any], *of: type) -> dict[str, Any]:
    return {kind.__name__: (kind, split, functools.partial(make, kind), of) for kind in kinds}


# tag: class, its parts, how to rebuild it from them, and their required types if not all are allowed.
FORMS: dict[str, tuple[type, Callable[[Any], Any], Callable[[list[Any]], Any], tuple[type, ...]]] = {
    **_forms((set, frozenset, collections.deque), list, lambda k, p: k(p)),
    **_forms((bytes, bytearray), lambda v: [v.hex()], lambda k, p: k.fromhex(*p), str),
    **_forms((collections.Counter, collections.OrderedDict), lambda v: [*v.items()], lambda k, p: k(dict(p))),
    **_forms((date, time, datetime), lambda v: [v.isoformat()], lambda k, p: k.fromisoformat(*p), str),
    **_forms((io.StringIO, io.BytesIO), lambda v: [v.getvalue(), v.tell()], _opened),
    "keys": (type({}.keys()), list, lambda p: dict.fromkeys(p).keys(), ()),
    "values": (type({}.values()), list, lambda p: dict(enumerate(p)).values(), ()),
    "items": (type({}.items()), list, lambda p: dict(p).items(), ()),
    "decimal": (Decimal, lambda v: [str(v)], lambda p: Decimal(*p), (str,)),
    "span": (timedelta, lambda v: [v.days, v.seconds, v.microseconds], lambda p: timedelta(*p), (int,)),
    "complex": (complex, lambda v: [v.real, v.imag], lambda p: complex(*p), (int, float)),
    "fraction": (Fraction, lambda v: [*v.as_integer_ratio()], lambda p: Fraction(*p), (int,)),
    "range": (range, lambda v: [v.start, v.stop, v.step], lambda p: range(*p), (int,)),
    "slice": (slice, lambda v: [v.start, v.stop, v.step], lambda p: slice(*p), ()),
}
_TAGS: dict[type, str] = {form[0]: tag for tag, form in FORMS.items()}
# Objects of subclasses (a list with an `__eq__` of its own, say) cross as the plain value underneath.
_BY_BASE: dict[type, Callable[[Any], Any]] = {
    int: lambda value: int.__add__(value, 0),
    float: lambda value: float.__add__(value, 0.0),
    str: lambda value: str.__str__(value)[:],
    bytes: lambda value: bytes.__getitem__(value, slice(None)),
    list: lambda value: [*list.__iter__(value)],
    tuple: lambda value: (*tuple.__iter__(value),),
    dict: lambda value: dict(dict.items(value)),
    set: lambda value: {*set.__iter__(value)},
    collections.deque: lambda value: collections.deque(collections.deque.__iter__(value)),
}


class Decoder:
    """Turns frames' contents into values, strictly.

    Args:
        resolve: makes the object that a `[tag, id]` of the other side's `refer` names; raises KeyError for an
            unknown tag.
        classes: name -> class whose objects may be made, without calling it.
    """

    def __init__(self, resolve: Callable[[str, Any], Any], classes: Mapping[str, type]) -> None:
        self._resolve = resolve
        self._classes = classes
        self._objects: list[Any] = []

    def decode_message(self, values: list[Any], objects: list[Any]) -> list[Any]:
        """The decoded `values`. Raises BadValue for anything that an `Encoder` would not send."""
        try:
            self._objects = [object.__new__(self._classes[entry[0]]) for entry in objects]
            for made, (_, attributes) in zip(self._objects, objects, strict=True):
                for name, value in self._mapping(attributes).items():
                    if (
                        type(name) is not str
                        or name.startswith("__")
                        or callable(getattr(type(made), name, None))
                    ):
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

    def _list(self, values: list[Any]) -> list[Any]:
        if type(values) is not list:
            raise BadValue("items are not a list")
        decode = self.decode
        return [value if type(value) is not list else decode(value) for value in values]

    def _mapping(self, values: list[Any]) -> dict[Any, Any]:
        items = iter(self._list(values))
        return dict(zip(items, items, strict=True))


def _whole(text: Any) -> int:
    if type(text) is not str or not text.lstrip("-").isalnum():
        raise BadValue("not an integer")
    return int(text, 16)


async def _done(value: Any) -> Any:
    return value


def _formed(coder: Decoder, value: list[Any]) -> Any:
    tag, parts = value
    _, _, make, kinds = FORMS[tag]
    parts = coder._list(parts)
    if kinds and not all(type(part) in kinds for part in parts):
        raise BadValue(f"a part of a {tag} is none of {kinds}")
    return make(parts)


def _named_tuple(coder: Decoder, value: list[Any]) -> Any:
    """An object of this side's class with that name and fields, or of a class made for it."""
    _, items, name, *fields = value
    kind: Any = coder._classes.get(name)
    if getattr(kind, "_fields", None) != tuple(fields):
        kind = collections.namedtuple(name, fields)
    return kind._make(coder._list(items))


_MAKE: dict[str, Callable[[Decoder, list[Any]], Any]] = {
    **dict.fromkeys(FORMS, _formed),
    "list": lambda coder, value: coder._list(value[1]),
    "tuple": lambda coder, value: tuple(coder._list(value[1])),
    "dict": lambda coder, value: coder._mapping(value[1]),
    "int": lambda coder, value: _whole(value[1]),
    "awaitable": lambda coder, value: _done(coder.decode(value[1])),
    "named": _named_tuple,
    "object": lambda coder, value: coder._objects[operator.index(value[1])],
}
