"""Records that were lost, damaged or taken away: what a run says of them, and what it does not claim."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.grpo import main
from recipes.llada import main as llada
from rl.store.folder import Evaluation, evaluation_log
from rl.store.metrics import MetricsLog

LONG = ["train.steps=4", "checkpoint.every=0"]


def result_of(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


def test_a_lost_first_evaluation_is_null_and_no_later_one_takes_its_place(config_file, heldout, capsys):
    run = config_file.parent / "run"
    assert main([str(config_file), *heldout, "evaluation.every=1"]) == 0
    lines = (run / "evaluation.jsonl").read_text().splitlines(keepends=True)
    (run / "evaluation.jsonl").write_text("".join(lines[1:]))
    capsys.readouterr()
    assert main([str(config_file), *heldout, "evaluation.every=1", "train.steps=3"]) == 0
    result = result_of(run)
    assert result["heldout_before"] is None and result["heldout_before_interval"] is None
    reason = "evaluation.jsonl has no whole row of step 0: it was lost or damaged"
    assert result["heldout_before_missing"] == reason
    assert result["heldout_after"] is not None and (result["n"], result["steps"]) == (4, 3)
    out = capsys.readouterr().out
    assert f"held-out before: missing ({reason})" in out and ", from" not in out


def test_fewer_steps_than_were_done_give_the_accuracy_of_the_weights_that_are_there(config_file, heldout):
    """A run that stopped after 2 of 9 steps, and is asked for 1: after is step 2, not the start."""
    run = config_file.parent / "run"
    assert main([str(config_file), "train.steps=2", *heldout]) == 0
    at_2 = result_of(run)["heldout_after"]
    first = (run / "evaluation.jsonl").read_text().splitlines(keepends=True)[0]
    (run / "evaluation.jsonl").write_text(first)
    (run / "result.json").unlink()
    assert main([str(config_file), "train.steps=1", *heldout]) == 0
    assert (result_of(run)["steps"], result_of(run)["heldout_after"]) == (2, at_2)
    assert at_2 != result_of(run)["heldout_before"]


def test_a_damaged_evaluation_is_no_number(tmp_path):
    rows = ['{"step": 0, "accuracy": NaN, "low": 0, "high": 1, "n": 4}', '{"step": 5, "accuracy": 0.5}']
    good = '{"step": 7, "accuracy": 0.5, "low": 0.1, "high": 0.9, "n": 4}'
    (tmp_path / "evaluation.jsonl").write_text("\n".join([*rows, good]) + "\n")
    assert evaluation_log(tmp_path).read() == {7: Evaluation(7, 0.5, 0.1, 0.9, 4)}


def stopped_without_checkpoint(config_file: Path) -> Path:
    """What a run of 4 steps leaves that was killed before its first checkpoint."""
    run = config_file.parent / "run"
    assert main([str(config_file), *LONG]) == 0
    for path in sorted((run / "checkpoints").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    return run


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("step-000001-rank0.jsonl.gz", "torn", "step 2 is sampled again"),
        ("step-000001-rank0.jsonl.gz", "flipped", "step 2 is sampled again"),
        ("step-000001-rank0.jsonl.gz", "lost", "step 2 is sampled again"),
        ("step-000003-rank0.jsonl.gz", "lost", "step 4 is sampled again"),  # metrics.jsonl knows of it
    ],
)
def test_a_damaged_ledger_is_named_by_file_and_step_before_it_is_sampled_again(
    config_file, capsys, name, damage, said
):
    path = stopped_without_checkpoint(config_file) / "ledger" / name
    content = path.read_bytes()
    half = len(content) // 2
    if damage == "lost":
        path.unlink()
    else:
        flipped = content[:half] + bytes([content[half] ^ 8]) + content[half + 1 :]
        path.write_bytes(content[:half] if damage == "torn" else flipped)
    capsys.readouterr()
    assert main([str(config_file), *LONG]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "sampled again" in line]
    assert said in line and name in line


def test_a_whole_ledger_is_repeated_without_a_word(config_file, capsys):
    stopped_without_checkpoint(config_file)
    capsys.readouterr()
    assert main([str(config_file), *LONG]) == 0
    assert "sampled again" not in capsys.readouterr().out


def test_lost_rows_of_metrics_are_named_when_the_run_goes_on(config_file, capsys):
    run = config_file.parent / "run"
    assert main([str(config_file), "train.steps=3"]) == 0
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(lines[0] + lines[1][:40] + "\n" + lines[2])
    assert main([str(config_file), "train.steps=4"]) == 0
    assert "metrics.jsonl lacks the rows of steps 2: lost, or damaged" in capsys.readouterr().out


def test_a_diffusion_run_whose_first_bound_was_lost_has_none(tiny_model_dir, tmp_path):
    rows = [json.dumps({"prompt": f"What is w{i} ?", "completion": f"w{i}"}) + "\n" for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    section = f"{{source: {tmp_path / 'rows.jsonl'}, max_length: 32}}"
    arguments = [
        f"run_dir={tmp_path / 'run'}",
        f"model={{name: {tiny_model_dir}, dtype: fp32, mask_token: <unk>}}",
        f"data={section}",
        f"evaluation.data={section}",
        "train={steps: 1, examples_per_step: 4, token_budget: 64}",
    ]
    (tmp_path / "c.yaml").write_text("")
    assert llada([str(tmp_path / "c.yaml"), *arguments]) == 0
    path = tmp_path / "run" / "likelihood.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[1])
    assert llada([str(tmp_path / "c.yaml"), *arguments, "train.steps=2"]) == 0
    result = result_of(tmp_path / "run")
    assert result["heldout_before"] is None and result["heldout_after"]["num_tokens"] > 0
    assert "likelihood.jsonl has no whole row of step 0" in result["heldout_before_missing"]


def test_what_a_step_writes_reads_no_file_that_grows(tmp_path):
    """Files are read once, when the process starts: 48 rows of 90 bytes read again each time are 100 kB."""
    log, evaluations = MetricsLog(tmp_path), evaluation_log(tmp_path)
    log.write(1, {})
    evaluations.write(1, Evaluation(1, 0.5, 0.1, 0.9, 4))
    before = _bytes_read()
    for step in range(2, 50):
        log.write(step, {"reward/mean": 0.5})
        assert evaluations.at(step) is None
        evaluations.write(step, Evaluation(step, 0.5, 0.1, 0.9, 4))
    assert _bytes_read() - before < 20_000
    assert len(evaluations.read()) == len(log.read()) == 49


def _bytes_read() -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar"):
            return int(line.split()[1])
    return 0
