"""A run whose processes share work out ends where one does in which each trains what it sampled."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from rl.store.rows import read_rows
from tests.invariants.resume_laws import start, tensors, write_config
from tests.scoring import relative_error

pytestmark = [pytest.mark.timeout(400), pytest.mark.rotation]


def owners(run: Path, step: int) -> list[list[int]]:
    """By process that sampled, of the groups that were trained."""
    files = [run / "ledger" / f"step-{step:06d}-rank{rank}.jsonl.gz" for rank in (0, 1)]
    rows = [[json.loads(line) for line in gzip.decompress(f.read_bytes()).splitlines()[1:]] for f in files]
    return [[row["trained_by"] for row in of_rank if row["kept"]] for of_rank in rows]


def test_sharing_work_out_changes_neither_minibatches_nor_weights(tiny_model_dir, tmp_path):
    write_config(tiny_model_dir, tmp_path, prompts_per_step="16", group_size="2")
    words = [" ".join(f"w{i + k}" for k in range(1 + 5 * (i % 5))) for i in range(10)]
    prompts = "".join(json.dumps({"prompt": f"What is {w} ?"}) + "\n" for w in words)
    (tmp_path / "data.jsonl").write_text(prompts)
    start("shared_work_runs.py", tmp_path)
    own, shared = tmp_path / "own", tmp_path / "shared"
    assert [owners(own, step) for step in (0, 1)] == [[[0] * 8, [1] * 8]] * 2
    assert any(owners(shared, step) != owners(own, step) for step in (0, 1))
    a, b = tensors(own, 2, "."), tensors(shared, 2, ".")
    assert relative_error(a, b) <= 1e-6
    for one, other in zip(*(read_rows(run / "metrics.jsonl") for run in (own, shared)), strict=True):
        names = ("policy/grad_norm", "policy/kl", "tokens/trained", "reward/mean")
        assert {n: other[n] for n in names} == pytest.approx({n: one[n] for n in names}, rel=1e-4)
