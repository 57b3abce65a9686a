"""A chat template gets what the row has, and a hostile one is ended and named."""

from __future__ import annotations

import json
import time

import psutil
import pytest
from transformers import AutoTokenizer

from rollout import template as bounds
from rollout.chat import render_prompts
from rollout.template import check_template

USER = [{"role": "user", "content": "w1"}]
PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
BOMBS = {
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "range": "{% for i in range(10**12) %}x{% endfor %}",
    "repeat": "{{ 'x' * 10**11 }}",
    "product": "{% for a in range(20000) %}{{ 'x' * 20000 }}{% endfor %}",
    "double": "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "power": "{{ (10**(10**10)) % 7 }}",
    "filter": "{{ 'x' | center(10**11) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "late": "{% if messages[0]['content'] == 'w9' %}{{ 'x' * 10**11 }}{% endif %}" + PLAIN,
}


@pytest.fixture
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def render(tokenizer, rows, **options):
    settings = {"prefix": "train", "prompt_column": "prompt", "max_prompt_length": 64} | options
    return render_prompts(rows, tokenizer, **settings)


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_takes_too_much_is_ended_and_its_file_named(tokenizer, monkeypatch, name):
    monkeypatch.setattr(bounds, "CPU_S", 0.5)
    tokenizer.chat_template = BOMBS[name]
    children = psutil.Process().children()
    began = time.monotonic()
    with pytest.raises(ValueError) as caught:
        render(tokenizer, [{"prompt": "w1"}, {"prompt": "w9"}], template_file="bomb.jinja")
    assert time.monotonic() - began < 30
    row = 1 if name == "late" else 0
    assert str(caught.value).startswith(f"train row {row}: the chat template, read from bomb.jinja, ")
    assert "model.chat_template" in str(caught.value)
    assert psutil.Process().children() == children


def test_a_template_of_the_model_is_named_by_its_file(tokenizer, tiny_model_dir):
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ValueError, match=f"it was read from {tiny_model_dir}/chat_template.jinja"):
        render(tokenizer, [{"prompt": "w1"}])


def test_a_check_without_rows_refuses_bombs_and_nothing_else(tokenizer):
    tokenizer.chat_template = BOMBS["repeat"]
    with pytest.raises(ValueError, match=r"a short chat: the chat template, read from .*MemoryError"):
        check_template(tokenizer, file=None)
    tokenizer.chat_template = "{{ raise_exception('no user') }}"
    check_template(tokenizer, file=None)


def test_every_error_of_a_template_is_a_sentence(tokenizer):
    tokenizer.chat_template = "{{ messages[0]['content'] + 1 }}"
    with pytest.raises(ValueError, match=r"train row 0: the chat template refuses the messages \(TypeError"):
        render(tokenizer, [{"prompt": "w1"}])


def test_variables_reach_the_template(tokenizer):
    tokenizer.chat_template = "{% if enable_thinking %}w7 {% endif %}" + PLAIN
    on, off = (
        render(tokenizer, [{"prompt": "w1"}], chat_template_kwargs={"enable_thinking": value})[0].text
        for value in (True, False)
    )
    assert (on, off) == ("w7 w1", "w1")
    with pytest.raises(ValueError, match=r"'enable_thinkin', .* did you mean 'enable_thinking'\?"):
        render(tokenizer, [{"prompt": "w1"}], chat_template_kwargs={"enable_thinkin": True})


TOOL = {"type": "function", "function": {"name": "w50", "parameters": {"x": None}}}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])], ids=["list", "text"])
def test_tools_reach_the_template(tokenizer, tools):
    tokenizer.chat_template = "{% for t in tools or [] %}{{ t | tojson }} {% endfor %}" + PLAIN
    with_tools, without = render(
        tokenizer, [{"prompt": USER, "tools": tools}, {"prompt": USER, "tools": None}]
    )
    assert with_tools.text == '{"type": "function", "function": {"name": "w50", "parameters": {}}} w1'
    assert without.text == "w1"


@pytest.mark.parametrize("tools", ["hammer", ["hammer"], {"name": "w50"}, 3])
def test_tools_that_are_no_schemas_are_refused_by_row(tokenizer, tools):
    tokenizer.chat_template = "{{ tools }}"
    with pytest.raises(ValueError, match=r"train row 0: the column 'tools' .* data\.rename=\{tools: "):
        render(tokenizer, [{"prompt": USER, "tools": tools}])


def test_tools_without_a_place_in_the_template_are_refused(tokenizer):
    with pytest.raises(ValueError, match="the chat template has no place for them"):
        render(tokenizer, [{"prompt": USER, "tools": [TOOL]}])
    assert len(render(tokenizer, [{"prompt": "w1", "tools": "hammer"}], chat=False)) == 1
