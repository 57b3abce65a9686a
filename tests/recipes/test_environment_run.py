"""Whole runs with an environment: what they leave, what they refuse, and what stops them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from recipes.cli import main as cohort
from recipes.environments import load
from recipes.environments.wiring import with_tools
from recipes.grpo import main
from rl.store.ledger import Ledger
from rl.store.rows import read_rows

HERE = Path(__file__).parent
STOPS = f"sampling.stop_token_ids={list(range(5, 60))}"  # half of the words end a turn of the untrained model
EPISODES = ["rewards.functions=[{name: environment}]", "sampling.max_completion_length=60", STOPS]


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(HERE)])


def environment(name: str, **options) -> str:
    return f"environment={json.dumps({'name': name, 'options': options, 'max_turns': 4, 'deadline_s': 5})}"


def test_a_run_plays_episodes_evaluates_them_and_records_their_turns(config_file, heldout, tmp_path, capsys):
    logged = environment("played_environments:Logged", file=str(tmp_path / "calls"))
    heldout = [*heldout[:1], "evaluation.metric=environment", "evaluation.sampling.max_completion_length=60"]
    assert main([str(config_file), *heldout, *EPISODES, logged]) == 0
    run = config_file.parent / "run"
    rows = read_rows(run / "metrics.jsonl")
    assert all(row["sampler/logprob_gap_max"] < 1e-4 for row in rows)  # it was sampled from what is stored
    num_calls = len((tmp_path / "calls").read_text().splitlines())
    told, turns, sampled = 0, 0, 0
    for step in range(2):
        record = Ledger(run).read(step)
        assert record is not None
        for group in record.groups:
            for completion, reward in zip(group.completions, group.rewards, strict=True):
                assert reward.score == pytest.approx(sum(r for r in reward.turns if r is not None))
                assert list(reward.turns) == completion.facts["rewards"]
                turns += len(reward.turns)
                told += sum(m["role"] == "user" for m in completion.facts["said"])
                sampled += completion.num_sampled
    assert turns > 2 * 8 and told < num_calls  # those of the evaluations besides
    assert sum(row["tokens/completion"] for row in rows) == sampled
    assert "held-out after" in capsys.readouterr().out
    assert cohort(["eval", str(run)]) == 1
    assert "cohort eval asks for completions of one turn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([environment("gess_number")], "environment.name='gess_number' is neither built in (such as guess"),
        ([environment("guess_number", hihg=3)], "unexpected keyword argument 'hihg'"),
        ([environment("tools", functions=["tools_in_trls_shape:nothing"])], "no attribute 'nothing'"),
        (["environment={max_turns: 3}"], "environment.name"),
        ([], "the reward 'environment' is what an environment pays, and this run has none"),
        ([environment("played_environments:Misbehaves", raises=True)], "environment.name"),
    ],
)
def test_faults_get_a_sentence_before_a_model_is_loaded(config_file, capsys, overrides, message):
    assert main([str(config_file), *EPISODES, *overrides]) == 1
    error = capsys.readouterr().err
    assert error.count("cohort:") == 1 and message in error and "Traceback" not in error


def test_an_environment_that_fails_too_often_stops_the_run(config_file, capsys):
    failing = environment("played_environments:Fails")
    assert main([str(config_file), *EPISODES, failing]) == 1
    error = capsys.readouterr().err
    assert "the environment failed: the world is down" in error and "max_fault_share=0.05" in error


def test_another_docstring_of_a_tool_is_another_prompt(config_file, capsys):
    """The template of the tiny model has no place for tools, which is said."""
    tools = environment("tools", functions=["tools_in_trls_shape:multiply"])
    assert main([str(config_file), *EPISODES, tools]) == 1
    assert "the chat template has no place for them" in capsys.readouterr().err
    template = config_file.parent / "tools.jinja"
    template.write_text(
        "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}"
        "{% for m in messages %}<{{ m['role'] }}> "
        "{{ m['content'] }} <eos> {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    given = [str(config_file), *EPISODES, f"model.chat_template={template}", "checkpoint.every=1"]
    assert main([*given, tools, "train.steps=1"]) == 0
    record = Ledger(config_file.parent / "run").read(0)
    assert record is not None
    facts = [c.facts["tools"] for g in record.groups for c in g.completions]
    assert len(set(facts)) == 1 and len(facts[0]) == 16
    inputs = config_file.parent / "run" / "inputs.json"
    found = json.loads(inputs.read_text())
    assert found["environment"] == {"tools": facts[0]}
    inputs.write_text(json.dumps(found | {"environment": {"tools": "0" * 16}}))
    assert main([*given, tools, "train.steps=2"]) == 1
    assert "environment: tools" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["guess_number", "calculator"])
def test_tools_in_a_column_are_refused_with_any_environment(name):
    """Later turns would be rendered without them, and the model would see others than its prompt had."""
    with pytest.raises(ValueError, match="the rows have a column 'tools', and the environment brings"):
        with_tools([{"prompt": "w1", "tools": [{"name": "f"}]}], load(name, {}))
