"""`cohort score`: rows in, rows out, in order; faults of the file are named by line."""

import argparse
import json

import pytest

from recipes.cli import score as command
from rewards import score
from rl.store.ledger import Ledger
from rl.types import Completion, Group, Prompt, Reward, ScoredGroup, VersionSpan

HERE = "rewards_for_tests:"


@pytest.fixture
def run(tmp_path, capsys):
    def run_(rows, *words):
        """(results, stdout, stderr, exit code) of `cohort score WORDS` on a file with these rows."""
        file = tmp_path / "rows.jsonl"
        file.write_text(
            "".join(row + "\n" if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
        )
        parser = argparse.ArgumentParser()
        commands = parser.add_subparsers(required=True)
        command.add_arguments(commands.add_parser("score"))
        args = parser.parse_args(
            [
                "score",
                *(word.replace("FILE", str(file)).replace("OUT", str(tmp_path / "out")) for word in words),
            ]
        )
        code = command.run(args)
        said = capsys.readouterr()
        lines = (tmp_path / "out").read_text() if (tmp_path / "out").exists() else said.out
        return [json.loads(line) for line in lines.splitlines()], said.out, said.err, code

    return run_


def test_each_row_gets_a_result_with_its_id_in_the_order_of_the_file(run):
    rows = [{"id": f"r{i}", "completion": "x" * i} for i in range(700)]
    results, _, err, code = run(rows, HERE + "length", "FILE", "--workers", "2")
    assert [(r["id"], r["score"]) for r in results] == [(f"r{i}", i) for i in range(700)]
    assert set(results[0]) == {"id", "score", "reason", "extracted", "elapsed_ms", "detail"}
    assert "700 rows" in err and "mean score 349.5" in err and "graders failed on 0 of 700" in err
    assert code == 0


def test_reason_and_extracted_answer_are_given_and_rows_without_id_are_numbered(run):
    results, *_ = run(
        [{"completion": "3", "answer": "3"}, "", {"completion": "4", "answer": "4"}], HERE + "rich", "FILE"
    )
    assert [(r["id"], r["reason"], r["extracted"]) for r in results] == [
        (0, "correct", "3"),
        (1, "correct", "4"),
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["FILE", "bonus=0.5", "--out", "OUT", "--workers", "2"],
        ["FILE", "--out", "OUT", "--workers", "2", "bonus=0.5"],
        ["--workers=2", "FILE", "--out", "OUT", "bonus=0.5"],
    ],
)
def test_options_are_key_value_words_before_or_after_the_flags(run, words):
    results, out, _, _ = run([{"completion": "a", "answer": "a"}], HERE + "exact", *words)
    assert results[0]["score"] == 1.5
    assert out.startswith("1 rows in ")


def test_a_row_on_which_the_grader_hangs_abstains_and_the_others_stand(run):
    rows = [{"completion": text} for text in ("a", "hang", "abc")]
    results, _, err, code = run(rows, HERE + "length", "FILE", "--deadline", "1")
    assert [r["score"] for r in results] == [1.0, None, 3.0]
    assert results[1]["reason"] == "infra_error" and results[1]["detail"].startswith("timeout")
    assert "timeout 1" in err and code == 1


def test_chats_are_passed_as_messages(run):
    chat = [{"role": "assistant", "content": "<think>a</think>b"}]
    rows = [{"completion": chat, "prompt": [{"role": "user", "content": "q"}]}, {"completion": "<think>"}]
    results, *_ = run(rows, "trl.rewards:think_format_reward", "FILE", "--chat", "--deadline", "60")
    assert [r["score"] for r in results] == [1.0, 0.0]


def test_token_ids_come_from_the_rows(run):
    results, *_ = run(
        [{"completion": "", "completion_ids": [1] * 10}], "soft_overlong", "FILE", "max_length=10", "buffer=4"
    )
    assert results[0]["score"] == -1.0


def test_rows_with_the_same_group_are_one_group_for_a_groupwise_reward(run):
    rows = [
        {"completion": "a", "group": 1},
        {"completion": "abc", "group": 1},
        {"completion": "abcdef", "group": 2},
    ]
    results, *_ = run(rows, HERE + "centred", "FILE")
    assert [r["score"] for r in results] == [-1.0, 1.0, 0.0]


def test_rows_are_one_group_by_prompt_only_while_their_columns_are_the_same(run):
    rows = [
        {"id": 1, "prompt": "q", "completion": "a", "answer": "a"},
        {"id": 2, "prompt": "q", "completion": "a", "answer": "b"},  # another question, said alike
        {"id": 3, "prompt": "q", "completion": "b", "answer": "b"},
        {"id": 4, "completion": "a", "answer": "a"},
        {"id": 5, "completion": "a", "answer": "a"},
    ]
    results, *_ = run(rows, HERE + "exact", "FILE")
    assert [r["score"] for r in results] == [1.0, 0.0, 1.0, 1.0, 1.0]
    sizes, *_ = run(rows, HERE + "batch_size", "FILE")
    assert [r["score"] for r in sizes] == [3.0, 3.0, 3.0, 1.0, 1.0]  # it takes no column
    assert [r["score"] for r in run(rows[1:3], HERE + "size_of_call", "FILE")[0]] == [2.0, 2.0]


def test_a_completion_of_several_messages_is_what_the_assistant_said(run):
    parts = [{"type": "text", "text": "a"}]
    chat = [{"role": "assistant", "content": parts}, {"role": "tool", "content": "no"}]
    results, *_ = run([{"completion": chat, "answer": "a"}], HERE + "exact_text", "FILE")
    assert results[0]["score"] == 1.0


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        ([{"completion": "a"}, "[" * 100_000], [HERE + "length"], "line 2: nested too deeply"),
        (
            [{"completion": "a", "answer": x, "group": 1} for x in "ab"],
            [HERE + "exact"],
            "line 2 has the `group` of line 1 but other columns",
        ),
        ([{"completion": "a"}, "{"], [HERE + "length"], "line 2: not JSON"),
        (["[1]"], [HERE + "length"], "line 1: a row is an object"),
        (
            [{"text": "a"}],
            [HERE + "length"],
            "line 1: `completion` must be text or a list of messages; the row has: text",
        ),
        ([{"completion": [1]}], [HERE + "length"], "line 1: `completion` must be"),
        (
            [{"completion": "a", "answer": "a"}, {"completion": "a", "anwser": ""}],
            [HERE + "exact"],
            "line 2: .*rename 'anwser'",
        ),
        (
            [{"completion": "a"}],
            ["soft_overlong", "max_length=4", "buffer=1"],
            "line 1: .* each row needs `completion_ids`",
        ),
        ([{"completion": "a"}], [HERE + "exact", "bonsu=1"], "did you mean 'bonus'"),
        ([{"completion": "a"}], [HERE + "length", "word"], "'word' must look like key=value"),
        ([{"completion": "a"}], ["lenght"], "no reward 'lenght'"),
        ([], [HERE + "length"], "has no rows"),
    ],
)
def test_what_is_wrong_with_a_file_or_a_word_is_said(run, rows, words, message):
    with pytest.raises(ValueError, match=message):
        run(rows, words[0], "FILE", *words[1:])


def test_a_file_that_is_not_there_is_named(run):
    with pytest.raises(ValueError, match=r"no file .*rows\.jsonl\.gone"):
        run([], HERE + "length", "FILE.gone")


def test_quantiles_are_values_that_occur():
    ordered = [1.0, 2.0, 3.0, 4.0]
    assert [score.quantile(ordered, share) for share in (0.0, 0.25, 0.5, 0.51, 0.99, 1.0)] == [
        1,
        1,
        2,
        3,
        4,
        4,
    ]


@pytest.fixture
def run_dir(tmp_path):
    """Two steps of a run that graded by `exact`, half of it by a rule of its own."""
    ledger = Ledger(tmp_path / "run")
    for step in range(2):
        done = [
            Completion([1], [], [True], "stop", [VersionSpan(step, 1)], text=text) for text in ("a", "b", "c")
        ]
        done[2].finish_reason = "abort"
        prompt = Prompt(f"train/{step}", "?", (1,), (), {"answer": "a"})
        parts = [{HERE + "exact": float(step), "other": 9.0}, {HERE + "exact": None, "other": 9.0}, {}]
        rewards = [Reward(part.get("other"), parts=part) for part in parts]
        groups = [ScoredGroup(Group(prompt, done), rewards)]
        ledger.write(step, groups, cursor_before=step, cursor_after=step + 1, policy_version=step)
    return tmp_path / "run"


def test_the_completions_of_a_run_are_graded_again_and_compared(run, run_dir):
    results, out, _, code = run([], HERE + "exact", str(run_dir), "--out", "OUT")
    ids = [f"step {s}, train/{s - 1}, completion {i}" for s in (1, 2) for i in (0, 1)]
    assert [(r["id"], r["score"], r["run"]) for r in results] == list(
        zip(ids, [1.0, 0.0, 1.0, 0.0], [0.0, None, 1.0, None], strict=True)
    )
    assert out.splitlines()[3:7] == [
        "1 of 4 score as in the run: mean 0.5000, then 0.5000; 3 differ",
        "  step 1, train/0, completion 0: 0.0, now 1.0 (scored)",
        "  step 1, train/0, completion 1: None, now 0.0 (scored)",
        "  step 2, train/1, completion 1: None, now 0.0 (scored)",
    ]
    assert code == 0


def test_a_reward_that_the_run_did_not_have_is_compared_with_its_whole(run, run_dir):
    results, *_ = run([], HERE + "length", str(run_dir))
    assert [(r["score"], r["run"]) for r in results] == [(1.0, 9.0)] * 4


def test_the_options_of_the_run_are_used_unless_others_are_given(run, run_dir):
    spec = "{name: 'rewards_for_tests:exact', options: {bonus: 0.5}}"
    (run_dir / "config.yaml").write_text(f"rewards: {{functions: [{spec}]}}")
    assert [r["score"] for r in run([], HERE + "exact", str(run_dir))[0]] == [1.5, 0.5, 1.5, 0.5]
    assert [r["score"] for r in run([], HERE + "exact", str(run_dir), "bonus=2")[0]] == [3.0, 2.0, 3.0, 2.0]


def test_a_folder_without_a_ledger_and_columns_that_a_run_lacks_are_named(run, run_dir, tmp_path):
    with pytest.raises(ValueError, match="has no ledger"):
        run([], HERE + "exact", str(tmp_path))
    with pytest.raises(ValueError, match="needs the column 'tests'; the dataset has: answer"):
        run([], "code", str(run_dir))
