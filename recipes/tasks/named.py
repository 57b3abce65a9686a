"""Tasks by name: `data.source: task:NAME`. An entry says where rows are and which columns count."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from recipes.tasks.tables import read_table
from rewards.format import braced
from rl.config import DataConfig

Row = dict[str, Any]
BOX = re.compile(r"\\(?:boxed|fbox)\s*(\{|[^$]*)")
CALCULATION = re.compile(r"<<[^>]*>>")  # GSM8K's calculator calls: 48/2 = <<48/2=24>>24
FORMS = {"boxed": "\\boxed{{{answer}}}", "answer": "<answer>{answer}</answer>"}


@dataclass(frozen=True)
class Task:
    """Where a task is on the hub, and how its rows are converted; a local file has the same columns.

    Attributes:
        prompts: possible names of the prompt's column; the first one that a row has is used.
        made: computes columns from a row: `answer` or `tests` for graders, a `question`, and `working`, the
            solution from which a `completion` for fine-tuning is made.
        split: the only one on the hub; empty: data.split.
        reward: name of the reward that grades it.
    """

    source: str
    prompts: tuple[str, ...] = ("problem", "question")
    made: Callable[[Row], Row] = lambda row: {}
    options: dict[str, Any] = field(default_factory=dict)
    split: str = ""
    reward: str = "math"


def split_solution(solution: str) -> tuple[str, str]:
    """(solution without calculator calls, number after ####) of a GSM8K solution.

    Raises:
        ValueError: there is no number after ####.
    """
    working, mark, answer = CALCULATION.sub("", solution).rpartition("####")
    if not mark or not answer.strip():
        raise ValueError(f"no '#### number' at the end of this GSM8K solution: {solution[-80:]!r}")
    return working.strip(), answer.strip().replace(",", "")


def _gsm8k(row: Row) -> Row:
    working, answer = split_solution(row["answer"])
    return {"working": working, "answer": answer}


def _math(row: Row) -> Row:
    """Takes the answer from the last box of a MATH solution, unless the copy has it in a column."""
    if "solution" not in row:
        return {}
    text, answer = row["solution"], row.get("answer")
    if not answer:
        *_, box = (None, *BOX.finditer(text))
        if box is None:
            raise ValueError(f"no \\boxed answer in this MATH solution: {text[-80:]!r}; leave the row out")
        answer = braced(text, box.start(1)) if box[1] == "{" else box[1].strip()
    return {"working": text, "answer": answer}


def _olympiad(row: Row) -> Row:
    return {"answer": row["answer"] if "answer" in row else row["final_answer"]}


def _humaneval(row: Row) -> Row:
    name = row["entry_point"]
    code = f"{row['test']}\ncheck({name})"
    tests = {"type": "asserts", "entry_point": name, "prompt": row["prompt"], "code": code}
    return {"question": f"Complete this function:\n```python\n{row['prompt'].strip()}\n```", "tests": tests}


def _mbpp(row: Row) -> Row:
    shown = "\n".join(row["test_list"])
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
    tests = {"type": "asserts", "code": [*filter(None, [setup]), *row["test_list"]]}
    text = row.get("text") or row["prompt"]
    return {"question": f"{text}\nThe code should pass these tests:\n{shown}", "tests": tests}


TASKS = {
    "gsm8k": Task("openai/gsm8k", made=_gsm8k, options={"name": "main"}),
    "math": Task("DigitalLearningGmbH/MATH-lighteval", made=_math),
    "math500": Task("HuggingFaceH4/MATH-500", made=_math, split="test"),
    "amc23": Task("math-ai/amc23", split="test"),
    "aime24": Task("HuggingFaceH4/aime_2024", split="train"),
    "aime25": Task("math-ai/aime25", split="test"),
    "minerva": Task("math-ai/minervamath", split="test"),
    "olympiad": Task("math-ai/olympiadbench", made=_olympiad, split="test"),
    "humaneval": Task("openai/openai_humaneval", ("question",), _humaneval, split="test", reward="code"),
    "mbpp": Task("google-research-datasets/mbpp", ("question",), _mbpp, {"name": "full"}, reward="code"),
}
"""Any other name is a generator of reasoning-gym, such as countdown."""


def task_rows(name: str, config: DataConfig) -> list[Row]:
    """The rows of a task, from the hub or the file that `data.options.source` names.

    Worked solutions also give a `completion`: the working in <think>, and the answer in the form that
    `data.options.form` names (boxed or answer).

    Raises:
        ValueError: a column is missing, the form is unknown, or `read_table` raises.
    """
    task, options = TASKS[name], dict(config.options)
    place, form = options.pop("source", None), options.pop("form", "boxed")
    if form not in FORMS:
        raise ValueError(f"data.options.form={form!r} is not one of {', '.join(FORMS)}")
    keys: dict[str, Any] = {"source": place, "split": config.split, "options": options}
    if place is None:
        keys = {"source": task.source, "split": task.split or config.split, "options": task.options | options}
    table = DataConfig(**keys, revision=config.revision, size=config.size)
    return [
        _made(row, task, name=name, form=form, prompt_column=config.prompt_column)
        for row in read_table(table)
    ]


def _made(row: Row, task: Task, *, name: str, form: str, prompt_column: str) -> Row:
    try:
        row = row | task.made(row)
        prompt = next(row.pop(column) for column in task.prompts if column in row)
    except (KeyError, StopIteration):
        raise ValueError(
            f"data.source=task:{name}: the rows have {', '.join(row)}, which are not the columns of this task"
        ) from None
    if "working" in row:
        answer = FORMS[form].format(answer=row["answer"])
        row["completion"] = f"<think>\n{row.pop('working')}\n</think>\n{answer}"
    return {**row, prompt_column: prompt}
