"""The settings in which untrusted programs are run by tests: users, and filters as containers have them."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "cases"
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "PATH": "/usr/bin:/bin",
    "PYTHONDONTWRITEBYTECODE": "1",
    "SECRET_TOKEN": "x",
}
SETTINGS = {
    "root": ("plain", 0),
    "uid 1000": ("plain", 1000),
    "uid 1000 in a container": ("docker", 1000),
    "uid 1000 in a container without Landlock": ("docker,nolandlock", 1000),
}


def in_setting(setting: str, folder: Path) -> tuple[list[str], str]:
    """The command that puts a program into the setting, and the interpreter for it; skips where neither is
    possible. `folder` and what it lies in become readable to all.
    """
    mode, uid = SETTINGS[setting]
    if os.getuid() != 0 and (uid or mode != "plain"):
        pytest.skip("only root can change to another user")
    python = python_for(uid)
    if python is None:
        pytest.skip(f"no Python >= 3.11 that user {uid} may start")
    # pytest's folder is its owner's alone.
    for parent in (folder, *folder.parents[:3]):
        parent.chmod(parent.stat().st_mode | 0o055)
    return [sys.executable, str(SHARED / "container_like.py"), mode, str(uid)], python


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
