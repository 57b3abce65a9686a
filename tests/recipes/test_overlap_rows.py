"""Evaluation prompts among the rows of rejection sampling and of fine-tuning."""

from __future__ import annotations

import json

import pytest

from recipes.cli import main as cohort
from recipes.sft import make_trainer
from recipes.tasks.overlap import without_asked
from rl.config.data import OverlapConfig
from rl.config.read import read_config
from rl.config.sft import SftConfig
from rl.store.ledger import Ledger
from tests.recipes.conftest import write_rows
from tests.recipes.planted import LONG, text


def section(tmp_path, questions, **more) -> OverlapConfig:
    file = tmp_path / "evaluation.jsonl"
    file.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions))
    return OverlapConfig.model_validate({"data": {"source": str(file), **more.pop("data", {})}, **more})


def chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def test_rows_in_each_form_are_compared_with_a_named_evaluation(tmp_path):
    """13 words of LONG are planted into rows 0, 2 and 4; row 1 is a short question in the rows' template."""
    overlap = section(
        tmp_path, [text("so", *LONG, "end"), "Short one?"], data={"template": "{prompt} Box it."}
    )
    planted, answer = text("other", *LONG[1:14]), {"role": "assistant", "content": text(*LONG)}
    rows = [
        {"prompt": chat(planted), "completion": [answer]},
        {"prompt": chat("short one? BOX it"), "completion": "w1"},
        {"messages": [*chat("w1"), answer, *chat(planted), answer]},
        {"messages": [*chat("w1"), answer]},  # what the assistant says is not asked
        {"text": planted},
        {"prompt": text("other", *LONG[1:13]), "completion": text(*LONG)},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Short one? box it"}]}, answer]},
    ]
    said = []
    assert without_asked(None, rows, "prompt", said.append) is rows and not said
    assert without_asked(overlap, rows, "prompt", said.append) is rows
    counts = "of 7 training prompts 2 equal a held-out one, and 3 share 13 consecutive words with one"
    assert said == [f"{counts} (such as row 0); overlap.action=drop leaves them out"]
    drop = overlap.model_copy(update={"action": "drop"})
    assert without_asked(drop, rows, "prompt", said.append) == [rows[3], rows[5]]
    with pytest.raises(ValueError, match=f"{counts}.*; use other rows, or overlap.action=drop"):
        without_asked(overlap.model_copy(update={"action": "refuse"}), rows, "prompt", said.append)
    with pytest.raises(ValueError, match=r"row 1: 'messages'.* \(user\) has no content; give it a text"):
        without_asked(overlap, [rows[0], {"messages": [{"role": "user"}]}], "prompt", said.append)


def test_rows_without_their_template_are_compared_too(tmp_path):
    """Rows to sample and to fine-tune on have the template of `data` added only afterwards."""
    overlap = section(tmp_path, ["Short one?"], data={"template": "{prompt} Box it."})
    rows = [{"prompt": "short one?"}, {"prompt": "short one? box it"}, {"prompt": "w1"}]
    drop = overlap.model_copy(update={"action": "drop"})
    assert without_asked(drop, rows, "prompt", [].append) == [rows[2]]


def test_what_is_sampled_leaves_out_what_is_asked(traces_config, tmp_path, capsys):
    """w3 and w4 of w0 to w11."""
    asked = write_rows(tmp_path / "asked.jsonl", range(3, 5))
    words = [str(traces_config), f"overlap={{data: {{source: {asked}}}, action: drop}}"]
    assert cohort(["sample", *words]) == 0
    assert "of 12 training prompts 2 equal a held-out one" in " ".join(capsys.readouterr().out.split())
    prompts = {g.prompt.text for record in Ledger(tmp_path / "traces").sample(99) for g in record.groups}
    assert len(prompts) == 10 and not any("w3 " in p or "w4 " in p for p in prompts)
    assert cohort(["sample", str(traces_config)]) == 1
    assert "overlap" in capsys.readouterr().err


def test_fine_tuning_leaves_out_what_is_asked(tiny_model_dir, tmp_path):
    rows = [{"prompt": f"What is w{i} ?", "completion": "w1"} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overlap = section(tmp_path, ["what is w2"], action="drop")
    words = [f"model.name={tiny_model_dir}", "model.dtype=fp32", f"data.source={tmp_path / 'rows.jsonl'}"]
    words += [f"run_dir={tmp_path / 'run'}", "train.examples_per_step=4", "data.max_length=64"]
    for more, number in (([], 6), ([f"overlap={overlap.model_dump_json()}"], 5)):
        trainer, found, _ = make_trainer(read_config(SftConfig, None, [*words, *more]))
        assert len(found) == len(trainer.train_dataset) == number
        assert (rows[2] in found) == (number == 6)
