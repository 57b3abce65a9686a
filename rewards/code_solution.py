"""Serves an untrusted solution to the tester: runs its source as a module, then answers calls. Runs inside
the sandbox.

Nothing here is trusted: the solution shares this process and may answer in our place. It learns one call's
arguments at a time and never an expected value, so all that it can forge is a return value.
"""

from __future__ import annotations

import builtins
import json
import operator
import re
import sys
from collections.abc import Callable
from types import CoroutineType
from typing import Any, cast

from rewards.code_protocol import BadValue, Channel, Closed, Decoder, Encoder, dumps, loads
from rewards.sandbox_script import module_named, open_special, report_exception

MAX_HANDLES = 1_000_000
MAX_MESSAGE = 2000
WARM_ROUNDS = 30
# What LeetCode's judge has imported. Not `operator` or `math.pow`: they would hide built-ins, or answer for
# a missing solution.
LEETCODE_PRELUDE = compile(
    "from typing import *\nfrom collections import *\nfrom functools import *\nfrom itertools import *\n"
    "from heapq import *\nfrom bisect import *\nfrom math import *\nfrom math import inf\ndel pow\n"
    "import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys\n",
    "<prelude>",
    "exec",
)
CALLS = re.compile(r"[^\W\d]\w*(?:\(\)|\.[^\W\d]\w*)*\Z")
MUTABLE = ("list", "dict", "set", "bytearray", "deque", "counter", "ordered", "object")
OPERATIONS: dict[str, Callable[..., Any]] = {
    "get": lambda target: target,
    "call": lambda target, *args, **kwargs: target(*args, **kwargs),
    "getattr": getattr,
    "setattr": setattr,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "delitem": operator.delitem,
    "len": len,
    "iter": iter,
    "next": next,
    "str": str,
    "repr": repr,
    "enter": lambda target: type(target).__enter__(target),
    "exit": lambda target: type(target).__exit__(target, None, None, None),
    "isinstance": lambda target, value: isinstance(value, target),
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "matmul")},
}


def main(source: bytes) -> int:
    """`source`: {"code", "prompt", "own", "leetcode"} as JSON. Answers calls from descriptor 3 on
    descriptor 4 until the tester ends.
    """
    given = json.loads(source)
    builtins.open = open_special
    server = Server(Channel(3, 4))
    try:
        server.load(given)
        while True:
            server.answer(server.channel.receive())
    except (Closed, BadValue):
        return 0


class _Sink:
    """A channel that encodes and forgets."""

    def send(self, message: Any) -> None:
        dumps(message)


def warm_up() -> None:
    """Serves a solution of ours in this process, so that its forks are warm."""
    given = {"code": "def f(a, b):\n    return list(a)\n", "prompt": "", "own": ["f"], "leetcode": False}
    for _ in range(WARM_ROUNDS):
        server = Server(cast(Channel, _Sink()))
        server.load(given)
        for arguments in ([["list", [1, 2]], "a"], [["tuple", [1.5]], 3]):
            server.answer(loads(dumps(["call", "f", arguments, [], []])))
    del sys.modules["solution"]


class Server:
    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.module = module_named("solution")
        self.handles: list[Any] = []
        self.shared: set[str] = set()
        self.fatal: list[Any] = []

    def load(self, given: dict[str, Any]) -> None:
        """Runs the source. What it raises becomes the answer to the first call."""
        names = self.module.__dict__
        if given["leetcode"]:
            exec(LEETCODE_PRELUDE, names)
        if given["prompt"]:
            try:
                exec(compile(given["prompt"], "<prompt>", "exec", dont_inherit=True), names)
            except Exception:
                report_exception()  # a prompt may be prose or an unfinished function
            for name in given["own"]:  # a stub or an import of the prompt is no solution
                names.pop(name, None)
        try:
            exec(compile(given["code"], "<solution>", "exec", dont_inherit=True), names)
        except BaseException as error:
            report_exception()
            self.fatal = ["fatal", *_described(error)]

    def answer(self, question: Any) -> None:
        """Does one operation: [operation, target, arguments, keyword pairs, objects]."""
        operation, target, arguments, keywords, objects = question
        if self.fatal:
            self.channel.send(self.fatal)
            return
        if operation == "share":  # classes of the tester whose objects cross by their attributes
            self.shared.update(arguments)
            self.channel.send(["ok", None, [], []])
            return
        try:
            decoder = Decoder(self._resolve, self._class)
            args, kwargs = decoder.decode_message([["list", arguments], ["dict", keywords]], objects)
            found = self.handles[target] if type(target) is int else self._find(target)
            result = OPERATIONS[operation](found, *args, **kwargs)
            reply = self._reply(result, arguments, args, bool(objects))
        except _Missing as missing:
            reply = ["missing", str(missing)]
        except BaseException as error:
            reply = ["raise", *_described(error)]
        try:
            self.channel.send(reply)
        except BadValue as error:
            self.channel.send(["bad", str(error)])

    def _reply(self, result: Any, sent: list[Any], args: list[Any], with_objects: bool) -> list[Any]:
        encoder = Encoder(self._refer, self._is_shared)
        try:
            value = _awaited(encoder, result) if type(result) is CoroutineType else encoder.encode(result)
            changed = []
            for index, before in enumerate(sent):
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
            return ["exception", [kind.__name__ for kind in value.__mro__[:-1]]]
        if len(self.handles) >= MAX_HANDLES:
            raise BadValue(f"more than {MAX_HANDLES} objects that cannot cross")
        self.handles.append(value)
        return ["handle", len(self.handles) - 1]

    def _resolve(self, tag: str, number: int) -> Any:
        if tag == "handle":
            return self.handles[number]
        if tag == "builtin":
            return getattr(builtins, str(number))
        return lambda *args: self._call_back(number, args)

    def _call_back(self, number: int, args: tuple[Any, ...]) -> Any:
        """Calls a function that the tester passed as an argument."""
        encoder = Encoder(self._refer, self._is_shared)
        self.channel.send(["callback", number, encoder.encode(args), encoder.objects])
        kind, value, objects = self.channel.receive()
        decoder = Decoder(self._resolve, self._class)
        if kind == "raise":
            raise getattr(builtins, value[0], RuntimeError)(value[1])
        return decoder.decode_message([value], objects)[0]

    def _class(self, name: str) -> type:
        """The solution's class of that name; if it defines none, a plain one that it then shares with the
        tester.
        """
        found = self.module.__dict__.get(name)
        if not isinstance(found, type):
            found = self.module.__dict__[name] = type(name, (), {"__module__": "solution"})
        self.shared.add(name)
        return found

    def _is_shared(self, kind: type) -> bool:
        return kind.__name__ in self.shared and kind.__module__ == "solution"


def _awaited(encoder: Encoder, coroutine: Any) -> list[Any]:
    """What an `async def` returns: carried out here, to be awaited there."""
    import asyncio

    return ["awaitable", encoder.encode(asyncio.run(coroutine))]


class _Missing(Exception):
    pass


def _refuse(value: Any) -> list[Any]:
    raise BadValue(f"{type(value).__name__} inside an array")


def _described(error: BaseException) -> tuple[list[str], str]:
    """The names of the exception's classes, nearest first, and its message."""
    try:
        message = str(error)[:MAX_MESSAGE]
    except BaseException:
        message = ""
    return [kind.__name__ for kind in type(error).__mro__[:-1]], message
