"""`cohort init`: writes a commented config for a dataset after a look at its first rows, without torch."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from recipes.tasks.files import read_file
from recipes.tasks.tables import FILES, refuse_missing
from rewards.score import take_flags_anywhere
from rl.config.data import TEMPLATES as NAMED
from rl.model.hub import hub_fault

NUM_ROWS = 50
PROMPTS = ("prompt", "messages", "question", "problem", "instruction", "query", "input", "task", "text")
ANSWERS = ("answer", "final_answer", "expected_answer", "ground_truth", "gold", "solution", "target", "label")
TESTS = ("tests", "test_cases", "unit_tests", "test_list", "test")
NUMBER = re.compile(r"\s*\$?\s*[-+]?(\d[\d,]*(\.\d+)?|\.\d+)(\s*/\s*\d+)?\s*\\?[%$]?\s*")
MOST = 0.8
TEMPLATES = {"math": NAMED["boxed"][0], "code": NAMED["code"][0]}
OWN_REWARD = """\
    # FILL IN: no answers were found that a built-in reward could grade. Write rewards.py beside this file:
    #   def score(prompts, completions, **columns):   # columns: one list each, such as answer
    #       return [0.0 for completion in completions]  # a number per completion; None: no verdict
"""


@dataclass(frozen=True)
class Look:
    """What the first rows show: the prompt's and the gold's column, and a reward that fits the golds."""

    rows: Sequence[dict[str, Any]]
    prompt: str | None
    gold: str | None
    reward: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write a commented config for a dataset, after a look at its first rows."
    parser.add_argument("data", help="a .jsonl, .json, .csv or .parquet file, or the name of a hub dataset")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="hub name or folder")
    parser.add_argument("--out", type=Path, help="the file to write; default: NAME_OF_DATA.yaml")
    take_flags_anywhere(parser)


def run(arguments: argparse.Namespace) -> int:
    """
    Raises:
        ValueError: the data cannot be read, or the config file already exists.
    """
    data, stem = arguments.data, Path(arguments.data).stem
    out = (arguments.out or Path(f"{stem}.yaml")).expanduser()
    if out.exists():
        raise ValueError(f"{out} already exists; name another file with --out, or remove it")
    rows, fault = first_rows(data)
    look = look_at(rows)
    out.write_text(config_text(data, look, model=arguments.model, stem=stem, out=out))
    print(f"wrote {out}: prompts from {look.prompt!r}, golds from {look.gold!r}, reward {look.reward}")
    if fault:
        print(fault)
    if not look.prompt or look.reward not in TEMPLATES:
        print(f"first complete the lines of {out} that say FILL IN")
    print(f"then: cohort config {out}; cohort doctor rewards {out}; cohort train {out}")
    return 0


def first_rows(data: str) -> tuple[list[dict[str, Any]], str]:
    """The first rows, and the reason if a hub dataset or a folder could not be read.

    Raises:
        ValueError: a file is missing, damaged, or of a type that runs cannot read.
    """
    path = Path(data)
    if not path.is_file():
        refuse_missing(data)
        fault = hub_fault()
        import datasets

        try:
            return list(islice(datasets.load_dataset(data, split="train", streaming=True), NUM_ROWS)), ""
        except Exception as error:  # the hub and its readers raise whatever they like
            return [], f"the rows of {data} could not be read ({fault or type(error).__name__})"
    if path.suffix not in FILES:
        raise ValueError(f"{data}: cannot read {path.suffix!r} files; use {', '.join(FILES)}")
    rows = _of_file(path)
    if not rows:
        raise ValueError(f"{data} has no rows")
    return rows, ""


def _of_file(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            batch = next(file.iter_batches(NUM_ROWS), None)
            return [] if batch is None else batch.to_pylist()
    try:
        return list(islice(read_file(path), NUM_ROWS))
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from None


def look_at(rows: Sequence[dict[str, Any]]) -> Look:
    """Finds columns by their usual names, and a reward that fits their values."""
    columns = {name.lower(): name for name in reversed(list(rows[0] if rows else ()))}
    prompt = next((columns[name] for name in PROMPTS if name in columns), None)
    tests, golds = (
        [columns[name] for name in names if name in columns and columns[name] != prompt]
        for names in (TESTS, ANSWERS)
    )
    if tests:
        return Look(rows, prompt, tests[0], "code")
    for gold in golds:
        texts = [str(row[gold]) for row in rows if row.get(gold) not in (None, "")]
        if texts and sum(map(_is_math, texts)) >= MOST * len(texts):
            return Look(rows, prompt, gold, "math")
    return Look(rows, prompt, golds[0] if golds else None, "rewards:score")


def _is_math(text: str) -> bool:
    """Whether it is a number, or marks its answer with a LaTeX box or with #### (as GSM8K does)."""
    return NUMBER.fullmatch(text) is not None or "\\boxed{" in text or "####" in text


def config_text(data: str, look: Look, *, model: str, stem: str, out: Path) -> str:
    reward = json.dumps(look.reward)
    return f"""\
# Made by `cohort init {data}` from {len(look.rows)} rows.
# Every key: cohort config {out}; one: cohort config --explain data.template
run_dir: runs/{stem}
model:
  name: {json.dumps(model)}  # hub name or folder
  # dtype: fp32  # faster on a CPU
data:
{_data(data, look)}\
  max_prompt_length: 1024  # tokens; a longer prompt stops the run before it starts,
  # too_long: drop         # or is left out
sampling:
  max_completion_length: 512  # tokens
rewards:
  functions:
{OWN_REWARD if look.reward == "rewards:score" else ""}\
    - {{name: {reward}, weight: 1.0}}
train:
  steps: 100
  prompts_per_step: 8
  group_size: 8  # completions per prompt
optimizer: {{lr: 1.0e-6}}
evaluation:
  data: {{share: 0.05}}  # of the rows, held out
  metric: {reward}
  sampling: {{temperature: 0.0, max_completion_length: 512}}
checkpoint: {{every: 50}}  # steps
"""


def _data(data: str, look: Look) -> str:
    """The lines of the section `data`, down to the template; a key that names a column shows an example."""
    row = look.rows[0] if look.rows else {}
    shown = {name: " ".join(repr(value).split())[:60] for name, value in row.items()}
    said = f"such as {shown[look.prompt]}" if look.prompt else f"FILL IN, one of: {', '.join(row)}"
    lines = [f"source: {json.dumps(data)}", f"prompt_column: {json.dumps(look.prompt or 'prompt')}  # {said}"]
    wanted = "tests" if look.reward == "code" else "answer"
    if look.gold and look.gold != wanted:
        taken = {wanted: f"old_{wanted}"} if wanted in row else {}
        lines.append(f"rename: {json.dumps({look.gold: wanted, **taken})}  # graders read `{wanted}`")
    if look.gold:
        lines.append(f"# `{wanted}` is such as {shown[look.gold]}")
    if look.reward == "code":
        lines.append("# forms that `tests` may have: rewards/code/tests.py; cohort doctor says which fit")
    if isinstance(row.get(look.prompt or ""), str) and look.reward in TEMPLATES:
        lines.append(f"template: {json.dumps(TEMPLATES[look.reward])}")
    return "".join(f"  {line}\n" for line in lines)
