"""The kinds of programs and tests that code rewards meet: no verdict is wrong, none abstains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rewards.code.grader import CodeOptions, code_sandbox, grade
from rl.types import Reward

KINDS = Path(__file__).resolve().parents[2].parent / "shared" / "cases" / "code_kinds.jsonl"


@pytest.mark.skipif(not KINDS.exists(), reason="needs ../shared/cases")
def test_every_kind_gets_its_verdict() -> None:
    rows = [json.loads(line) for line in KINDS.read_text().splitlines()]
    with code_sandbox(num_workers=2, packages=["numpy"]) as sandbox:

        def graded(row: dict[str, Any]) -> Reward:
            options = CodeOptions(timeout_s=30.0 if row["expected"] else 1.0)
            return grade(row["completion"], row["tests"], options=options, sandbox=sandbox)

        rewards = sandbox.map(graded, rows)
    differing = [
        (row["id"], row["expected"], reward.score, reward.detail)
        for row, reward in zip(rows, rewards, strict=True)
        if reward.score != row["expected"]
    ]
    assert differing == []
