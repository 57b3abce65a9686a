"""Hostile programs get 0, honest ones 1, and nothing is left behind: here, and in the settings that
machines have.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import code_attacks
import code_lies
import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "cases"
GRADE = Path(__file__).with_name("grade_cases.py")
HOSTILE_S, HONEST_S = (
    0.7,
    30.0,
)  # an attack that hangs costs its whole time; honest programs must survive a busy machine
SETTINGS = {
    "root": ("plain", 0),
    "uid 1000": ("plain", 1000),
    "uid 1000 in a container": ("docker", 1000),
    "uid 1000 in a container without Landlock": ("docker,nolandlock", 1000),
}


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
    environment = {
        "PYTHONPATH": str(ROOT),
        "PATH": "/usr/bin:/bin",
        "PYTHONDONTWRITEBYTECODE": "1",
        "SECRET_TOKEN": "x",
    }
    done = subprocess.run(
        [*prefix, python, str(GRADE), str(file), tier],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def wrong(cases: list[dict[str, Any]], report: dict[str, Any]) -> list[tuple[str, float | None]]:
    pairs = zip(cases, report["scores"], strict=True)
    return [(case["id"], score) for case, score in pairs if score != case["expected"]]


@functools.cache
def python_for(uid: int) -> str | None:
    """An interpreter that this user may start and that can import the project."""
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        change = {"user": uid, "group": uid, "extra_groups": []} if uid else {}
        try:
            done = subprocess.run(
                [python, "-c", "import rewards.code, sys; sys.exit(sys.version_info < (3, 11))"],
                cwd="/",
                env={"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
                capture_output=True,
                timeout=60,
                **change,
            )
        except OSError:
            continue
        if done.returncode == 0:
            return python
    return None


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
    mode, uid = SETTINGS[setting]
    if os.getuid() != 0 and (uid or mode != "plain"):
        pytest.skip("only root can change to another user")
    python = python_for(uid)
    if python is None:
        pytest.skip(f"no Python >= 3.11 that user {uid} may start")
    # pytest's folder is its owner's alone.
    for parent in (tmp_path, *tmp_path.parents[:3]):
        parent.chmod(parent.stat().st_mode | 0o055)
    prefix = [sys.executable, str(SHARED / "container_like.py"), mode, str(uid)]
    cases = shared_cases()
    report = graded(cases, tmp_path, "auto", prefix, python)
    assert wrong(cases, report) == []
    assert report["left"] == []
    assert report["tier"] == ("seccomp" if "nolandlock" in mode else report["tier"])
