"""The solution's objects as the tests see them.

The solution decides comparisons between two of its own objects. A comparison with a value of the tests is
decided here, because that may be an expected value. It uses the plain value underneath the object, if there
is one. For the same reason the two are never subtracted from each other. Other arithmetic with a number of
the tests may only give an object, and its size and value are not asked for. `in` goes by the items that an
object yields, if it yields any.

A method that judges its argument (`endswith`, `equals`; also `in` without items) could agree to anything.
Only a built-in class, an object that the tests name, or an object of a class that they name may answer it
about a value of the tests. A name such as `Trie` is a class's; others, such as `add`, may be a function's.
"""

from __future__ import annotations

import collections
import contextlib
import decimal
import enum
import fractions
import operator
import types
from collections.abc import Callable
from typing import Any

# Passed on as they are: their arguments are not expected values, and their results are ordinary values.
ASKED = """call getitem setitem delitem setattr delattr len bool str repr format hash enter reversed
    abs neg pos invert round trunc floor ceil int float complex index copy subclasscheck""".split()  # noqa: SIM905
COMPARED = "eq lt le gt ge".split()  # noqa: SIM905
COMPUTED = "add sub mul truediv floordiv mod pow matmul and_ or_ xor lshift rshift".split()  # noqa: SIM905
ABOUT_VALUE = {*"len bool iter next abs neg pos round trunc floor ceil int float complex index".split()}  # noqa: SIM905
_NAMES = "name qualname dict annotations bases mro members defaults wrapped slots args cause"
NAMES = {f"__{name}__" for name in _NAMES.split()}
KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        *(int, float, bool, complex, str, bytes, list, tuple, dict, set, frozenset, object, type, range),
        *(collections.deque, collections.OrderedDict, collections.Counter, collections.defaultdict),
        *(enum.Enum, enum.IntEnum, enum.Flag, enum.IntFlag, map, filter, zip, enumerate),
        *(types.GeneratorType, types.FunctionType),
    )
}
NUMBERS = (int, float, fractions.Fraction, decimal.Decimal)
FIXED = (*NUMBERS, bool, complex, str, bytes)  # a value of these never changes, so it is asked for once
OF_PLAIN: dict[str, Callable[[Any], Any]] = {"int": int, "float": float, "index": operator.index}
# Questions whose argument is an expected value: the built-in class underneath answers them.
JUDGING = """startswith endswith find rfind index rindex count partition rpartition isdisjoint issubset
    issuperset intersection union difference symmetric_difference removeprefix removesuffix
    equals equal is_equal isequal compare""".split()  # noqa: SIM905
UNKNOWN = "{!r} is asked of an object whose name and class the tests do not mention"


def _asked(operation: str) -> Callable[..., Any]:
    def ask(self: Remote, *args: Any, **kwargs: Any) -> Any:
        if self._mixed and operation in ABOUT_VALUE:
            raise TypeError(f"{operation} of an object that was computed with a number of the tests")
        if operation in OF_PLAIN and type(plain := self._plain()) in NUMBERS:
            return OF_PLAIN[operation](plain)
        if (
            operation == "call"
            and self._guard
            and any(type(v) is not Remote for v in (*args, *kwargs.values()))
        ):
            raise TypeError(UNKNOWN.format(self._guard))
        return self._link.ask(operation, self._number, args, kwargs)

    return ask


def _compared(operation: str) -> Callable[[Remote, Any], Any]:
    def compare(self: Remote, other: Any) -> Any:
        if type(other) is Remote:
            return self._link.ask(operation, self._number, (other,)) is True
        mine = self._plain()
        return NotImplemented if type(mine) is Remote else getattr(operator, operation)(mine, other)

    return compare


def _computed(operation: str, *, swapped: bool = False) -> Callable[[Remote, Any], Any]:
    function = getattr(operator, operation, divmod)

    def compute(self: Remote, other: Any) -> Any:
        both = type(other) is Remote
        mine = self if both else self._plain()
        if type(mine) is not Remote:
            return function(other, mine) if swapped else function(mine, other)
        if not both and (type(other) not in NUMBERS or "sub" in operation):
            return NotImplemented
        result = self._link.ask(f"r{operation}" if swapped else operation, self._number, (other,))
        if not both and type(result) is Remote:
            object.__setattr__(result, "_mixed", True)
        return result if both or type(result) is Remote else NotImplemented

    return compute


def note_name(value: Remote, name: str) -> None:
    """Remembers that the tests name an object, which is a class if its name begins with a capital."""
    object.__setattr__(value, "_is_named", True)
    if name[:1].isupper():
        value._link.named_classes.add(value._number)


class Remote:
    # An object of the solution that stays there. `_number`: its handle, or the path of an entry point.
    # `_guard`: the name of a judging method that must not see values of the tests.
    __slots__ = ("_fixed", "_guard", "_is_named", "_kind", "_link", "_mixed", "_number")

    def __init__(self, link: Any, number: int | str) -> None:
        for name, value in zip(Remote.__slots__, (None, "", False, None, link, False, number), strict=True):
            object.__setattr__(self, name, value)
        if type(number) is str and number.isidentifier():
            note_name(self, number)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in NAMES:
            raise AttributeError(name)
        if name in JUDGING and type(plain := self._plain()) is not Remote and hasattr(plain, name):
            return getattr(plain, name)
        found = self._link.ask("getattr", self._number, (name,))
        if type(found) is Remote and not found._is_named:
            if self._number in self._link.named_classes:
                note_name(found, name)
            elif name in JUDGING and not self._may_judge():
                object.__setattr__(found, "_guard", name)
        return found

    def __iter__(self) -> Any:
        iterator = _asked("iter")(self)
        return iterator if type(iterator) is Remote else iter(iterator)

    def __next__(self) -> Any:
        for item in _asked("next")(self):
            return item
        raise StopIteration

    @property
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The built-in base class of the object's class, for `isinstance`."""
        if self._kind is None:
            object.__setattr__(self, "_kind", KINDS.get(str(self._link.ask("kind", self._number))) or Remote)
        return self._kind

    @property
    def __doc__(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._link.ask("getattr", self._number, ("__doc__",))

    def __instancecheck__(self, value: Any) -> bool:
        can_be = type(value) is Remote or hasattr(type(value), "_fields")
        return can_be and self._link.ask("isinstance", self._number, (value,)) is True

    def __contains__(self, value: Any) -> bool:
        mine = self._plain()
        if type(mine) is not Remote:
            return value in mine
        if self._mixed or self._link.ask("yields_items", self._number) is True:
            return any(item is value or item == value for item in self)
        if type(value) is not Remote and not self._may_judge():
            raise TypeError(UNKNOWN.format("in"))
        return self._link.ask("contains", self._number, (value,)) is True

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self._link.ask("exit", self._number, (error,))  # it cannot suppress a failure of the tests

    def __deepcopy__(self, memo: Any) -> Any:
        return self._link.ask("deepcopy", self._number)

    def _may_judge(self) -> bool:
        """Whether the tests name the object or its class."""
        if self._is_named:
            return True
        for named in self._link.named_classes:
            with contextlib.suppress(TypeError):  # it is not a class after all
                if self._link.ask("isinstance", named, (self,)) is True:
                    return True
        return False

    def _plain(self) -> Any:
        if self._fixed is None:
            plain = self._link.ask("plain", self._number)
            if type(plain) not in FIXED:
                return plain
            object.__setattr__(self, "_fixed", plain)
        return self._fixed


for _name in ASKED:
    setattr(Remote, f"__{_name}__", _asked(_name))
for _name in COMPARED:
    setattr(Remote, f"__{_name}__", _compared(_name))
for _name in COMPUTED:
    setattr(Remote, f"__{_name.strip('_')}__", _computed(_name))
    setattr(Remote, f"__r{_name.strip('_')}__", _computed(_name, swapped=True))
    setattr(Remote, f"__i{_name.strip('_')}__", _computed(f"i{_name.strip('_')}"))
setattr(Remote, "__divmod__", _computed("divmod"))  # noqa: B010
