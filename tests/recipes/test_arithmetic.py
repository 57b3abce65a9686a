"""Demonstrations with a tool are, token for token, what its environment shows and what a policy then says."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from recipes.environments import load
from recipes.environments.forms import form_of, reader_of
from recipes.tasks.arithmetic import demonstrations, rows
from rl.config.diffusion import TextConfig
from rl.diffusion.text import encode_rows
from rl.types import SamplingParams
from rollout.chat import render_prompts
from rollout.episodes import EpisodeEngine, EpisodeRules
from rollout.turns import TurnRenderer
from tests.calling import call
from tests.rollout.script_engine import NoJournal, ScriptEngine, byte_tokenizer

TEMPLATE = (Path(__file__).parents[2] / "recipes" / "configs" / "smollm2_tools.jinja").read_text()
TOKENIZER = byte_tokenizer(TEMPLATE, end="<|im_end|>")
CONFIG = TextConfig(source="recipes.tasks.arithmetic:demonstrations", max_length=2048)


def test_demonstrations_of_a_tool_are_the_tokens_of_its_episodes():
    """One prompt a time, as the script engine does not know which one it is asked with."""
    size, shown = 3, 0
    examples, _ = encode_rows(demonstrations(size=size, seed=7, direct=0.0), CONFIG, TOKENIZER)
    assert len(examples) == 2 * size
    with closing(load("python", {})) as environment:
        asked = [{**row, "tools": environment.tools} for row in rows(size=size, seed=7)]
        prompts = render_prompts(
            asked, TOKENIZER, prefix="train", prompt_column="prompt", max_prompt_length=2048
        )
        reads = reader_of(form_of(TOKENIZER, {}, None), TOKENIZER, environment.tools)
        for prompt in prompts:
            said = [TOKENIZER.decode(e.answer[:-1]) for e in examples[shown : shown + 2]]
            turns = iter(said)
            engine = ScriptEngine(TOKENIZER, lambda seed, turns=turns: next(turns))
            render = TurnRenderer(TOKENIZER, tools=environment.tools)
            episodes = EpisodeEngine(
                engine, environment, render, NoJournal(), read_calls=reads, rules=EpisodeRules(3)
            )
            sampling = SamplingParams(2048, stop_token_ids=(TOKENIZER.eos_token_id,))
            (group,) = episodes.generate(call([prompt], num_completions=1, sampling=sampling, seeds=[0]))
            (completion,) = group.completions
            assert completion.finish_reason == "stop" and completion.facts["counts"]["calls"] == 1
            assert completion.text == f"\\boxed{{{prompt.columns['answer']}}}"
            assert "drift" not in completion.facts["counts"]
            for (_, sent), example in zip(engine.sent, examples[shown : shown + 2], strict=True):
                assert list(sent) == example.prompt.tolist()
            shown += 2


def test_the_answers_are_those_of_python_and_a_share_shows_the_tool():
    made = demonstrations(size=400, seed=3, direct=0.25)
    asked = rows(size=400, seed=3)
    assert all(int(row["answer"]) == eval(row["expression"]) for row in asked)
    called = [len(row["messages"]) == 4 for row in made]
    assert 0.68 < sum(called) / 400 < 0.82  # 0.75, and three standard deviations of 0.0217
    assert all(
        row["messages"][-1]["content"] == f"\\boxed{{{a['answer']}}}"
        for row, a in zip(made, asked, strict=True)
    )
    assert not any(row["tools"] or len(row["messages"]) > 2 for row in demonstrations(size=20, seed=3))
    assert {row["prompt"] for row in asked}.isdisjoint(row["prompt"] for row in rows(size=400, seed=4))


def test_tools_that_a_template_leaves_out_are_refused():
    (row,) = demonstrations(size=1, seed=7, direct=0.99)
    plain = byte_tokenizer(
        "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}", end="<|im_end|>"
    )
    message = r"row 0: the chat template shows nothing of the tool python; set model.chat_template"
    with pytest.raises(ValueError, match=message):
        encode_rows([row], CONFIG, plain)
    row["messages"][0]["content"] += " Use python."
    with pytest.raises(ValueError, match=message):
        encode_rows([row], CONFIG, plain)
    nameless, _ = encode_rows([{**row, "tools": [{"type": "browser", "function": {}}]}], CONFIG, TOKENIZER)
    assert "browser" in TOKENIZER.decode(nameless[0].prompt)
    as_text, _ = encode_rows([{**row, "tools": json.dumps(row["tools"])}], CONFIG, TOKENIZER)
    as_list, _ = encode_rows([row], CONFIG, TOKENIZER)
    assert as_text[0].prompt.tolist() == as_list[0].prompt.tolist()
