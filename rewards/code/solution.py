"""Serves an untrusted solution to the tester in the sandbox: runs its source as a module and answers calls.

Nothing here is trusted: the solution shares this process and may answer for it. It sees the arguments of one
call at a time and never an expected value, so it can forge return values only. (Only tests that write `5 in
made` or `made + 5`, with an object of the solution, reveal more; see `rewards.code.objects`.)
"""

from __future__ import annotations

import builtins
import contextlib
import copy
import io
import json
import math
import operator
import random
import re
import sys
from collections.abc import Callable, Iterator
from types import CoroutineType, SimpleNamespace
from typing import Any, cast

from rewards.code.protocol import BadValue, Channel, Closed, Decoder, Encoder, dumps, names_of, parts_of
from rewards.sandbox.script import module_named, open_special, report_exception

MAX_HANDLES = 1_000_000
MAX_MESSAGE = 2000
WARM_ROUNDS = 30
HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that Python code made
# What LeetCode's judge has imported. Not `operator` or `math.pow`: they would hide built-ins, or answer for
# a missing solution.
LEETCODE_PRELUDE = compile(
    "from typing import *\nfrom collections import *\nfrom functools import *\nfrom itertools import *\n"
    "from heapq import *\nfrom bisect import *\nfrom math import *\nfrom math import inf\ndel pow\n"
    "import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys\n"
    "class ListNode:\n    def __init__(self, val=0, next=None): self.val, self.next = val, next\n"
    "class TreeNode:\n    def __init__(self, val=0, left=None, right=None):\n"
    "        self.val, self.left, self.right = val, left, right\n",
    "<prelude>",
    "exec",
)
CALLS = re.compile(r"[^\W\d]\w*(?:\(\)|\.[^\W\d]\w*)*\Z")
MUTABLE = "list dict set bytearray deque Counter OrderedDict object StringIO BytesIO".split()  # noqa: SIM905


def _claimed(compare: Callable[[Any, Any], Any]) -> Callable[[Any, Any], bool]:
    """A comparison by the solution that counts only if it fails for a twin with other attributes."""

    def answer(one: Any, other: Any) -> bool:
        holds = bool(compare(one, other))
        if one is other or not holds:
            return holds
        try:
            hollow = object.__new__(type(one))
        except TypeError:  # for a number, say: the built-in class decides
            base = next(kind for kind in type(one).__mro__ if not kind.__flags__ & HEAP_TYPE)
            return getattr(base, f"__{compare.__name__}__")(one, other) is True
        try:
            for name in parts_of(one):
                object.__setattr__(hollow, name, object())
            return not compare(hollow, other)
        except Exception:
            return True

    return answer


OPERATIONS: dict[str, Callable[..., Any]] = {
    "get": lambda target: target,
    "plain": lambda target: target,
    "enter": lambda target: type(target).__enter__(target),
    "exit": lambda target, error: type(target).__exit__(target, error and type(error), error, None) and None,
    "next": lambda target: [item for item in [next(target, _Missing)] if item is not _Missing],
    "yields_items": lambda target: hasattr(target, "__iter__") or not hasattr(target, "__contains__"),
    "isinstance": lambda target, value: isinstance(value, target),
    "subclasscheck": lambda target, kind: issubclass(kind, target),
    "kind": lambda target: next(k.__name__ for k in type(target).__mro__ if k.__module__ != "solution"),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{name: _claimed(getattr(operator, name)) for name in ("eq", "lt", "le", "gt", "ge", "contains")},
}


def operation(name: str) -> Callable[..., Any]:
    """The function for the tester's name of an operation; `radd` is `add` with swapped operands."""
    for place in (operator, builtins, math):
        if name in OPERATIONS or hasattr(place, name):
            return OPERATIONS.get(name) or getattr(place, name)
    return lambda one, other: operation(name[1:])(other, one)


def main(source: bytes) -> int:
    """Answers calls until the tester ends. `source`: {"code", "prompt", "own", "leetcode"} as JSON."""
    given = json.loads(source)
    builtins.open = open_special
    server = Server(Channel(3, 4))
    try:
        server.load(given)
        while True:
            server.answer(server.channel.receive())
    except (Closed, BadValue):
        return 0


def warm_up() -> None:
    """Serves a trivial solution in this process, so that its forks start warm."""
    given = {"code": "def f(a, b):\n    return list(a)\n", "prompt": "", "own": ["f"], "leetcode": False}
    for _ in range(WARM_ROUNDS):
        server = Server(cast(Channel, SimpleNamespace(send=dumps)))
        server.load(given)
        for arguments in ([["list", [1, 2]], "a"], [["tuple", [1.5]], 3]):
            server.answer(["call", "f", arguments, [], []])
    del sys.modules["solution"]


class Server:
    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.module = module_named("solution")
        self.handles: list[Any] = []
        self.numbers: dict[int, int] = {}  # of handles, by identity
        self.operations = {"seed": random.setstate, "redirect": self._redirect, "restore": self._restore}
        self.usual = (sys.stdin, sys.stdout, sys.stderr, builtins.input, builtins.print)
        self.shared: set[str] = set()
        self.fatal: list[Any] = []

    def load(self, given: dict[str, Any]) -> None:
        """Runs the source. An exception becomes the answer to the first call."""
        names = self.module.__dict__
        if given["leetcode"]:
            exec(LEETCODE_PRELUDE, names)
        if given["prompt"]:
            try:
                exec(compile(given["prompt"], "<prompt>", "exec", dont_inherit=True), names)
            except Exception:
                report_exception()  # a prompt may be prose or an unfinished function
        for name in given["own"]:  # a stub or an import of the prompt, or of the prelude, is not a solution
            names.pop(name, None)
        try:
            exec(compile(given["code"], "<solution>", "exec", dont_inherit=True), names)
        except BaseException as error:
            report_exception()
            names, content = self._described(error)
            self.fatal = ["fatal", names, content[0]]

    def answer(self, question: Any) -> None:
        """Does one operation: [operation, target, arguments, keyword pairs, objects]."""
        name, target, arguments, keywords, objects = question
        if self.fatal:
            self.channel.send(self.fatal)
            return
        if name == "share":  # classes of the tester whose objects cross by their attributes
            self.shared.update(arguments)
            self.channel.send(["ok", None, [], []])
            return
        try:
            decoder = Decoder(self._resolve, cast(Any, self))
            args, kwargs = decoder.decode_message([["list", arguments], ["dict", keywords]], objects)
            if name in self.operations:
                result = self.operations[name](*args)
            else:
                found = self.handles[target] if type(target) is int else self._find(target)
                result = operation(name)(found, *args, **kwargs)
            given = [*args, *kwargs.values()]
            reply = self._reply(
                result,
                [*arguments, *keywords[1::2]],
                args=given,
                with_objects=bool(objects),
                as_plain=name == "plain",
            )
        except _Missing as missing:
            reply = ["missing", str(missing)]
        except BaseException as error:
            reply = ["raise", *self._described(error)]
        try:
            self.channel.send(reply)
        except BadValue as error:
            self.channel.send(["bad", str(error)])

    def _reply(
        self, result: Any, sent: list[Any], *, args: list[Any], with_objects: bool, as_plain: bool
    ) -> list[Any]:
        encoder = Encoder(self._refer, self._is_shared)
        try:
            if type(result) is CoroutineType:
                import asyncio

                value = ["awaitable", encoder.encode(asyncio.run(result))]  # run here, awaited by the tests
            else:
                value = encoder.encode_plain(result) if as_plain else encoder.encode(result)
            changed = []
            for index, before in enumerate(sent):
                if type(before) is list and args[index] is result:
                    value = ["argument", index]
                if type(before) is list and before[0] in MUTABLE:
                    after = encoder.encode(args[index])
                    if after != before or with_objects:
                        changed.append([index, after])
            return ["ok", value, changed, encoder.objects]
        except BadValue as error:
            return ["bad", str(error)]

    def _find(self, path: str) -> Any:
        """The object that an entry point such as `add`, `Solution().twoSum` or `Stack.push` names."""
        if not CALLS.match(path):
            raise _Missing(path)
        first, *rest = re.findall(r"\(\)|\w+", path)
        try:
            found = self.module.__dict__[first]
            for step in rest:
                found = found() if step == "()" else getattr(found, step)
        except (KeyError, AttributeError):
            raise _Missing(path) from None
        return found

    def _refer(self, value: Any) -> list[Any]:
        if type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "tolist"):
            return Encoder(_refuse, lambda kind: False).encode(value.tolist())
        if isinstance(value, type) and issubclass(value, Exception):
            return ["exception", names_of(value)]
        if isinstance(value, Exception):
            return ["error", self._described(value)]
        if isinstance(value, type) and getattr(builtins, value.__name__, None) is value:
            return ["builtin", value.__name__]
        number = self.numbers.setdefault(id(value), len(self.handles))
        if number == len(self.handles):
            if number >= MAX_HANDLES:
                raise BadValue(f"more than {MAX_HANDLES} objects that cannot cross")
            self.handles.append(value)
        return ["handle", number]

    def _resolve(self, tag: str, content: Any) -> Any:
        if tag == "handle":
            return self.handles[content] if type(content) is int else self._find(content)
        if tag == "builtin":
            return getattr(builtins, str(content))
        if tag == "iterator":
            return self._walk(content)
        if tag == "array":
            items = Decoder(self._resolve, cast(Any, self)).decode(content[0])
            return sys.modules["numpy"].array(items, content[1])
        if tag in ("exception", "error"):
            kind = self._exception_class(content if tag == "exception" else content[0])
            return kind if tag == "exception" else kind.__new__(kind, content[1])
        number, name, text = content

        def function(*args: Any, **kwargs: Any) -> Any:
            return self._call_back(number, args, kwargs)

        function.__name__, function.__doc__ = str(name), text
        return function

    def _exception_class(self, names: list[str]) -> Any:
        module, _, name = names[0].rpartition(".")
        for place in (self.module, sys.modules.get(module or "builtins")):
            if hasattr(place, name):
                return getattr(place, name)
        return self._exception_class(names[1:])

    def _call_back(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls a function that the tester passed as an argument, and answers its questions meanwhile."""
        encoder = Encoder(self._refer, self._is_shared)
        self.channel.send(["callback", number, encoder.encode((args, kwargs)), encoder.objects])
        while len(reply := self.channel.receive()) > 3:
            self.answer(reply)
        kind, value, objects = reply
        if kind == "raise":
            raise getattr(builtins, value[0], RuntimeError)(value[1])
        return Decoder(self._resolve, cast(Any, self)).decode_message([value], objects)[0]

    def _walk(self, number: int) -> Iterator[Any]:
        while items := self._call_back(number, (), {}):
            yield from items

    def _redirect(self, text: str | None, read: Any, write: Any) -> None:
        sys.stdin = sys.stdin if text is None else io.StringIO(text)
        sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
        builtins.input, builtins.print = read or builtins.input, write or builtins.print

    def _restore(self) -> list[Any]:
        """The unread rest of stdin, and what was printed to stdout and stderr."""
        rest = cast(Any, sys.stdin).read() if sys.stdin is not self.usual[0] else None
        printed = [cast(Any, stream).getvalue() for stream in (sys.stdout, sys.stderr)]
        sys.stdin, sys.stdout, sys.stderr, builtins.input, builtins.print = self.usual
        return [rest, *printed]

    def get(self, name: str) -> Any:
        return self.module.__dict__.get(name)

    def __getitem__(self, name: str) -> type:
        """The solution's class of that name, or else a plain new one, which is now shared with the tester."""
        found = self.get(name)
        if not isinstance(found, type):
            found = self.module.__dict__[name] = type(name, (), {"__module__": "solution"})
        self.shared.add(name)
        return found

    def _described(self, error: BaseException) -> list[Any]:
        """The names of the exception's classes, nearest first; its message, arguments and attributes."""
        try:
            message = str(error)[:MAX_MESSAGE]
        except BaseException:
            message = ""
        content: list[Any] = [message, ["tuple", []], ["dict", []]]
        with contextlib.suppress(BadValue, Exception):
            encode = Encoder(self._refer, lambda kind: False).encode
            content[1:] = encode(error.args), encode({**vars(error), "__cause__": error.__cause__})
        return [names_of(type(error)), content]

    def _is_shared(self, kind: type) -> bool:
        return kind.__name__ in self.shared and kind.__module__ == "solution"


class _Missing(Exception):
    pass


def _refuse(value: Any) -> list[Any]:
    raise BadValue(f"{type(value).__name__} inside an array")
