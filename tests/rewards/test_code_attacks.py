"""Hostile programs get 0, honest ones 1, and nothing is left behind: here, and in the settings that
machines have.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import code_attacks
import code_lies
import pytest
from settings import ENVIRONMENT, SETTINGS, SHARED, in_setting

GRADE = Path(__file__).with_name("grade_cases.py")
HOSTILE_S, HONEST_S = (
    0.7,
    30.0,
)  # an attack that hangs costs its whole time; honest programs must survive a busy machine


def own_cases() -> list[dict[str, Any]]:
    cases = []
    for programs, tests, expected in (
        (code_attacks.AGAINST_ASSERTS, code_attacks.ADD_TESTS, 0.0),
        (code_attacks.AGAINST_OUTPUT, code_attacks.SUM_TESTS, 0.0),
        (code_lies.LIES, code_attacks.ADD_TESTS, 0.0),
        (code_attacks.HONEST_ASSERTS, code_attacks.ADD_TESTS, 1.0),
        (code_lies.UNUSUAL, code_attacks.ADD_TESTS, 1.0),
        (code_attacks.HONEST_OUTPUT, code_attacks.SUM_TESTS, 1.0),
    ):
        for name, code in programs.items():
            timeout_s = HONEST_S if expected else HOSTILE_S
            cases.append(
                {"id": name, "code": code, "tests": tests, "expected": expected, "timeout_s": timeout_s}
            )
    return cases


def shared_cases() -> list[dict[str, Any]]:
    cases = []
    for line in (SHARED / "attacks.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["kind"].startswith("code"):
            expected = float(row["expected_reward"])
            code = f"Here is my solution.\n```python\n{row['completion_code']}\n```\n"
            timeout_s = HONEST_S if expected else HOSTILE_S
            cases.append(
                {
                    "id": f"{row['id']} {row['why']}",
                    "code": code,
                    "tests": row["tests"],
                    "expected": expected,
                    "timeout_s": timeout_s,
                }
            )
    return cases


def graded(
    cases: list[dict[str, Any]], folder: Path, tier: str, prefix: list[str], python: str
) -> dict[str, Any]:
    """Runs `grade_cases.py` in a setting and returns its report."""
    folder.chmod(0o755)
    file = folder / "cases.json"
    file.write_text(json.dumps(cases))
    file.chmod(0o644)
    done = subprocess.run(
        [*prefix, python, str(GRADE), str(file), tier],
        cwd="/",
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def wrong(cases: list[dict[str, Any]], report: dict[str, Any]) -> list[tuple[str, float | None]]:
    pairs = zip(cases, report["scores"], strict=True)
    return [(case["id"], score) for case, score in pairs if score != case["expected"]]


@pytest.mark.parametrize("tier", ["auto", "seccomp"])
def test_own_attacks_get_zero_and_honest_programs_one(tier: str, tmp_path: Path) -> None:
    cases = own_cases()
    report = graded(cases, tmp_path, tier, [], sys.executable)
    assert wrong(cases, report) == []
    assert report["left"] == []
    assert tier in ("auto", report["tier"])


@pytest.mark.skipif(not (SHARED / "attacks.jsonl").exists(), reason="needs ../shared/cases")
@pytest.mark.parametrize("setting", SETTINGS)
def test_shared_attacks_get_zero_and_honest_programs_one(setting: str, tmp_path: Path) -> None:
    prefix, python = in_setting(setting, tmp_path)
    cases = shared_cases()
    report = graded(cases, tmp_path, "auto", prefix, python)
    assert wrong(cases, report) == []
    assert report["left"] == []
    assert report["tier"] == ("seccomp" if "without Landlock" in setting else report["tier"])
