"""GSM8K's rows as chats with worked examples."""

from __future__ import annotations

import json

import pytest

from recipes.tasks.gsm8k import boxed_gsm8k, split_solution

ROWS = [
    {"question": "How many?", "answer": "48/2 = <<48/2=24>>24 clips.\n48+24 = <<48+24=72>>72.\n#### 72"},
    {"question": "What is left?", "answer": "It is $<<1200-200=1000>>1,000.\n#### 1,000"},
    {"question": "And then?", "answer": "None.\n#### -3"},
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def test_examples_end_in_a_box_and_are_no_prompts(file):
    rows = boxed_gsm8k(source=file, num_examples=2)
    assert [row["answer"] for row in rows] == ["-3"]
    user, shown, *rest = rows[0]["prompt"]
    assert user == {"role": "user", "content": "How many?"}
    assert shown["content"] == "48/2 = 24 clips.\n48+24 = 72.\n\\boxed{72}"
    assert rest[1]["content"] == "It is $1,000.\n\\boxed{1000}"
    assert rest[2] == {"role": "user", "content": "And then?"}


def test_size_counts_prompts(file):
    assert len(boxed_gsm8k(source=file, num_examples=1, size=1)) == 1
    assert len(boxed_gsm8k(source=file, num_examples=0)) == 3


def test_a_solution_without_its_number_is_refused():
    with pytest.raises(ValueError, match="no '#### number'"):
        split_solution("It is 7.")
