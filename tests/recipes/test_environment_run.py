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
    return f"environment={json.dumps({'name': name, 'options': options, 'max_turns': 4, 'deadline_s': 60})}"


def test_a_run_plays_episodes_evaluates_them_and_records_their_turns(config_file, heldout, tmp_path, capsys):
    logged = environment("played_environments:Logged", file=str(tmp_path / "calls"))
    heldout = [*heldout[:1], "evaluation.metric=environment", "evaluation.sampling.max_completion_length=60"]
    assert main([str(config_file), *heldout, *EPISODES, logged]) == 0
    run = config_file.parent / "run"
    rows = read_rows(run / "metrics.jsonl")
    assert all(1 <= row["episode/turns"] <= 3 and row["tools/environment/seconds"] > 0 for row in rows)
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
    assert "held-out after" in (text := capsys.readouterr().out)
    assert "max_completion_length=60, environment.max_turns=4 or max_turn_length\n" in text  # what cuts
    before = sorted(path.name for path in (run / "journal").iterdir())
    out = tmp_path / "eval"
    assert cohort(["eval", str(run), "--out", str(out)]) == 0
    assert "max_completion_length, environment.max_turns or max_turn_length\n" in capsys.readouterr().out
    found = json.loads((out / "eval.json").read_text())
    assert found["environment"]["name"] == "played_environments:Logged" and found["step"] == 2
    held = read_rows(run / "evaluation.jsonl")[-1]
    assert (held["step"], held["accuracy"]) == (
        2,
        found["results"]["environment"]["avg"]["value"],
    )  # what training reports
    record = Ledger(out, folder="evaluations").read(2)
    assert record is not None
    paid = [
        (r.score, c.facts["rewards"])
        for group in record.groups
        for c, r in zip(group.completions, group.rewards, strict=True)
    ]
    assert len(paid) > 1 and all(score == pytest.approx(sum(r for r in turns if r)) for score, turns in paid)
    assert any(len(turns) > 1 for _, turns in paid)
    assert sorted(path.name for path in (run / "journal").iterdir()) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([environment("gess_number")], "environment.name='gess_number' is neither built in (such as guess"),
        ([environment("guess_number", hihg=3)], "unexpected keyword argument 'hihg'"),
        ([environment("tools", functions=["tools_in_trls_shape:nothing"])], "no attribute 'nothing'"),
        (["environment={max_turns: 3}"], "environment.name"),
        ([], "the reward 'environment' is paid by an environment, but this run has none"),
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
    with pytest.raises(ValueError, match="the rows have a column 'tools', but the environment alone says"):
        with_tools([{"prompt": "w1", "tools": [{"name": "f"}]}], load(name, {}))


@pytest.mark.rotation
def test_a_game_is_trained_on_its_rows_and_measured_with_and_without_itself(config_file, tmp_path, capsys):
    game = {"game": "LightsOut", "size": 3}
    source = {"source": "recipes.environments.textarena:rows", "size": 8}
    data = [f"data.{k}={json.dumps(v)}" for k, v in (source | {"options": {**game, "num_rows": 8}}).items()]
    options = {**game, "num_rows": 3, "seed": 90}
    held = json.dumps(source | {"options": options, "max_prompt_length": 100})
    given = [*data, f"evaluation.data={held}", "evaluation.metric=environment", "checkpoint.every=1"]
    given += ["evaluation.sampling.max_completion_length=60", "train.steps=1", "data.max_prompt_length=100"]
    assert main([str(config_file), *EPISODES, environment("textarena", **game), *given]) == 0
    run = config_file.parent / "run"
    record = Ledger(run).read(0)
    assert record is not None
    (fault,) = {c.facts.get("fault") for g in record.groups for c in g.completions}
    assert fault is None
    alone = ["environment=null", "rewards.functions=[{name: think_format}]", "evaluation.metric=think_format"]
    for words, turns in (([], True), (alone, False)):
        out = tmp_path / f"eval{len(words)}"
        assert cohort(["eval", str(run), "--out", str(out), *words]) == 0, capsys.readouterr().err
        record = Ledger(out, folder="evaluations").read(1)
        assert record is not None and len(record.groups) == 3
        assert all(("rewards" in c.facts) is turns for g in record.groups for c in g.completions)
