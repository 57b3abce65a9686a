"""Runs whose processes split the weights: another number of them goes on, and a fault of one ends all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rl.store.rows import read_rows
from tests.invariants.resume_laws import STEPS, start, write_config
from tests.scoring import relative_error

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def runs(tiny_model_dir, tmp_path_factory) -> tuple[Path, dict]:
    """The folder, and for each run the exit codes and the seconds by which one process outlived the first."""
    out = tmp_path_factory.mktemp("runs")
    write_config(tiny_model_dir, out, sharding="full")
    start("sharded_runs.py", out)
    return out, json.loads((out / "ends.json").read_text())


def weights(run: Path, step: int) -> dict:
    files = (run / "checkpoints" / f"step-{step:06d}").glob("*.safetensors")
    return {name: x for file in files for name, x in load_file(file).items()}


def test_two_then_one_then_four_processes_end_where_two_do(runs):
    """On recorded groups: none is sampled again, and the metrics of the steps are those of the two."""
    out, ends = runs
    assert [ends[name][0] for name in ("two", "one goes on", "four go on")] == [[0] * 2, [0], [0] * 4]
    for step in (2, 4, STEPS):
        a, b = weights(out / "two", step), weights(out / "moved", step)
        assert relative_error(a, b) <= 1e-6, step
    first, last = weights(out / "two", 2), weights(out / "two", STEPS)
    assert any((first[n] - last[n]).abs().max() > 1e-4 for n in first)
    rows = [read_rows(out / name / "metrics.jsonl") for name in ("two", "moved")]
    names = (
        "reward/mean",
        "tokens/completion",
        "rollout/replaced",
        "policy/grad_norm",
        "completion/length_mean",
    )
    assert [row["step"] for row in rows[1]] == list(range(1, STEPS + 1))
    for two, moved in zip(*rows, strict=True):
        assert {n: moved[n] for n in names} == pytest.approx({n: two[n] for n in names}, rel=1e-4)
    said = "".join((out / f"moved-of-{size}-0.log").read_text() for size in (1, 4))
    assert "sampled again" not in said
    assert "train.sharding=full: one process holds all weights" in said


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("writer", "process 1 of 2: checkpoint of step 2 could not be written to"),
        (
            "sender",
            "process 1 of 2: version 2 was not loaded: engine transformers broke off at "
            "model.layers.0.mlp.up_proj.weight: RuntimeError: no memory is left",
        ),
    ],
)
def test_a_process_that_fails_ends_both_within_a_minute_by_name(runs, name, sentence):
    out, ends = runs
    codes, seconds = ends[name]
    assert codes == [1, 1] and seconds < 50
    for rank in (0, 1):
        last = [line for line in (out / f"{name}-of-2-{rank}.log").read_text().splitlines() if line.strip()][
            -1
        ]
        assert last.startswith(f"cohort: {sentence}")
