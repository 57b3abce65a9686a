"""`cohort config`: what a key means, and a schema that an editor checks by."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from recipes.cli import main as cohort
from recipes.cli.config import KINDS, _keys, explained
from rl.config.bounded_yaml import read_yaml
from rl.config.read import load_config, read_any_config

CONFIGS = sorted((Path(__file__).parents[2] / "recipes" / "configs").glob("*.yaml"))


@pytest.mark.parametrize(
    ("key", "lines"),
    [
        ("train.steps", ["train.steps (integer)", "  steps of the whole run; at least 1; default 100"]),
        ("data.too_long", ["data.too_long (choice)", "one of refuse, drop; default refuse"]),
        ("lr", ["optimizer.lr (number)", "learning rate; above 0; default 1.0e-06"]),
        ("model.lora.r", ["model.lora.r (integer)", "  rank; at least 1; default 16"]),
        ("rewards.functions.name", ["rewards.functions.name (text)", "or module:callable; required"]),
        ("train", ["train (section)", "A step samples", "  seed (integer): seed of sampling, data order"]),
        ("diffusion.remasking", ["one of low_confidence, random, margin, entropy"]),
        ("loss.name", ["one of grpo, dr_grpo", "of the section loss: DeepSeek-R1 (arXiv:2501.12948)"]),
    ],
)
def test_a_key_is_explained_by_its_text_choices_range_and_default(key, lines, capsys):
    assert cohort(["config", "--explain", key]) == 0
    said = capsys.readouterr().out
    assert [line for line in lines if line not in said] == []


def test_the_value_of_a_config_stands_beside_what_a_key_means(capsys):
    assert cohort(["config", str(CONFIGS[-1]), "train.steps=7", "--explain", "train.steps"]) == 0
    assert capsys.readouterr().out.startswith("train.steps (integer) = 7\n")


def test_a_key_of_another_command_says_whose_it_is(capsys):
    assert cohort(["config", "--explain", "train.shard"]) == 0
    assert capsys.readouterr().out.endswith("(a key of `python -m recipes.llada`)\n")


def test_without_a_key_every_key_is_explained(capsys):
    assert cohort(["config", "--explain"]) == 0
    assert "  steps: 100  # steps of the whole run; at least 1\n" in capsys.readouterr().out
    assert cohort(["config", "--explain", str(CONFIGS[-1])]) == 0
    assert "  steps: 24  # steps of the whole run; at least 1; default 100\n" in capsys.readouterr().out


def test_an_unknown_key_gets_near_ones(capsys):
    assert cohort(["config", "--explain", "data.souce"]) == 1
    assert "--explain data.souce: no config has this key; did you mean data.source" in capsys.readouterr().err
    assert cohort(["config"]) == 1
    assert "takes a config file, --explain [KEY] or --schema" in capsys.readouterr().err


def test_every_key_of_every_kind_can_be_explained():
    for kind in KINDS:
        for key, _ in _keys(kind):
            assert explained(key).startswith(f"{key} ("), key


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_schema_takes_the_recipes_and_refuses_what_they_may_not_say(path, capsys):
    assert cohort(["config", str(path), "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema).is_valid
    tree = read_yaml(path)
    assert check(tree) and check(read_any_config(path).model_dump(mode="json"))
    assert not check({**tree, "modle": {}}) and not check({**tree, "train": {"steps": 0}})


def test_the_schema_without_a_config_is_that_of_a_run(capsys):
    assert cohort(["config", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    steps = schema["$defs"]["TrainConfig"]["properties"]["steps"]
    assert (steps["minimum"], steps["default"], steps["description"]) == (1, 100, "steps of the whole run")


@pytest.mark.parametrize(
    ("functions", "said"),
    [
        ("[{name: maht}]", "rewards.functions.0.name='maht': no such reward; did you mean math?"),
        ("[{name: math}, {name: zzzz}]", "rewards.functions.1.name='zzzz': no such reward; there are: math,"),
        ('[{name: "nowhere:short"}, {name: math}]', None),
        ("[{name: nowhere.short}, {name: math}]", None),
    ],
)
def test_a_reward_that_no_registry_has_is_refused_wherever_a_config_is_checked(functions, said, capsys):
    """A path of a function is not imported here; a wrong name is not blamed on `evaluation.metric`."""
    words = [str(CONFIGS[-1]), f"rewards.functions={functions}"]
    assert cohort(["config", *words]) == (0 if said is None else 1)
    for more in [["train"], ["doctor", "rewards"], ["plan", "--gpu-gib", "24"]] if said else []:
        assert cohort([*more, *words]) == 1
        assert f"1 fault in {CONFIGS[-1]}:\n      {said}" in capsys.readouterr().err


def test_a_reward_that_a_program_hands_over_is_known():
    known = ["math", "short"]
    tree = ["rewards.functions=[{name: short}]", "evaluation.metric=short"]
    assert load_config(CONFIGS[-1], tree, rewards=known).rewards.functions[0].name == "short"
    with pytest.raises(ValueError, match=r"name='short': no such reward; there are: math \("):
        load_config(CONFIGS[-1], tree, rewards=["math"])
    assert load_config(CONFIGS[-1], tree).rewards.functions[0].name == "short"  # a run's folder is read so
