"""A user's files that are named like packages of ours are found, and do not hide ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipes import ROOT, put_ours_first
from recipes.cli import main as cohort
from rewards.plugins import find, import_module
from rl.store.inputs import fingerprints
from rl.store.ledger import Ledger

REWARDS = """
from rewards.completion import last_message_text  # ours

def short(completions, **columns):
    return [7.0 + len(last_message_text(c)) % 2 for c in completions]
"""
ROWS = """
def rows():
    return [{"prompt": f"What is w{i} ?", "answer": f"w{i}"} for i in range(8)]
"""
COHORT = "import sys\nfrom recipes.cli import main\nsys.exit(main())\n"
# How pip finds an editable package: after all of sys.path.
EDITABLE = f"""
import importlib.machinery, sys

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in ("rl", "rollout", "rewards", "recipes"):
            return importlib.machinery.PathFinder.find_spec(name, [{ROOT!r}])

sys.meta_path.insert(sys.meta_path.index(importlib.machinery.PathFinder) + 1, Finder)
"""


@pytest.fixture
def folder(config_file, tmp_path, monkeypatch):
    """A working directory with modules of four unlucky names, and a config that uses two of them."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "rewards.py").write_text(REWARDS)
    (here / "rl.py").write_text(ROWS)
    (here / "rollout.py").write_text("raise RuntimeError('taken for ours')")
    (tmp_path / "cohort.py").write_text(COHORT)
    (tmp_path / "sitecustomize.py").write_text(EDITABLE)
    monkeypatch.chdir(here)
    return here


def arguments(config_file: Path, rows: str) -> list[str]:
    source = [f"data.source={rows}:rows", "rewards.functions=[{name: 'rewards:short'}, {name: boxed_format}]"]
    return [str(config_file), *source, "train.steps=1"]


def run(command: list[str], found_by: Path | str) -> None:
    env = {**os.environ, "PYTHONPATH": str(found_by), "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def scores_of(run_dir: Path) -> set[float]:
    (record,) = Ledger(run_dir).read_all(0) or []
    return {r.parts["rewards:short"] for group in record.groups for r in group.rewards}


@pytest.mark.parametrize("is_editable", [True, False])
@pytest.mark.parametrize("launcher", [[], ["-m", "accelerate.commands.launch"]], ids=["python", "accelerate"])
def test_a_run_by_module_finds_our_packages_and_the_users_files(folder, config_file, launcher, is_editable):
    if launcher and is_editable:
        pytest.skip("the launcher changes nothing in how packages are found")
    command = [*launcher, "-m", "recipes.grpo", *arguments(config_file, "rl")]
    run(command, config_file.parent if is_editable else ROOT)
    assert scores_of(config_file.parent / "run") <= {7.0, 8.0}


@pytest.mark.parametrize("processes", ["1", "2"])
def test_the_command_takes_rows_from_a_file_called_recipes(folder, config_file, processes):
    (folder / "recipes.py").write_text(ROWS)
    words = ["train", *arguments(config_file, "recipes"), "--processes", processes]
    run([str(config_file.parent / "cohort.py"), *words], config_file.parent)
    assert len(Ledger(config_file.parent / "run").read_all(0) or []) == int(processes)


def test_a_file_is_scored_and_a_dataset_examined_with_it(folder, config_file, capsys):
    (folder / "rows.jsonl").write_text(json.dumps({"completion": "abc"}))
    assert cohort(["score", "rewards:short", "rows.jsonl"]) == 0
    assert json.loads(capsys.readouterr().out)["score"] == 8.0
    assert cohort(["score", "boxed_format", "rows.jsonl"]) == 0
    assert cohort(["doctor", "rewards", *arguments(config_file, "rl")]) == 0
    assert "rewards:short: ok" in capsys.readouterr().out


def test_a_file_of_the_working_directory_wins_under_a_private_name(folder, monkeypatch):
    (folder / "math.py").write_text("def half(completions): return [0.5] * len(completions)")
    assert find("math:half")([""]) == [0.5]
    assert find("math").__module__.startswith("rewards.math")
    assert "pow" in dir(sys.modules["math"]) and "rewards.completion" in sys.modules
    assert find("rewards:short") is find("rewards:short")
    with pytest.raises(ValueError, match=r"rollout failed: .*rollout\.py, line \d+: RuntimeError: taken"):
        find("rollout:rows")
    (folder / "plain_rows.py").write_text(ROWS)
    monkeypatch.syspath_prepend(folder)
    assert import_module("plain_rows") is sys.modules["plain_rows"]


def test_a_file_beside_the_config_that_ours_would_hide_is_found(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    assert find("rewards:short")([""]) == [7.0]


def test_a_folder_that_ours_hides_is_named(folder):
    (folder / "rewards").mkdir()
    (folder / "rewards" / "mine.py").write_text(ROWS)
    with pytest.raises(ValueError, match=r"hides \./rewards/mine\.py; rename its folder"):
        find("rewards.mine:rows")


def test_a_module_that_was_imported_as_ours_is_named(folder):
    code = "import rl, recipes"
    env = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert (
        last
        == f"ImportError: {folder / 'rl.py'} is imported as 'rl', the name of a package of Cohort: rename it"
    )


def test_our_folder_comes_before_the_working_directory_and_what_hides_ours(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    assert put_ours_first(["", str(other), "/lib"]) == [str(other), "/lib", ROOT, ""]
    (other / "rollout.py").touch()
    assert put_ours_first([str(other), ROOT, "/lib"]) == ["/lib", ROOT, str(other)]


def test_the_fingerprint_is_of_the_file_that_is_used(folder, tmp_path):
    found = fingerprints(str(tmp_path), None, {}, rewards=["rewards:short"])["rewards"]
    (folder / "rewards.py").write_text(REWARDS + "\n")
    assert found != fingerprints(str(tmp_path), None, {}, rewards=["rewards:short"])["rewards"]
