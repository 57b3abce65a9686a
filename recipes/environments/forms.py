"""Readers of the forms in which model families write tool calls, and the form that a chat template uses.

The package `renderers` (0.1.12, Apache-2.0) reads most forms from token ids, so that a tag spelled in letters
is text. The Hermes form (Qwen2.5, Qwen3) is read by `calls.calls_in`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from recipes.environments.calls import TOO_DEEP, calls_in, checked_call
from rollout.environment import ReadCalls, ToolCall
from rollout.template import Chat, render_chats

DEEPSEEK = {
    f"{key}_id": f"<｜{key.replace('_', '▁')}｜>"
    for key in ("tool_calls_begin", "tool_calls_end", "tool_call_begin", "tool_call_end", "tool_sep")
}
TAGS = {f"{key}_id": f"<{key}>" for key in ("tool_call", "arg_key", "arg_value")}
TAGS |= {f"{key}_end_id": f"</{key}>" for key in ("tool_call", "arg_key", "arg_value")}
THINK = {"think_id": "<think>", "think_end_id": "</think>"}
HARMONY = {f"{key}_id": f"<|{key}|>" for key in ("return", "call", "start", "end", "channel", "message")}
HARMONY["constrain_id"] = "<|constrain|>"
DEEPSEEKS = ("deepseek", "deepseek_v31", "deepseek_v32")
MAY_LACK = (*THINK, "constrain_id")
RENDERED: dict[str, tuple[str, Mapping[str, str]]] = {  # (function of renderers.parsing, its ids)
    "qwen3_coder": ("parse_qwen35", {**THINK, **{k: v for k, v in TAGS.items() if "tool" in k}}),
    "glm": ("parse_glm", {**THINK, **TAGS}),
    "deepseek": ("parse_deepseek_v3", DEEPSEEK),
    "deepseek_v31": ("parse_deepseek_v3", DEEPSEEK),
    "deepseek_v32": ("parse_deepseek_v4", {"dsml": "｜DSML｜"}),
    "gpt_oss": ("parse_gpt_oss", HARMONY),
    "llama3": ("parse_llama_3", {}),
}
FORMS = ("hermes", "pythonic", *RENDERED)
WRONG = {
    "unclosed_block": "the call is not closed",
    "invalid_json": "the arguments are not valid JSON, or not of the types that the tool declares",
    "missing_name": "the call has no name",
}
MALFORMED = "the call is malformed"
MAX_PYTHONIC = 20_000  # characters
MAX_TAGS = 100  # of XML in a turn: the reader's time grows with their number times the length
PROBE = ("probe_call", {"text": "a b", "number": 3})
SCHEMA = {"text": {"type": "string", "description": "t"}, "number": {"type": "integer", "description": "n"}}


def reader_of(form: str, tokenizer: Any, tools: Sequence[Mapping[str, Any]]) -> ReadCalls:
    """A function that reads calls of a form.

    Args:
        tools: JSON schemas; they give the arguments' types in forms that do not write types.

    Raises:
        ValueError: the package `renderers` is missing.
    """
    word = lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False)  # noqa: E731
    if form == "hermes":
        return lambda before, said, stops: calls_in(word(said))
    if form == "pythonic":
        return lambda before, said, stops: pythonic(word(i for i in said if i not in stops))
    try:
        from renderers import parsing
    except ImportError as error:
        raise ValueError(
            f"environment.calls={form} needs the package renderers, which cannot be imported ({error}); "
            "pip install --no-deps renderers==0.1.12 prime-pydantic-config==0.4.3"
        ) from None
    name, tokens = RENDERED[form]
    parse: Any = getattr(parsing, name)
    ids: dict[str, Any] = {key: _id(tokenizer, token) for key, token in tokens.items()}
    if form == "deepseek_v32":
        ids = {"think_start_id": _id(tokenizer, "<think>"), "think_end_id": _id(tokenizer, "</think>")}
    if form in ("qwen3_coder", "glm"):
        ids["tools"] = list(tools)
    start = tokenizer("assistant", add_special_tokens=False)["input_ids"]  # gpt-oss has it in the prompt
    header = [ids["start_id"], *start] if form == "gpt_oss" else []
    tag = _id(tokenizer, "<|python_tag|>")

    def read(before: Sequence[int], said: Sequence[int], stops: Sequence[int]) -> list[ToolCall]:
        given, more = [*header, *(i for i in said if i != tag or form != "llama3")], {}
        if form == "qwen3_coder" and len(re.findall("<(?:function|parameter)=", word(said))) > MAX_TAGS:
            return [ToolCall(fault=f"more than {MAX_TAGS} functions and parameters in a turn are not read")]
        if form != "gpt_oss":
            more["stop_ids"] = set(stops)
        if form in ("qwen3_coder", "glm", *DEEPSEEKS):
            name = "thinking_enabled" if form == "deepseek_v32" else "prefilled_thinking"
            more[name] = word(before[-8:]).rstrip().endswith("<think>")
        found = parse(tokenizer, given, **ids, **more).tool_calls
        if form == "llama3" and not found and re.match(r'\s*\{\s*"name"', word(given)):
            return [ToolCall(fault="the call is not valid JSON")]
        return [_named_first(call) if form == "deepseek_v31" else _checked(call) for call in found]

    return lambda *asked: _read_safely(read, *asked)


def _id(tokenizer: Any, token: str) -> int | None:
    found = tokenizer.convert_tokens_to_ids(token)
    return None if found == tokenizer.unk_token_id else found


def _read_safely(read: ReadCalls, *asked: Sequence[int]) -> Sequence[ToolCall]:
    try:
        return read(*asked)
    except RecursionError:
        return [ToolCall(fault=TOO_DEEP)]
    except Exception as error:  # the package may raise anything on a model's text
        return [ToolCall(fault=f"the call cannot be read: {type(error).__name__}: {error}")]


def _checked(call: Any) -> ToolCall:
    """Converts a `renderers.base.ParsedToolCall`; whether its tool exists is for the caller to check."""
    status = str(call.status)
    if status not in ("ok", "unknown_tool"):
        return ToolCall(str(call.name or ""), fault=WRONG.get(status, MALFORMED))
    return checked_call(call.name, call.arguments)


def _named_first(call: Any) -> ToolCall:
    """Converts a call of DeepSeek V3.1, `name<｜tool▁sep｜>arguments`. The reader of V3 expects the type
    before the name, so it finds only where the call begins and ends.
    """
    name, _, arguments = str(call.raw).partition(DEEPSEEK["tool_sep_id"])
    if str(call.status) in ("unclosed_block", "malformed_structure"):
        return ToolCall(name.strip(), fault=WRONG.get(str(call.status), MALFORMED))
    try:
        return checked_call(name.strip(), json.loads(arguments))
    except ValueError:
        return ToolCall(name.strip(), fault=WRONG["invalid_json"])


def pythonic(text: str) -> list[ToolCall]:
    """Reads calls that are a Python list, `[f(a=1), g(b="x")]` (Llama 4, and LFM2 between tags), from its
    syntax tree; nothing is evaluated.
    """
    said = text.partition("<|tool_call_start|>")[2].partition("<|tool_call_end|>")[0] or text
    said = said.replace("<|python_tag|>", "").strip()
    if not re.match(r"\[\s*[A-Za-z_][\w.]*\(", said):
        return []
    try:
        match ast.parse(said[:MAX_PYTHONIC], mode="eval").body:
            case ast.List(elts=calls):
                return [_python_call(call) for call in calls]
        raise ValueError
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return [ToolCall(fault='calls must be a list such as [name(argument="value")] of plain values')]


def _python_call(call: ast.expr) -> ToolCall:
    match call:
        case ast.Call(func=ast.Name(id=name), args=[], keywords=given) if all(k.arg for k in given):
            return checked_call(name, {str(k.arg): ast.literal_eval(k.value) for k in given})
    raise ValueError


def form_of(tokenizer: Any, variables: Mapping[str, Any], file: str | None, asked: str = "auto") -> str:
    """The form in which the chat template writes calls: the first one whose reader gives back a probe call
    that the template wrote. It is "hermes" if the template writes none. An asked form is only checked.

    Raises:
        ValueError: no form reads the calls that it writes, or the tokenizer lacks a tag of the asked form.
    """
    tags = [tag for key, tag in RENDERED.get(asked, ("", {}))[1].items() if key not in MAY_LACK]
    if lacking := [tag for tag in tags if _id(tokenizer, tag) is None]:
        raise ValueError(
            f"environment.calls={asked}: this model's tokenizer has no {', '.join(lacking)}, so that no call "
            "would be found; use environment.calls=auto"
        )
    if asked != "auto":
        return asked
    function = {"name": PROBE[0], "description": "d", "parameters": {"type": "object", "properties": SCHEMA}}
    tools = [{"type": "function", "function": function}]
    writes = False
    for arguments in (PROBE[1], json.dumps(PROBE[1])):  # templates expect one or the other
        call = {"type": "function", "id": "abcdefghi", "function": {"name": PROBE[0], "arguments": arguments}}
        asking: Any = {"role": "user", "content": "zzz"}
        calling: Any = {"role": "assistant", "content": "", "tool_calls": [call]}
        try:
            chats = [Chat("a call", messages) for messages in ((asking, calling), (asking,))]
            whole, header = render_chats(tokenizer, chats, variables, file=file)
        except ValueError:
            continue
        whole, header = (text.rpartition("zzz")[2] for text in (whole, header))
        writes = writes or PROBE[0] in whole
        said = whole.removeprefix(header).removesuffix(header)  # the header may also end a turn
        ids = tokenizer(said, add_special_tokens=False)["input_ids"]
        for form in FORMS if writes else ():
            if reader_of(form, tokenizer, tools)((), ids, ()) == [ToolCall(*PROBE)]:
                return form
    if not writes:
        return "hermes"
    raise ValueError(
        f"the chat template writes tool calls in none of the forms {', '.join(FORMS)}; use another template "
        "by model.chat_template, or name the form that the model writes with environment.calls"
    )
