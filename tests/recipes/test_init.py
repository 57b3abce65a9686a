"""`cohort init`: a config for one's own data that passes `cohort config`."""

from __future__ import annotations

import csv
import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from recipes.cli import main as cohort
from recipes.tasks import load_rows
from recipes.tasks.prompts import unrendered_prompt
from rl.config import Config
from rl.config.read import load_config

MATH = [{"question": f"{i} + {i}?", "solution": str(2 * i)} for i in range(20)]
BOXED = [{"problem": "Add.", "solution": f"So \\boxed{{{i}}}.", "answer": f"$x_{i}$"} for i in range(20)]
CHATS = [{"messages": [{"role": "user", "content": "Hi"}], "answer": i} for i in range(20)]
CODE = [{"prompt": "f", "test": {"type": "asserts", "entry_point": "f", "code": "assert f()"}}] * 3
TEXT = [{"Instruction": "Write: a poem", "author": "me"}] * 3


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def made_(rows, suffix=".jsonl", *words) -> Config:
        path = tmp_path / f"my rows{suffix}"
        if suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif suffix == ".json":
            path.write_text(json.dumps(rows, indent=1))
        elif suffix == ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        else:
            pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
        assert cohort(["init", str(path), *words]) == 0
        return load_config(tmp_path / "my rows.yaml")

    return made_


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_file_with_numbers_for_solutions_is_graded_as_maths(made, suffix, capsys):
    config = made(MATH, suffix, "--model", "Qwen/Qwen3-0.6B")
    assert (config.model.name, config.data.prompt_column) == ("Qwen/Qwen3-0.6B", "question")
    assert [spec.name for spec in config.rewards.functions] == ["math"] == [config.evaluation.metric]
    rows = load_rows(config.data)
    assert len(rows) == 20 and str(rows[3]["answer"]) == "6"
    asked = unrendered_prompt(config.data, rows[0], "row 0").messages[0]["content"]
    assert asked == "0 + 0?\n\nReason step by step, and put the final answer into \\boxed{}."
    said = capsys.readouterr().out
    assert "prompts from 'question', golds from 'solution', reward math" in said and "FILL IN" not in said
    assert cohort(["config", "my rows.yaml"]) == 0


def test_a_boxed_solution_is_taken_before_an_answer_that_is_no_number(made):
    config = made(BOXED)
    assert config.data.rename == {"solution": "answer", "answer": "old_answer"}
    assert load_rows(config.data)[1]["answer"] == "So \\boxed{1}."


def test_messages_are_prompts_without_a_template(made):
    config = made(CHATS)
    assert (config.data.prompt_column, config.data.template) == ("messages", "{prompt}")
    assert unrendered_prompt(config.data, load_rows(config.data)[0], "row").messages[0]["content"] == "Hi"


def test_a_column_of_tests_is_graded_as_code(made):
    config = made(CODE)
    assert [spec.name for spec in config.rewards.functions] == ["code"]
    assert config.data.rename == {"test": "tests"} and "Python code" in config.data.template


def test_what_cannot_be_graded_is_left_to_fill_in(made, tmp_path, capsys):
    config = made(TEXT)
    assert (config.data.prompt_column, config.rewards.functions[0].name) == ("Instruction", "rewards:score")
    text = (tmp_path / "my rows.yaml").read_text()
    assert "FILL IN: no answers were found" in text and "def score(prompts, completions" in text
    assert "first complete the lines of my rows.yaml that say FILL IN" in capsys.readouterr().out


def test_a_file_that_is_there_is_not_written_over(made, tmp_path, capsys):
    made(MATH)
    before = (tmp_path / "my rows.yaml").read_text()
    assert cohort(["init", "my rows.jsonl"]) == 1
    assert "my rows.yaml already exists; name another file with --out" in capsys.readouterr().err
    assert (tmp_path / "my rows.yaml").read_text() == before
    assert cohort(["init", "my rows.jsonl", "--out", "other.yaml"]) == 0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gone.jsonl", None, "there is no such file or folder"),
        ("rows.txt", "a", "cannot read '.txt' files; use .json, .jsonl, .csv, .parquet"),
        ("rows.jsonl", '{"a": 1}\n{', "line 2: not JSON"),
        ("rows.json", "{", "line 1: not JSON"),
        ("rows.csv", "", "rows.csv has no rows"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, monkeypatch, capsys, name, text, message):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / name).write_text(text)
    assert cohort(["init", name]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_dataset_that_cannot_be_looked_at_gets_a_config_to_fill_in(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cohort(["init", "nobody/nothing"]) == 0
    assert "the rows of nobody/nothing could not be read" in capsys.readouterr().out
    assert load_config("nothing.yaml").data.source == "nobody/nothing"
