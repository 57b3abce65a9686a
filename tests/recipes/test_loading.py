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


def test_values_of_a_json_file_are_those_that_it_holds(tmp_path):
    """Arrow gives a column one type: [1.0, 2.5], a datetime, 1.2345678901234568e+22."""
    written = [
        {
            "prompt": "a",
            "answer": 1,
            "day": "2024-01-31",
            "big": 12345678901234567890123,
            "at": {"x": [1, 2.5]},
        },
        {"prompt": "b", "answer": 2.5, "day": "2024-02-01", "big": 9007199254740993},
    ]
    text = "".join(json.dumps(row) + "\n" for row in written)
    (tmp_path / "a.jsonl").write_text("\ufeff" + text + "\n", encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(written, indent=1))
    for name in ("a.jsonl", "a.json"):
        rows = load_rows(DataConfig(source=str(tmp_path / name)))
        assert rows == [written[0], written[1] | {"at": None}]
        assert [str(row["answer"]) for row in rows] == ["1", "2.5"]
        assert [*rows[1]] == [*written[0]]  # fingerprints depend on the order of columns


def test_a_cell_of_a_csv_file_is_a_number_only_if_that_loses_nothing(tmp_path):
    """pandas reads 7, 1.5, None, True and 3.0 here, and turns n into floats for its empty cell."""
    (tmp_path / "a.csv").write_text(
        'prompt,code,price,element,ok,n,x\n"a, b",007,1.50,NA,True,3,0.5\n"c\n""d""",012,2.00,None,False,,4\n'
    )
    assert load_rows(DataConfig(source=str(tmp_path / "a.csv"))) == [
        {"prompt": "a, b", "code": "007", "price": "1.50", "element": "NA", "ok": True, "n": 3, "x": 0.5},
        {
            "prompt": 'c\n"d"',
            "code": "012",
            "price": "2.00",
            "element": "None",
            "ok": False,
            "n": None,
            "x": 4,
        },
    ]
    assert str(load_rows(DataConfig(source=str(tmp_path / "a.csv"), split="train[:1]"))[0]["n"]) == "3"


def test_files_of_a_folder_are_read_as_they_are(tmp_path):
    """`datasets` takes one format alone, and reads 7, None and 1.0."""
    (tmp_path / "train-0.csv").write_text("prompt,answer\na,007\n")
    (tmp_path / "train-1.csv").write_text("prompt,answer\nb,NA\n")
    (tmp_path / "test.jsonl").write_text('{"prompt": "c", "answer": 1}\n{"prompt": "d", "answer": 2.5}\n')
    (tmp_path / "README.md").write_text("# Rows\n")
    train, test = (
        [{"prompt": p, "answer": a} for p, a in x] for x in ([("a", "007"), ("b", "NA")], [("c", 1)])
    )
    source = str(tmp_path)
    assert load_rows(DataConfig(source=source)) == train
    assert load_rows(DataConfig(source=source, split="test[:1]+train")) == test + train
    assert str(load_rows(DataConfig(source=source, split="test"))[0]["answer"]) == "1"
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: train-0.csv\n---\n")
    assert load_rows(DataConfig(source=source)) == train[:1]


CONFIGS = """---
configs:
- config_name: whole
  data_files:
  - {split: train, path: rows.csv}
  - {split: test, path: [more.csv]}
- config_name: tabs
  sep: "\\t"
  data_files: tabs.csv
- config_name: folder
  data_dir: sub
dataset_info:
- config_name: typed
  features:
  - {name: prompt, dtype: string}
  - {name: answer, dtype: float64}
"""


def test_files_that_a_page_names_are_read_as_they_are(tmp_path):
    """`datasets` reads 7 and None; what the page says of separators and types stays its business."""
    (tmp_path / "rows.csv").write_text("prompt,answer\na,007\nb,NA\n")
    (tmp_path / "more.csv").write_text("prompt,answer\nc,1\nd,2.5\n")
    (tmp_path / "tabs.csv").write_text("prompt\tanswer\na\t007\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "train.csv").write_text("prompt,answer\na,008\n")
    (tmp_path / "README.md").write_text(f"{CONFIGS}---\n")

    def answers(name: str, **keys):
        config = DataConfig(source=str(tmp_path), options={"name": name}, **keys)
        return [str(row["answer"]) for row in load_rows(config)]

    assert answers("whole") == ["007", "NA"]
    assert answers("whole", split="test+train[:1]") == ["1", "2.5", "007"]
    assert answers("tabs") == ["7"]
    assert answers("folder") == ["008"]
    typed = CONFIGS.replace("dataset_info:", "- config_name: typed\n  data_files: more.csv\ndataset_info:")
    (tmp_path / "README.md").write_text(f"{typed}---\n")
    assert answers("typed") == ["1.0", "2.5"]
    with pytest.raises(ValueError, match="BuilderConfig 'absent' not found"):
        answers("absent")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '{"prompt": "q0",\n "answer": "0"}\n{\n"prompt": "q1", "answer": "1"}'),  # as jq writes
        ("a.jsonl", '{"prompt": "q0", "answer": "0"}{"prompt": "q1", "answer": "1"}'),
        ("a.jsonl", '{"prompt": "q0", "answer": "0"}\r{"prompt": "q1", "answer": "1"}\r'),
        ("a.json", " " * 99 + '[{"prompt": "q0", "answer": "0"},\n{"prompt": "q1", "answer": "1"}]\n\n'),
        ("a.csv", "\n\nprompt,answer\nq0,0x\nq1,1x\n"),
        ("a.csv", 'prompt,answer\rq0,0x\r"q1",1x\r'),
    ],
)
def test_line_breaks_do_not_change_what_is_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    rows = load_rows(DataConfig(source=str(tmp_path / name)))
    assert [row | {"answer": row["answer"].rstrip("x")} for row in rows] == ROWS[:2]


def test_digits_that_are_not_a_plain_number_stay_text(tmp_path):
    (tmp_path / "a.csv").write_text(f"prompt,long,arabic\na,{'1' * 5000},1\u0662\n", encoding="utf-8")
    (row,) = load_rows(DataConfig(source=str(tmp_path / "a.csv")))
    assert row == {"prompt": "a", "long": "1" * 5000, "arabic": "1\u0662"}


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
        ("a.csv", b"prompt,answer\nWhat \xe9,x\n", r"line 2: not UTF-8 \(.* at byte 5\); save it as UTF-8"),
        ("a.csv", b"prompt,answer\nOne, two,x\n", "line 2: 3 cells, but line 1 names 2 columns; put a text"),
        ("a.csv", b"prompt,answer\nOne\ntwo,x\n", "line 2: 1 cells, but line 1 names 2 columns; put a text"),
        ("a.csv", b"prompt,a,a\nOne,2,3\n", "line 1: two columns have the same name: prompt, a, a"),
        ("a.json", b'[{"prompt": "a"},\n {"prompt": }]', r"line 2: not JSON \(Expecting value, column 13\)"),
        ("a.jsonl", b'{"prompt": "a", "prompt": "b"}', "line 1: .*the key 'prompt' occurs twice"),
        ("a.jsonl", b'{"prompt": "\\ud800"}', "line 1: .*half of a surrogate pair"),
        ("a.csv", b'prompt,answer\n"a",1\nb,"2\nc,3\n', r"line 3: not CSV \(unexpected end.*twice"),
        ("a.csv", b'prompt,answer\n"Say "no" now",1\n', r"line 2: not CSV \(',' expected .*twice"),
        ("a.json", b'[{"prompt": "a"},\n 3]', r"item 2 of the list: a row is an object .*, not 3"),
        ("a.jsonl", b'["a", 1]\n["b", 2]\n', "item 1 of the list: a row is an object .*, not 'a'"),
        ("a.jsonl", b'{"prompt": "a"},\n{"prompt": "b"},\n', r"line 1: not JSON \(.*, column 16\)"),
        ("a.jsonl", b'{"a": {}}\n\n{"a": 1\n{"a": 2}\n', r"line 3: not JSON \(.*, line 4, column 1\)"),
        ("a.json", b"[\n" * 9999, r"line 1: not JSON \(maximum recursion depth"),
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


def test_a_split_without_rows_is_refused_and_all_means_every_split(tmp_path):
    data = Dataset.from_list(ROWS)
    data.to_json(tmp_path / "a.jsonl")
    data.to_parquet(tmp_path / "a.parquet")
    DatasetDict(train=data, test=data.select([0])).save_to_disk(tmp_path / "saved")
    for name, rows in (("a.jsonl", ROWS), ("a.parquet", ROWS), ("saved", [*ROWS, ROWS[0]])):
        source = str(tmp_path / name)
        for split in ("train[4:]", "train[:0]"):
            with pytest.raises(ValueError, match=rf"{name}' has no rows in data.split='train\["):
                load_rows(DataConfig(source=source, split=split))
        assert load_rows(DataConfig(source=source, split="all")) == rows
