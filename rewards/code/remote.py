"""Sends questions to the solution in its process, and proxies its objects (`Remote`)."""

from __future__ import annotations

import builtins
import collections
import contextlib
import itertools
import random
import sys
import types
from collections.abc import Callable
from typing import Any

from rewards.code.objects import KINDS, Remote, note_name
from rewards.code.protocol import BadValue, Channel, Closed, Decoder, Encoder, NoPlainForm, names_of, parts_of

# These could end a loop of the tests early, or the tests themselves; so they arrive as RuntimeError, as does
# what unittest takes for a skipped test.
CONTROL_FLOW = {"StopIteration", "StopAsyncIteration", "GeneratorExit", "SystemExit", "KeyboardInterrupt"}
MAX_BASES, MAX_EXCEPTIONS = 20, 1000
SEED = random.seed
OWN = "_is_of_the_solution"  # an attribute of exceptions
TALK = ("input", "print")  # if the tests replace these, the solution uses the replacements


class SolutionFault(BaseException):
    """The solution ended or broke the protocol. It is not an Exception, so that tests cannot catch it."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(kind, detail)
        self.kind = kind
        self.detail = detail


class Misuse(Exception):
    """The tests pass something that can never cross to a solution."""


class Link:
    """Asks the solution, one question at a time. After its first `fault`, every question raises it again."""

    def __init__(self, channel: Channel, on_first_call: Callable[[], None]) -> None:
        self.channel = channel
        self.num_calls = 0
        self.fault: SolutionFault | None = None
        self._on_first_call = on_first_call
        self._classes: dict[str, type] = {}
        self._unannounced: list[str] = []
        self._remotes: dict[int, Remote] = {}
        self._exceptions: dict[str, type[Exception]] = {}
        self._callbacks: list[Callable[..., Any]] = []
        self._named: set[int] = set()
        self.named_classes: set[int | str] = set()
        self._is_seeded = False
        self._world = self._around()

    def ask(self, operation: str, target: int | str, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Performs `operation` on an object of the solution and updates arguments that it changed in place.

        Raises:
            SolutionFault: the solution gave no usable answer.
            Exception: the solution raised, as the built-in class of the same name.
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
            if self._is_seeded:
                self._is_seeded = False
                self._ask("seed", 0, (random.getstate(),), {})
            if self._around() != self._world:
                return self._ask_around(operation, target, args, kwargs or {})
            return self._ask(operation, target, args, kwargs or {})
        except Closed:
            self.fault = SolutionFault("gone", "the solution ended before it answered")
        except BadValue as error:
            self.fault = SolutionFault("bad_value", str(error))
        except SolutionFault as fault:
            self.fault = fault
        raise self.fault

    def seed(self, *args: Any, **kwargs: Any) -> None:
        """Calls `random.seed` for the tests and, before its next answer, for the solution."""
        SEED(*args, **kwargs)
        self._is_seeded = True

    def _around(self) -> list[Any]:
        """The replacements by which tests control what a function reads and see what it prints."""
        return [sys.stdin, sys.stdout, sys.stderr, builtins.input, builtins.print]

    def _ask_around(self, operation: str, target: int | str, args: Any, kwargs: Any) -> Any:
        """`_ask`, while the solution reads the tests' stdin and prints to their stdout."""
        pairs = zip(self._around(), self._world, strict=True)
        stdin, *_, read, write = (now if now is not before else None for now, before in pairs)
        text = stdin.read() if stdin is not None else None
        self._ask("redirect", 0, (text, read, write), {})
        try:
            return self._ask(operation, target, args, kwargs)
        finally:
            rest, *printed = self._ask("restore", 0, (), {})
            if stdin is not None and type(rest) is str:
                stdin.seek(stdin.tell() - len(rest))
            for stream, words in zip((sys.stdout, sys.stderr), printed, strict=True):
                stream.write(words)

    def _ask(self, operation: str, target: int | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        encoder = Encoder(self._refer, self._is_shared)
        try:
            arguments = [encoder.encode(value) for value in args]
            keywords = [encoder.encode(part) for pair in kwargs.items() for part in pair]
        except NoPlainForm as error:
            # The solution chooses what the tests do not name, and values that fit its type.
            blamed = Misuse if type(target) is str or target in self._named else TypeError
            raise blamed(f"an argument of the tests cannot cross: {error}") from None
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
            return self._accept(reply, (*args, *kwargs.values()))
        if kind == "raise" and len(reply) == 3:
            raise self._exception(*reply[1:])
        if kind == "missing":
            raise SolutionFault("missing", f"the solution does not define {target}")
        if kind == "fatal" and len(reply) == 3:
            names = reply[1] if type(reply[1]) is list and reply[1] else ["error"]
            raise SolutionFault("fatal", f"{str(names[0])[:100]}: {reply[2]}")
        raise SolutionFault("bad_value", str(reply[1])[:200] if kind == "bad" else "a malformed answer")

    def _accept(self, reply: list[Any], args: tuple[Any, ...]) -> Any:
        _, value, changed, objects = reply
        decoder = Decoder(self._resolve, self._classes)
        try:
            same = type(value) is list and value[0] == "argument"
            afters = [None if same else value, *[after for _, after in changed]]
            result, *updates = decoder.decode_message(afters, objects)
            for (index, _), update in zip(changed, updates, strict=True):
                _update(args[index], update)
            return args[value[1]] if same else result
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise BadValue(f"{type(error).__name__} while accepting an answer") from None

    def _exception(self, names: Any, content: Any) -> Exception:
        """The nearest built-in exception. `content`: its message, then encoded arguments and attributes."""
        names = [name for name in names if type(name) is str] if type(names) is list else []
        message, args, attributes = content
        ends = any(name in CONTROL_FLOW or name.startswith("unittest.") for name in names)
        kind: Any = RuntimeError if ends else self._exception_class(names)
        text = str(message) if kind is not RuntimeError or not names else f"{names[0]}: {message}"
        args, attributes = Decoder(self._resolve, self._classes).decode_message([args, attributes], [])
        error: Exception = RuntimeError(text)  # UnicodeError and the like take five arguments
        for arguments in ((text,), args):
            with contextlib.suppress(Exception):
                made = kind(*arguments)
                error = made if str(made) == text or type(error) is not kind else error
        for name, value in attributes.items():
            if not name.startswith("_") or name == "__cause__":
                setattr(error, name, value)
        setattr(error, OWN, True)
        return error

    def _exception_class(self, names: list[str]) -> type[Exception]:
        """The local class for an exception class of the solution, given its name and those of its bases."""
        module, _, name = names[0].rpartition(".") if names else ("", "", "RuntimeError")
        is_library = module.partition(".")[0] in sys.stdlib_module_names
        found = getattr(sys.modules.get(module) if is_library else builtins, name, None)
        if isinstance(found, type) and issubclass(found, Exception):
            return found
        if names[0] not in self._exceptions:
            if len(names) > MAX_BASES or len(self._exceptions) > MAX_EXCEPTIONS:
                return RuntimeError
            self._exceptions[names[0]] = type(name, (self._exception_class(names[1:]),), {})
        return self._exceptions[names[0]]

    def _call_back(self, number: Any, args: Any, objects: Any) -> list[Any]:
        if type(number) is not int or not 0 <= number < len(self._callbacks):
            raise BadValue("a call to a function that was not passed")
        values, keywords = Decoder(self._resolve, self._classes).decode_message([args], objects)[0]
        encoder = Encoder(self._refer, self._is_shared)
        try:
            return ["ok", encoder.encode(self._callbacks[number](*values, **keywords)), encoder.objects]
        except Exception as error:
            return ["raise", [type(error).__name__, str(error)[:2000]], []]

    def look_up(self, name: str) -> Any:
        """A global of the solution by name; KeyError if there is none."""
        try:
            found = self.ask("get", name)
            if type(found) is Remote:
                self._named.add(found._number)
                note_name(found, name)
            return found
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
        """Lets objects of a class of the tests cross by their attributes, in both directions."""
        self._classes[name] = kind
        self._unannounced.append(name)

    def _is_shared(self, kind: type) -> bool:
        return self._classes.get(kind.__name__) is kind

    def _refer(self, value: Any) -> list[Any]:
        """A reference to a value without a plain form. Values that the solution can influence always have
        one: its exceptions, coroutines and classes, and whatever Python makes from plain values.
        """
        kind = type(value)
        if kind is Remote:
            return ["handle", object.__getattribute__(value, "_number")]
        if isinstance(value, BaseException):
            return ["error", [names_of(kind), str(value)[:2000]]]
        if kind is types.CoroutineType:
            try:
                value.send(None)
            except StopIteration as done:
                return ["awaitable", Encoder(self._refer, self._is_shared).encode(done.value)]
            raise NoPlainForm("a coroutine that waits has no plain form")
        if issubclass(kind, type) and issubclass(value, BaseException):
            return ["exception", names_of(value)]
        name = getattr(value, "__name__", None)
        if type(name) is str and getattr(builtins, name, None) is value and name not in TALK:
            return ["builtin", name]
        if callable(value):
            names = (getattr(value, name, None) for name in ("__name__", "__doc__"))
            return ["callback", [self._passed(value), *(text if type(text) is str else "" for text in names)]]
        if hasattr(kind, "__next__"):
            return ["iterator", self._passed(lambda: [*itertools.islice(value, 1)])]
        if kind.__module__ == "numpy" and hasattr(value, "tolist"):
            return ["array", [Encoder(self._refer, self._is_shared).encode(value.tolist()), str(value.dtype)]]
        raise NoPlainForm(f"a {kind.__name__} has no plain form")

    def _passed(self, function: Callable[..., Any]) -> int:
        self._callbacks.append(function)
        return len(self._callbacks) - 1

    def _resolve(self, tag: str, number: Any) -> Any:
        if tag == "exception" and type(number) is list and all(type(name) is str for name in number):
            kind = self._exception_class(number)
            # `Error = Exception` of the solution must not catch what the tests raise by themselves
            return RuntimeError if issubclass(AssertionError, kind) else kind
        if tag == "error":
            return self._exception(*number)
        if tag == "builtin" and type(number) is str and number in KINDS:
            return KINDS[number]
        if tag != "handle" or type(number) is not int:
            raise BadValue(f"unknown tag {str(tag)[:40]!r}")
        if number not in self._remotes:
            self._remotes[number] = Remote(self, number)
        return self._remotes[number]


def _update(original: Any, update: Any) -> None:
    """Gives a mutable argument the contents that the solution left in it."""
    for kind in (list, bytearray, dict, set, collections.deque):
        if isinstance(original, kind) and isinstance(update, kind):
            original.clear()
            (original.extend if hasattr(original, "extend") else original.update)(update)  # pyright: ignore
            return
    if type(original) is not type(update):
        raise BadValue("an argument changed its type")
    if type(update).__module__ == "_io":  # a file in memory
        getattr(original, "__setstate__")(update.__getstate__())  # noqa: B009
        return
    for name, value in parts_of(update).items():
        object.__setattr__(original, name, value)
