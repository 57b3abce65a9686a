"""The solution as the tests see it: functions and objects that live in another process."""

from __future__ import annotations

import builtins
import collections
from collections.abc import Callable
from typing import Any

from rewards.code_protocol import BadValue, Channel, Closed, Decoder, Encoder, NoPlainForm, attributes_of

# Exceptions that would end a loop of the tests as if it had finished, or end the tests; they arrive as
# RuntimeError.
CONTROL_FLOW = frozenset(
    {"StopIteration", "StopAsyncIteration", "GeneratorExit", "SystemExit", "KeyboardInterrupt"}
)
MAX_BASES, MAX_EXCEPTIONS = 20, 1000
PLAIN_CLASSES = frozenset(
    {int, float, str, bool, list, tuple, dict, set, frozenset, bytes, complex, object, type}
)


class SolutionFault(BaseException):
    """The solution is gone, or broke the protocol. Not an Exception, so that tests which expect one do not
    take it for theirs.
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(kind, detail)
        self.kind = kind
        self.detail = detail


class Misuse(Exception):
    """The tests pass something that cannot cross to the solution."""


class Link:
    """Asks the solution, one question at a time.

    Attributes:
        fault: the first fault of the solution; once set, every question raises it again.
        raised: the last exception that the solution raised, as the tests saw it.
    """

    def __init__(self, channel: Channel, on_first_call: Callable[[], None]) -> None:
        self.channel = channel
        self.num_calls = 0
        self.fault: SolutionFault | None = None
        self.raised: Exception | None = None
        self._on_first_call = on_first_call
        self._classes: dict[str, type] = {}
        self._unannounced: list[str] = []
        self._remotes: dict[int, Remote] = {}
        self._exceptions: dict[str, type[Exception]] = {}
        self._callbacks: list[Callable[..., Any]] = []

    def ask(self, operation: str, target: int | str, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Does `operation` on an object of the solution; updates the arguments that it changed in place.

        Raises:
            SolutionFault: no usable answer.
            Exception: what the solution raised, as the built-in class of the same name.
        """
        if self.fault is not None:
            raise self.fault
        if not self.num_calls:
            self._on_first_call()
        self.num_calls += 1
        try:
            if self._unannounced:
                names, self._unannounced = self._unannounced, []
                self._ask("share", 0, tuple(names), {})
            return self._ask(operation, target, args, kwargs or {})
        except Closed:
            self.fault = SolutionFault("gone", "the solution ended before it answered")
        except BadValue as error:
            self.fault = SolutionFault("bad_value", str(error))
        except SolutionFault as fault:
            self.fault = fault
        raise self.fault

    def _ask(self, operation: str, target: int | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        encoder = Encoder(self._refer, self._is_shared)
        try:
            arguments = [encoder.encode(value) for value in args]
            keywords = [encoder.encode(part) for pair in kwargs.items() for part in pair]
        except NoPlainForm as error:
            raise Misuse(f"an argument of the tests cannot cross: {error}") from None
        except BadValue as error:
            raise ValueError(str(error)) from None
        self.channel.send([operation, target, arguments, keywords, encoder.objects])
        while True:
            reply = self.channel.receive()
            kind = reply[0] if type(reply) is list and reply else None
            if kind == "callback" and len(reply) == 4:
                self.channel.send(self._call_back(*reply[1:]))
                continue
            break
        if kind == "ok" and len(reply) == 4:
            return self._accept(reply, args)
        if kind == "raise" and len(reply) == 3:
            raise self._exception(*reply[1:])
        if kind == "missing":
            raise SolutionFault("missing", f"the solution does not define {target}")
        if kind == "fatal" and len(reply) == 3:
            raise SolutionFault("fatal", f"{_first_name(reply[1])}: {reply[2]}")
        raise SolutionFault("bad_value", str(reply[1])[:200] if kind == "bad" else "an answer that is none")

    def _accept(self, reply: list[Any], args: tuple[Any, ...]) -> Any:
        _, value, changed, objects = reply
        decoder = Decoder(self._resolve, self._classes.__getitem__)
        try:
            indices = [index for index, _ in changed]
            result, *updates = decoder.decode_message([value, *[after for _, after in changed]], objects)
            for index, update in zip(indices, updates, strict=True):
                _update(args[index], update)
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise BadValue(f"{type(error).__name__} while accepting an answer") from None
        return result

    def _exception(self, names: Any, message: Any) -> Exception:
        """The nearest built-in exception class; control-flow exceptions become RuntimeError."""
        names = [name for name in names if type(name) is str] if type(names) is list else []
        kind: Any = RuntimeError if CONTROL_FLOW.intersection(names) else self._exception_class(names)
        text = str(message) if kind is not RuntimeError or not names else f"{names[0]}: {message}"
        try:
            error = kind(text)
        except TypeError:  # UnicodeError and the like take five arguments
            error = RuntimeError(text)
        self.raised = error
        return error

    def _exception_class(self, names: list[str]) -> type[Exception]:
        """What an exception class of the solution, the first of these names and derived from the others, is
        here.
        """
        found = getattr(builtins, names[0], None) if names else RuntimeError
        if isinstance(found, type) and issubclass(found, Exception):
            return found
        if names[0] not in self._exceptions:
            if len(names) > MAX_BASES or len(self._exceptions) > MAX_EXCEPTIONS:
                return RuntimeError
            self._exceptions[names[0]] = type(names[0], (self._exception_class(names[1:]),), {})
        return self._exceptions[names[0]]

    def _call_back(self, number: Any, args: Any, objects: Any) -> list[Any]:
        decoder = Decoder(self._resolve, self._classes.__getitem__)
        function = (
            self._callbacks[number] if type(number) is int and 0 <= number < len(self._callbacks) else None
        )
        if function is None:
            raise BadValue("a call to a function that was not passed")
        values = decoder.decode_message([args], objects)[0]
        encoder = Encoder(self._refer, self._is_shared)
        try:
            return ["ok", encoder.encode(function(*values)), encoder.objects]
        except Exception as error:
            return ["raise", [type(error).__name__, str(error)[:2000]], []]

    def look_up(self, name: str) -> Any:
        """A global of the solution, by name; KeyError if it has none."""
        try:
            return self.ask("get", name)
        except SolutionFault as fault:
            if fault.kind != "missing":
                raise
            self.fault = None
            raise KeyError(name) from None

    def look_up_attribute(self, name: str) -> Any:
        try:
            return self.look_up(name)
        except KeyError:
            raise AttributeError(name) from None

    def share(self, name: str, kind: type) -> None:
        """Lets objects of a class of the tests cross by their attributes, both ways."""
        self._classes[name] = kind
        self._unannounced.append(name)

    def _is_shared(self, kind: type) -> bool:
        return self._classes.get(kind.__name__) is kind

    def _refer(self, value: Any) -> list[Any]:
        if type(value) is Remote:
            return ["handle", object.__getattribute__(value, "_number")]
        if isinstance(value, type) and value in PLAIN_CLASSES:
            return ["builtin", value.__name__]
        if callable(value) and not isinstance(value, type):
            self._callbacks.append(value)
            return ["callback", len(self._callbacks) - 1]
        raise NoPlainForm(f"a {type(value).__name__} has no plain form")

    def _resolve(self, tag: str, number: Any) -> Any:
        if tag == "exception" and type(number) is list and all(type(name) is str for name in number):
            kind = self._exception_class(number)
            # `Error = Exception` of the solution must not catch what the tests raise by themselves
            return RuntimeError if issubclass(AssertionError, kind) else kind
        if tag != "handle" or type(number) is not int:
            raise BadValue(f"unknown tag {str(tag)[:40]!r}")
        if number not in self._remotes:
            self._remotes[number] = Remote(self, number)
        return self._remotes[number]


def _between(operation: str) -> Callable[[Remote, Any], Any]:
    def operate(self: Remote, other: Any) -> Any:
        return self._link.ask(operation, self._number, (other,)) if type(other) is Remote else NotImplemented

    return operate


class Remote:
    """An object of the solution that stays there. It equals itself only, is true, and contains nothing: its
    own word does not count.
    """

    __slots__ = ("_link", "_number")

    def __init__(self, link: Link, number: int) -> None:
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._link.ask("getattr", self._number, (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        self._link.ask("setattr", self._number, (name, value))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._link.ask("call", self._number, args, kwargs)

    def __getitem__(self, key: Any) -> Any:
        return self._link.ask("getitem", self._number, (key,))

    def __setitem__(self, key: Any, value: Any) -> None:
        self._link.ask("setitem", self._number, (key, value))

    def __delitem__(self, key: Any) -> None:
        self._link.ask("delitem", self._number, (key,))

    def __enter__(self) -> Any:
        return self._link.ask("enter", self._number)

    def __exit__(self, *_: object) -> None:
        self._link.ask("exit", self._number)

    def __instancecheck__(self, value: Any) -> bool:
        return type(value) is Remote and self._link.ask("isinstance", self._number, (value,)) is True

    def __len__(self) -> int:
        return self._link.ask("len", self._number)

    def __bool__(self) -> bool:
        return True

    __contains__ = None

    # Between two objects of the solution only: an operand of the tests could be an expected value.
    __add__, __sub__, __mul__ = _between("add"), _between("sub"), _between("mul")
    __truediv__, __matmul__ = _between("truediv"), _between("matmul")

    def __iter__(self) -> Any:
        iterator = self._link.ask("iter", self._number)
        return iterator if type(iterator) is Remote else iter(iterator)

    def __next__(self) -> Any:
        try:
            return self._link.ask("next", self._number)
        except RuntimeError as error:
            if str(error).startswith("StopIteration"):
                raise StopIteration from None
            raise

    def __str__(self) -> str:
        return str(self._link.ask("str", self._number))

    def __repr__(self) -> str:
        return str(self._link.ask("repr", self._number))


class Entry:
    """The entry point: calls it, and has the attributes of the class or function that it names."""

    def __init__(self, link: Link, path: str) -> None:
        self._link, self._path = link, path
        self.__name__ = path.rpartition(".")[2]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._link.ask("call", self._path, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._link.look_up_attribute(self._path), name)

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, self._link.look_up_attribute(self._path))


def _update(original: Any, update: Any) -> None:
    """Makes a mutable argument look as the solution left it."""
    for kind in (list, bytearray):
        if isinstance(original, kind) and isinstance(update, kind):
            original[:] = update  # pyright: ignore[reportIndexIssue]
            return
    for kind in (dict, set, collections.deque):
        if isinstance(original, kind) and isinstance(update, kind):
            original.clear()
            (original.extend if isinstance(original, collections.deque) else original.update)(update)
            return
    if type(original) is not type(update):
        raise BadValue("an argument changed its type")
    for name, value in attributes_of(update).items():
        object.__setattr__(original, name, value)


def _first_name(names: Any) -> str:
    return str(names[0])[:100] if type(names) is list and names else "error"
