"""Calls of tools in the forms of nine families, by chat templates that TRL ships or of its own."""

from __future__ import annotations

import re
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import trl

sys.path.append(str(Path(__file__).parents[1] / "rollout"))

from script_engine import NoJournal, ScriptEngine, byte_tokenizer
from tools_in_trls_shape import multiply

from recipes.environments.forms import form_of, pythonic, reader_of
from recipes.environments.tools import Functions
from rewards.pool.worker import encode_frame
from rl.types import Prompt, SamplingParams
from rollout.environment import ToolCall, Turn
from rollout.episodes import EpisodeEngine
from rollout.turns import TurnRenderer
from tests.calling import call

pytest.importorskip("renderers")
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
FORM = {
    "qwen2_5": "hermes",
    "qwen3": "hermes",
    "qwen3_5_think": "qwen3_coder",
    "nemotron_3_nano": "qwen3_coder",
}
FORM |= {"glm4moe": "glm", "deepseekv3": "deepseek", "gptoss": "gpt_oss", "llama3_1": "llama3"}
FORM |= {"llama3_2": "llama3", "lfm2_v2": "pythonic", "phi3": "hermes"}
DEEPSEEK = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>multiply\n```json\n%s\n```"
END = "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
DEEPSEEK += END
V31 = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>multiply<｜tool▁sep｜>%s" + END
INVOKE = (
    '<｜DSML｜invoke name="multiply">\n<｜DSML｜parameter name="a" string="false">%s</｜DSML｜parameter>\n'
)
INVOKE += '<｜DSML｜parameter name="b" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
V32 = "<｜DSML｜function_calls>\n%s</｜DSML｜function_calls>"  # as vLLM's encoder of V3.2 writes them
V4 = "<｜DSML｜tool_calls>\n%s</｜DSML｜tool_calls>"
HARMONY = "<|channel|>analysis<|message|>I compute.<|end|><|start|>assistant to=functions.multiply"
HARMONY += "<|channel|>commentary json<|message|>%s"
CODER = "<tool_call>\n<function=multiply>\n<parameter=a>\n%s\n</parameter>\n<parameter=b>\n3\n</parameter>\n"
CODER += "</function>\n</tool_call>"
GLM = "<tool_call>multiply\n<arg_key>a</arg_key>\n<arg_value>%s</arg_value>\n"
GLM += "<arg_key>b</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"
SIX = ToolCall("multiply", {"a": 2, "b": 3})


FORM |= {"v31": "deepseek_v31", "v32": "deepseek_v32", "v4": "deepseek_v32"}
# What the models' own templates or encoders write; TRL ships none of these.
TURNS = "{%% for m in messages %%}<｜{{ m.role }}｜>{{ m.content }}{%% if m.tool_calls %%}%s{%% endif %%}"
TURNS += "{%% endfor %%}"
TURNS += "{%% if add_generation_prompt %%}<｜assistant｜>{%% endif %%}"
TYPED = '{% set f = m.tool_calls[0].function %}<｜DSML｜%s>\n<｜DSML｜invoke name="{{ f.name }}">\n'
TYPED += '{% for k, v in f.arguments.items() %}<｜DSML｜parameter name="{{ k }}" string="'
TYPED += (
    "{{ 'true' if v is string else 'false' }}\">{{ v }}</｜DSML｜parameter>\n{% endfor %}</｜DSML｜invoke>\n"
)
NAMED = V31.replace("multiply", "{{ m.tool_calls[0].function.name }}")
OWN = {
    "v31": TURNS % (NAMED % "{{ m.tool_calls[0].function.arguments }}"),
    "v32": TURNS % (TYPED.replace("%s", "function_calls") + "</｜DSML｜function_calls>"),
    "v4": TURNS % (TYPED.replace("%s", "tool_calls") + "</｜DSML｜tool_calls>"),
}


def tokenizer_of(family: str):
    template = OWN[family] if family in OWN else (TEMPLATES / f"{family}.jinja").read_text()
    extra = [
        *re.findall(r"</\w+>", template),
        *(["｜DSML｜", "<think>", "</think>"] if family in OWN else []),
    ]
    return byte_tokenizer(template, extra=extra)


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("family", "form"), FORM.items())
def test_the_form_is_that_in_which_the_template_writes_a_call(family, form):
    assert form_of(tokenizer_of(family), {}, None) == form


def test_a_form_whose_tags_the_tokenizer_lacks_is_refused():
    """Else no call is ever found, and every turn ends its episode."""
    with pytest.raises(
        ValueError, match=r"environment\.calls=glm: .* no <arg_key>, .*no call would be found"
    ):
        form_of(tokenizer_of("qwen3"), {}, None, "glm")
    for family, form in FORM.items():
        assert form_of(tokenizer_of(family), {}, None, form) == form


def test_a_template_with_a_form_that_is_not_read_is_refused():
    with pytest.raises(ValueError, match=r"in none of the forms hermes, pythonic, .*environment\.calls"):
        form_of(tokenizer_of("gemma4"), {}, None)


@pytest.mark.parametrize(
    ("family", "said", "calls"),
    [
        ("qwen3", '<tool_call>{"name": "multiply", "arguments": {"a": 2, "b": 3}}</tool_call>', [SIX]),
        ("qwen3_5_think", "I compute.\n" + CODER % 2, [SIX]),
        ("qwen3_5_think", CODER % 2 + CODER % 2, [SIX, SIX]),
        ("qwen3_5_think", "<think>" + CODER % 2 + "</think>no", []),
        ("qwen3_5_think", CODER % "two", "not of the types that the tool declares"),
        ("qwen3_5_think", (CODER % 2)[:-12], "not closed"),
        ("qwen3_5_think", "<tool_call>multiply</tool_call>", "malformed"),
        ("glm4moe", GLM % 2, [SIX]),
        ("glm4moe", "<tool_call>divide\n</tool_call>", [ToolCall("divide", {})]),
        ("glm4moe", (GLM % 2)[:-12], "not closed"),
        ("deepseekv3", "So: " + DEEPSEEK % '{"a": 2, "b": 3}', [SIX]),
        ("deepseekv3", DEEPSEEK % '{"a": 2, "b": ', "not valid JSON"),
        ("deepseekv3", DEEPSEEK % "[1]", "JSON object"),
        ("v31", "So: " + V31 % '{"a": 2, "b": 3}', [SIX]),
        ("v31", V31 % '{"a": 2,\n"b": 3}', [SIX]),
        ("v31", (V31 % '{"a": 2, "b": 3}').removesuffix(END), "not closed"),
        ("v31", V31 % '{"a": 2, "b": ', "not valid JSON"),
        ("v31", V31 % "[1]", "JSON object"),
        ("v31", V31.replace("<｜tool▁sep｜>%s", ""), "malformed"),
        ("v32", "So.\n\n" + V32 % (INVOKE % 2), [SIX]),
        ("v32", "<think>" + INVOKE % 2 + "</think>" + V32 % (INVOKE % 2 + INVOKE % 2), [SIX, SIX]),
        ("v4", V4 % (INVOKE % 2), [SIX]),
        ("v4", V4 % (INVOKE % "two"), "not valid JSON"),
        ("v4", (V4 % (INVOKE % 2))[:-50], "not closed"),
        ("gptoss", HARMONY % '{"a": 2, "b": 3}' + "<|call|>", [SIX]),
        ("gptoss", HARMONY % '{"a": 2' + "<|call|>", "not valid JSON"),
        ("gptoss", "<|channel|>final<|message|>6<|return|>", []),
        ("gptoss", HARMONY % ('{"a":' + "[" * 100_000) + "<|call|>", "nested too deep"),
        ("llama3_1", '{"name": "multiply", "parameters": {"a": 2, "b": 3}}', [SIX]),
        ("llama3_1", '<|python_tag|>{"name": "multiply", "parameters": {"a": 2, "b": 3}}', [SIX]),
        ("llama3_1", '{"name": "multiply", "parameters": {"a": 2', "not valid JSON"),
        ("llama3_1", "{2, 3} is a set", []),
        ("lfm2_v2", "<|tool_call_start|>[multiply(a=2, b=3)]<|tool_call_end|>", [SIX]),
    ],
)
def test_calls_are_read_and_what_is_malformed_has_its_fault(family, said, calls):
    tokenizer = tokenizer_of(family)
    if family == "llama3_1":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|python_tag|>"]}, False)
    found = reader_of(FORM[family], tokenizer, Functions([multiply]).tools)((), ids_of(tokenizer, said), ())
    if isinstance(calls, str):
        (call,) = found
        assert calls in call.fault and call.arguments is None
    else:
        assert found == calls


NO_JSON = [("qwen3", '<tool_call>{"name": "multiply", "arguments": {"a": NaN}}</tool_call>')]
NO_JSON += [("qwen3", '<tool_call>{"name": "multiply", "arguments": {"a": 1e999}}</tool_call>')]
NO_JSON += [
    ("qwen3_5_think", CODER % "1e999"),
    ("glm4moe", GLM % "NaN"),
    ("deepseekv3", DEEPSEEK % '{"a": NaN}'),
]
NO_JSON += [("v31", V31 % '{"a": NaN}'), ("v4", V4 % (INVOKE % "Infinity"))]
NO_JSON += [("gptoss", HARMONY % '{"a": -Infinity}' + "<|call|>")]
NO_JSON += [("llama3_1", '{"name": "multiply", "parameters": {"a": NaN}}')]
ODD = ("{1, 2}", "b'x'", "1j", "...", "1e999", "{(1, 2): 3}", "0x" + "f" * 9_000, "[" * 90 + "]" * 90)
NO_JSON += [("lfm2_v2", f"<|tool_call_start|>[multiply(a={value})]<|tool_call_end|>") for value in ODD]


@pytest.mark.parametrize(("family", "said"), NO_JSON)
def test_arguments_that_cannot_cross_to_a_process_are_the_calls_fault_and_not_the_environments(family, said):
    tokenizer = tokenizer_of(family)
    calls = reader_of(FORM[family], tokenizer, Functions([multiply]).tools)((), ids_of(tokenizer, said), ())
    encode_frame(asdict(Turn(0, "", tuple(calls))))
    assert len(calls) == 1 and calls[0].arguments is None
    assert calls[0].fault.startswith(("arguments must be plain JSON values", "the call is nested too deep"))


@pytest.mark.parametrize("tag", ["<function=", "<parameter=", "<parameter=a>"])
def test_text_that_a_reader_takes_long_for_is_not_read(tag):
    """Without a limit 20,000 tags take a minute, of the trainer's own process."""
    tokenizer = tokenizer_of("qwen3_5_think")
    read = reader_of("qwen3_coder", tokenizer, ())
    ids = ids_of(tokenizer, "<tool_call><function=f>" + tag * 5_000 + "</tool_call>")
    began = time.thread_time()
    assert "more than 100 functions" in read((), ids, ())[0].fault
    assert time.thread_time() - began < 1


def test_values_have_the_types_of_the_schema():
    """A parameter that is declared as text stays text, whatever it looks like."""
    tool = {"name": "f", "parameters": {"properties": {"a": {"type": "string"}, "b": {"type": "integer"}}}}
    for family, text in (("qwen3_5_think", CODER % 2), ("glm4moe", GLM % 2)):
        tokenizer = tokenizer_of(family)
        ids = ids_of(tokenizer, text.replace("multiply", "f"))
        assert reader_of(FORM[family], tokenizer, [tool])((), ids, ()) == [ToolCall("f", {"a": "2", "b": 3})]


def test_a_call_in_thinking_that_the_prompt_began_is_not_made():
    tokenizer = tokenizer_of("deepseekv3")
    read, ids = reader_of("deepseek", tokenizer, ()), ids_of(tokenizer, DEEPSEEK % "{}" + "</think> no")
    assert read(ids_of(tokenizer, "<think>\n"), ids, ()) == []
    assert len(read((), ids, ())) == 1


@pytest.mark.parametrize(
    "text",
    ["[f(1)]", "[f(**x)]", "[f(a=g())]", "[f(a=", "[f(a=1), 3]", "[os.f(a=1)]", "[f(a=" + "(" * 9_000 + ")]"],
)
def test_pythonic_calls_are_plain_values_and_nothing_is_evaluated(text):
    assert [c.fault[:20] for c in pythonic(text)] == ["calls must be a list"]
    assert pythonic("[1, 2]") == pythonic("see f(a=1)") == []


@pytest.mark.parametrize(
    ("family", "says", "end", "answer"),
    [
        (
            "gptoss",
            [HARMONY % '{"a": 2, "b": 3}', "<|channel|>final<|message|>6"],
            "<|call|>",
            '<|call|><|start|>functions.multiply to=assistant<|channel|>commentary<|message|>"6"<|end|>'
            "<|start|>assistant",
        ),
        (
            "llama3_1",
            ['{"name": "multiply", "parameters": {"a": 2, "b": 3}}', "6"],
            "<|eot_id|>",
            '<|eot_id|><|start_header_id|>ipython<|end_header_id|>\n\n"6"<|eot_id|>'
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "deepseekv3",
            ["Thought.</think>" + DEEPSEEK % '{"a": 2, "b": 3}', "6"],
            "<｜end▁of▁sentence｜>",
            "<｜end▁of▁sentence｜><｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>6<｜tool▁output▁end｜>"
            "<｜tool▁outputs▁end｜>",
        ),
    ],
)
def test_an_episode_calls_a_tool_in_the_form_of_its_family(family, says, end, answer):
    """What stands between the turns is what the family's template writes there."""
    tokenizer = tokenizer_of(family)
    environment = Functions([multiply])
    read = reader_of(FORM[family], tokenizer, environment.tools)
    engine = ScriptEngine(tokenizer, lambda seed: says[len(engine.sent) - 1])
    episodes = EpisodeEngine(engine, environment, TurnRenderer(tokenizer), NoJournal(), read_calls=read)
    messages = ({"role": "user", "content": "2 times 3?"},)
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    stop = (tokenizer.convert_tokens_to_ids(end),)
    prompt = Prompt("p", text, tuple(ids_of(tokenizer, text)), messages)
    ((completion,),) = (
        g.completions
        for g in episodes.generate(
            call([prompt], num_completions=1, sampling=SamplingParams(4096, stop_token_ids=stop), seeds=[1])
        )
    )
    episodes.close()
    assert tokenizer.decode(completion.token_ids) == says[0] + answer + says[1] + end
    assert completion.finish_reason == "stop" and completion.facts["counts"]["calls"] == 1
    origins = [s.origin for s in completion.segments]
    assert origins[0] == origins[-1] == "sampled" and "tool" in origins
