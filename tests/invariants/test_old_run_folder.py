"""A run folder that an earlier release left, killed in its fourth step, goes on to the same end.

`tests/golden/run_before_the_move.tar.gz` was written by commit 0bb4cc6^: the model, the data, `run` (one
checkpoint of step 2 with a moving reference, a ledger of four steps, three rows of metrics), and the weights
and metrics of the same run undisturbed.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recipes.grpo import main
from rl.store.manifest import read_manifest

ROOT = Path(__file__).parents[2]
TIMES = ("time/", "tokens/per_second", "memory/", "sync/")


def rows(path: Path) -> list[dict]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("old")
    with tarfile.open(ROOT / "tests/golden/run_before_the_move.tar.gz") as archive:
        archive.extractall(out, filter="data")
    return out / "old"


def test_a_run_folder_of_an_earlier_release_goes_on_to_the_same_weights(folder, monkeypatch, capsys):
    before = read_manifest(folder / "run/checkpoints/step-000002")
    assert "trainer/scheduler.json" in before["files"]  # the old form
    monkeypatch.chdir(folder)
    assert main(["config.yaml", "run_dir=run"]) == 0
    said = capsys.readouterr().out
    assert "going on from run/checkpoints/step-000002" in said
    assert "sampled again" not in said  # steps 3 and 4 are in the ledger
    found = load_file(folder / "run/checkpoints/step-000004/model.safetensors")
    wanted = load_file(folder / "after.safetensors")
    assert found.keys() == wanted.keys()
    for name in wanted:
        # Another processor, or torch, sums in another order; the same ones give the same bits.
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-6)
    ours, theirs = rows(folder / "run/metrics.jsonl"), rows(folder / "after.jsonl")
    assert [row["step"] for row in ours] == [1, 2, 3, 4]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, abs=1e-6)
