"""Tool calls are parsed and never evaluated; TRL's functions and classes run as they are."""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from recipes.environments import load
from recipes.environments.arithmetic import value_of
from recipes.environments.calls import answer_calls, calls_in, generator, now
from recipes.environments.wiring import schema_hash
from rollout.environment import EnvironmentFault, Turn

sys.path.append(str(Path(__file__).parent))


def called(name: str, **arguments) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def add(a: int, b: int = 1) -> int:
    return a + b


def down(a: int) -> int:
    raise EnvironmentFault("the server is down")


TOOLS = {"add": add, "down": down, "fails": lambda: {}["x"], "gives": lambda: {"é": [1]}}
TOOLS["says"] = lambda text: len(text)


@pytest.mark.parametrize(
    ("text", "content", "malformed", "errors"),
    [
        (called("add", a=1, b=2), "3", 0, 0),
        ("I add. " + called("add", a=1) + " done", "2", 0, 0),
        ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 4}"}</tool_call>', "5", 0, 0),
        (called("says", text="[" * 200), "200", 0, 0),
        (
            '<tool_call>{"name": "says", "arguments": {"text": ' + "[" * 99 + "]" * 99 + "}}",
            "error: the call is nested",
            1,
            0,
        ),
        (called("says", text="</think>"), "8", 0, 0),
        ("<think>x</think>" + called("says", text="</tool_call><tool_call>"), "23", 0, 0),
        (
            called("add", a=1)[:-12] + ", b=2</tool_call>",
            "error: the call is not valid JSON: something",
            1,
            0,
        ),
        (called("add", a=float("nan")), "error: arguments must be plain JSON values", 1, 0),
        ("<tool_call>" * 9_000, "error: the call is not valid JSON", 1, 0),
        (called("gives"), '{"\\u00e9": [1]}', 0, 0),
        ("<tool_call>{'name': 'add'}</tool_call>", "error: the call is not valid JSON: Expecting", 1, 0),
        ('<tool_call>{"name": "add", "arguments": {"a": 1', "error: the call is not valid JSON", 1, 0),
        ("<tool_call>[1]</tool_call>", 'error: a call is a JSON object with "name" and "arguments"', 1, 0),
        ('<tool_call>{"name": "add", "arguments": [1]}', 'error: "arguments" must be a JSON object', 1, 0),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "error: the call is nested too deep", 1, 0),
        (called("sub", a=1), "error: there is no tool 'sub'; there are add, down, fails, gives, says", 1, 0),
        (called("add", b=1), "error: add: missing a required argument: 'a'", 1, 0),
        (called("add", a=1, c=1), "error: add: got an unexpected keyword argument 'c'", 1, 0),
        (called("fails"), "error: KeyError: 'x'", 0, 1),
        (called("__import__", x="os"), "error: there is no tool '__import__'", 1, 0),
    ],
)
def test_a_call_is_answered_with_its_value_or_with_what_is_wrong(text, content, malformed, errors):
    (message,), counts = answer_calls(Turn(0, text), TOOLS)
    seconds = {name: counts.pop(name) for name in list(counts) if "/" in name}
    assert list(seconds) == ([] if malformed else [f"seconds/{message['name']}"])
    assert message["role"] == "tool" and message["content"].startswith(content)
    assert counts == {"calls": 1, "malformed": malformed, "tool_errors": errors}


def test_several_calls_are_answered_in_order_and_not_without_end():
    messages, counts = answer_calls(Turn(0, "".join(called("add", a=n) for n in range(10))), TOOLS)
    assert 0 <= counts.pop("seconds/add") < 1
    assert [m["content"] for m in messages[:8]] == [str(n + 1) for n in range(8)]
    assert {m["content"] for m in messages[8:]} == {"error: more than 8 calls in a turn are not made"}
    assert counts == {"calls": 10, "malformed": 2, "tool_errors": 0}
    for thought in (called("add", a=1), "<tool_call>{nonsense"):
        assert calls_in("<think>" + thought + "</think> no") == []
        assert calls_in(thought + "</think> no") == []  # the prompt began to think
    assert answer_calls(Turn(0, "the answer is 4"), TOOLS)[0] == []
    with pytest.raises(EnvironmentFault, match="the server is down"):
        answer_calls(Turn(0, called("down", a=1)), TOOLS)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 + 3 * 4", "14"),
        ("-(7 // 2) % 5", "2"),
        ("1 / 3", "0.333333333333333"),
        ("0.1 + 0.2", "0.3"),
        ("2 ** -2", "0.25"),
        ("2 ** 100", str(2**100)),
    ],
)
def test_arithmetic_is_exact(expression, value):
    assert value_of(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "9 ** 9 ** 9",
        "__import__('os')",
        "x",
        "True",
        "1j",
        "(" * 500,
        "1 +",
        "2 ** 0.5",
        "'a' * 9",
        "9" * 2000,
        "(2 ** 4000) * (2 ** 4000)",
        "[1][0]",
        "f(1)",
    ],
)
def test_what_is_not_arithmetic_or_too_large_is_refused(expression):
    with pytest.raises(ValueError):
        value_of(expression)


def test_trls_functions_are_tools_with_transformers_schemas():
    environment = load("tools", {"functions": ["tools_in_trls_shape:multiply"]})
    (schema,) = environment.tools
    assert schema["function"]["name"] == "multiply"
    assert schema["function"]["description"] == "Multiplies two integers."
    assert schema["function"]["parameters"]["properties"]["b"] == {
        "type": "integer",
        "description": "The second integer.",
    }
    assert not environment.repeatable
    episode = environment.open({}, 0)
    reply = episode.step(Turn(0, called("multiply", a=6, b=7)))
    assert (reply.messages[0]["content"], reply.done, reply.state) == ("42", False, {})
    reply = episode.step(Turn(1, "42"))
    assert (reply.messages, reply.done, reply.reward) == ((), True, None)
    other = json.loads(json.dumps(schema).replace("Multiplies", "Multiply"))
    assert schema_hash([schema]) != schema_hash([other])


def test_trls_environment_runs_as_it_is_and_goes_on_from_its_attributes():
    environment = load("trl", {"factory": "tools_in_trls_shape:IncrementEnv"})
    assert [tool["function"]["name"] for tool in environment.tools] == ["increment"]
    episode = environment.open({"start": 1, "tools": []}, 0)
    first = episode.step(Turn(0, called("increment", step=2)))
    assert (first.messages[0]["content"], first.state) == ("3", {"counter": 3})
    again = environment.open({"start": 1}, 0, first.state)
    for one in (episode, again):
        assert one.step(Turn(1, called("increment", step=2))).messages[0]["content"] == "5"
        last = one.step(Turn(2, "done"))
        assert (last.done, last.reward) == (True, 1.0)
    with pytest.raises(EnvironmentFault, match="belongs in the prompt"):
        environment.open({"says": "Count."}, 0)
    other = load("trl", {"factory": "tools_in_trls_shape:KeepsMore"})
    assert other.open({}, 0).step(Turn(0, called("increment", step=2))).state is None
    # JSON would give its numbers back as text: another state, and nobody would know.
    other = load("trl", {"factory": "tools_in_trls_shape:KeepsNumbers"})
    assert other.open({}, 0).step(Turn(0, called("increment", step=2))).state is None


def test_a_python_session_keeps_names_and_goes_on_from_its_cells():
    environment: Any = load("python", {"timeout_s": 60.0})
    try:
        episode = environment.open({}, 0)
        run = lambda code, e=episode: e.step(Turn(0, called("python", code=code)))  # noqa: E731
        said = lambda reply: reply.messages[0]["content"]  # noqa: E731
        assert said(run("x = 6\nprint('six')")) == "six\n"
        assert said(run("print(x * 7)")) == "42\n"
        assert said(run("y = 1")) == "(no output)"
        divided = run("print('a'); 1 / 0")
        assert said(divided) == "a\nerror: ZeroDivisionError: division by zero"
        assert divided.facts["tool_errors"] == 1 and divided.facts["seconds/python"] > 0
        assert "SyntaxError" in said(run("def"))
        patient = environment.sandbox.limits
        environment.sandbox.limits = replace(patient, timeout_s=2.0)
        assert said(run("while True: pass")) == "error: no end within 2 s"
        environment.sandbox.limits = patient
        assert said(run("import socket; socket.socket()")).startswith("error: ")
        last = run("print(x + y)")
        assert said(last) == "7\n" and last.facts["tool_errors"] == 0
        assert said(run("print('z' * 3_000_000)")).startswith("error: more than 1 MiB of output\nz")
        assert (
            said(run("import sys; print('a', end=''); sys.exit()")) == "aerror: the program ended the session"
        )
        assert said(run("print(x + y)")) == "7\n"
        environment.sandbox.limits = replace(patient, timeout_s=2.0)
        began = time.monotonic()
        messages = episode.step(Turn(0, called("python", code="while True: pass") * 3)).messages
        assert time.monotonic() - began < 5.5  # 2 s for all three together; 6 s if each had its own
        environment.sandbox.limits = patient
        assert {m["content"].partition(" within")[0] for m in messages} == {"error: no end"}
        again = environment.open({}, 0, last.state)
        assert said(run("print(x, y)", again)) == "6 1\n"
    finally:
        environment.close()


def test_tools_draw_and_read_the_clock_by_seed_turn_and_call():
    """So that a call that is made again after a kill has the same answer."""

    def look() -> list:
        return [random.random(), generator().random(), now().isoformat()]

    def answers(seed: int, number: int) -> list:
        messages, _ = answer_calls(Turn(number, called("look") * 2), {"look": look}, seed)
        return [json.loads(m["content"]) for m in messages]

    first, second = answers(3, 0)
    random.seed()  # whatever happened in between
    assert answers(3, 0) == [first, second]
    assert len({x[0] for seed in (3, 4) for n in (0, 1) for x in answers(seed, n)}) == 8
    assert first[1] != second[1] and first[2] == second[2]
    (later, _), (other, _) = answers(3, 1), answers(4, 0)
    day = datetime.fromisoformat(first[2])
    assert datetime.fromisoformat(later[2]) - day == timedelta(minutes=1)
    assert day.year == 2026 and other[2] != first[2]


def test_a_python_session_draws_what_it_drew_before():
    environment = load("python", {"timeout_s": 60.0})
    cell = called("python", code="import random\nx = random.random()\nprint(x)")
    first = environment.open({}, 3).step(Turn(0, cell))
    again = environment.open({}, 3, first.state).step(Turn(1, called("python", code="print(x)")))
    assert 0 < float(first.messages[0]["content"]) < 1
    assert again.messages[0]["content"] == first.messages[0]["content"]
    assert environment.open({}, 4).step(Turn(0, cell)).messages[0]["content"] != first.messages[0]["content"]
    environment.close()
