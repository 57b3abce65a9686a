"""Environments of our own making with the interface of verifiers 0.1: a rubric, a dataset, async methods."""

from __future__ import annotations

import functools
import json


class Rubric:
    def __init__(self, funcs, weights=None, parser=None):
        self.funcs, self.weights, self.class_objects = funcs, weights or [], {"parser": parser}


class RubricGroup:
    def __init__(self, rubrics):
        self.rubrics, self.funcs, self.weights = rubrics, [], []


def solved(completion, answer, **kwargs) -> float:
    return float(completion[-1]["content"].strip() == answer)


async def turns(state) -> float:
    return float(len(state["trajectory"]))


def parsed(parser, info) -> float:
    return float(parser(info["text"]))


def broken(completion) -> float:
    raise KeyError("no such key")


class ReverseEnv:
    """Says "again" until the text is reversed, at most three times."""

    def __init__(self, max_turns: int, funcs) -> None:
        self.max_turns = max_turns
        self.rubric = RubricGroup([Rubric(funcs, [1.0] * len(funcs)), Rubric([turns], [0.0])])

    def get_dataset(self):
        words = ["abc", "xy"]
        return [
            {
                "prompt": [{"role": "user", "content": f"Reverse {word}"}],
                "answer": word[::-1],
                "task": "reverse",
                "info": json.dumps({"text": "1"}),
            }
            for word in words
        ]

    async def setup_state(self, state):
        state["tries"] = 0
        return state

    async def is_completed(self, state, **kwargs):
        return solved(state["completion"], state["answer"]) == 1 or len(state["trajectory"]) >= self.max_turns

    async def env_response(self, messages, state, **kwargs):
        state["tries"] += 1
        assert messages[0]["content"].startswith("Reverse") and messages[-1]["role"] == "assistant"
        return [{"role": "user", "content": f"again {state['tries']}"}]


class ToolEnv:
    """As verifiers' ToolEnv: a turn without a call ends it."""

    def __init__(self) -> None:
        self.rubric = Rubric([parsed], [0.5], parser=int)
        parameters = {"type": "object", "properties": {"x": {"type": "integer"}}}
        self.oai_tools = [{"type": "function", "function": {"name": "double", "parameters": parameters}}]

    async def is_completed(self, state, **kwargs):
        return "tool_calls" not in state["trajectory"][-1]["completion"][-1]

    async def env_response(self, messages, state, **kwargs):
        answers = []
        for call in messages[-1]["tool_calls"]:
            found = 2 * json.loads(call["function"]["arguments"])["x"]
            answers.append({"role": "tool", "content": str(found), "tool_call_id": call["id"]})
        return answers


class Groups(ReverseEnv):
    def __init__(self) -> None:
        super().__init__(3, [lambda completions: [0.0]])


def malformed(completion, times: float = 1.0) -> float:
    """Has the name of a count, and as a partial function none."""
    return 2.0 * times


class Strange(ReverseEnv):
    def __init__(self) -> None:
        super().__init__(1, [malformed, functools.partial(malformed, times=3.0)])


def load_environment(max_turns: int = 3, kind: str = "reverse"):
    if kind == "tools":
        return ToolEnv()
    if kind == "tool_defs":
        made = ReverseEnv(max_turns, [solved])
        made.tool_defs = [{"name": "double", "description": "", "parameters": {}}]
        return made
    if kind == "v1":
        return object()
    if kind == "strange":
        return Strange()
    if kind == "groups":
        return Groups()
    return ReverseEnv(max_turns, [broken] if kind == "broken" else [solved])
