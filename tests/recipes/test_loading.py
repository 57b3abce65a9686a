"""Rows come from files, folders, saved datasets, generators and callables; what cannot be read gets a
sentence.
"""

from __future__ import annotations

import json

import pytest
from datasets import Dataset, DatasetDict

from recipes.tasks import load_rows
from rl.config import DataConfig

ROWS = [{"prompt": f"q{i}", "answer": str(i)} for i in range(4)]


def test_every_file_format_gives_the_same_rows(tmp_path):
    data = Dataset.from_list(ROWS)
    data.to_json(tmp_path / "a.jsonl")
    data.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    data.save_to_disk(tmp_path / "saved")
    DatasetDict(train=data, test=data.select([0])).save_to_disk(tmp_path / "splits")
    folder = tmp_path / "folder"
    folder.mkdir()
    data.to_json(folder / "train.jsonl")
    for name in ("a.jsonl", "a.parquet", "a.json", "saved", "splits", "folder"):
        assert load_rows(DataConfig(source=str(tmp_path / name))) == ROWS, name
    assert load_rows(DataConfig(source=str(tmp_path / "splits"), split="test")) == ROWS[:1]
    assert load_rows(DataConfig(source=str(tmp_path / "a.jsonl"), size=2)) == ROWS[:2]


def test_csv_columns_are_read(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,answer\nwhat,x\n")
    assert load_rows(DataConfig(source=str(tmp_path / "a.csv"))) == [{"prompt": "what", "answer": "x"}]


def test_a_generator_is_seeded_and_brings_what_its_own_scorer_needs():
    options = {"min_terms": 2, "max_terms": 2, "seed": 5}
    a, b = (
        load_rows(DataConfig(source="reasoning_gym:chain_sum", size=3, options=options)) for _ in range(2)
    )
    assert a == b and len(a) == 3
    assert a[0].keys() == {"prompt", "answer", "entry"}
    assert a[0]["entry"]["metadata"]["source_dataset"] == "chain_sum"


def make_rows(n: int):
    return ({"prompt": str(i)} for i in range(n))


def test_a_callable_by_import_path():
    assert load_rows(DataConfig(source=f"{__name__}:make_rows", options={"n": 2})) == [
        {"prompt": "0"},
        {"prompt": "1"},
    ]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"source": "reasoning_gym:chain_summ"}, "no generator 'chain_summ'; near names: chain_sum"),
        (
            {"source": "reasoning_gym:chain_sum", "options": {"min_term": 2}},
            "do not fit reasoning-gym's chain_sum",
        ),
        (
            {"source": "no_such_module:rows"},
            "module:callable: there is no module 'no_such_module'",
        ),
    ],
)
def test_unreadable_sources_name_the_cause(config, message):
    with pytest.raises(ValueError) as caught:
        load_rows(DataConfig(**config))
    assert message in str(caught.value)


def nothing():
    return None


def failing():
    raise KeyError("no such thing")


def test_a_callable_that_fails_or_returns_no_rows_is_named():
    with pytest.raises(ValueError, match=r"failing' with data.options=\{\} raised KeyError: 'no such thing'"):
        load_rows(DataConfig(source=f"{__name__}:failing"))
    with pytest.raises(ValueError, match=r"must return a list of mappings, one per prompt, .* not NoneType"):
        load_rows(DataConfig(source=f"{__name__}:nothing"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is an empty file"),
        ("a.csv", b"prompt,answer\n", "has no rows"),
        ("a.jsonl", b'{"prompt": "a"\nxx', "line 1: not JSON .*; fix or remove it"),
        ("a.csv", b"prompt,answer\nWhat \xe9,x\n", "could not be read: .*UTF8"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_rows(DataConfig(source=str(tmp_path / name)))


def test_an_unknown_file_type_and_a_missing_split_are_named(tmp_path):
    (tmp_path / "a.xml").write_text("<a/>")
    with pytest.raises(ValueError, match=r"cannot read '.xml' files; use .json, .jsonl, .csv, .parquet"):
        load_rows(DataConfig(source=str(tmp_path / "a.xml")))
    DatasetDict(train=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match=r"data.split='test' is not in .*\['train'\]"):
        load_rows(DataConfig(source=str(tmp_path / "splits"), split="test"))
