"""The command `cohort`: what is imported for it, and what it says without a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from recipes.cli import COMMANDS
from recipes.cli import main as cohort

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "recipes" / "configs" / "quickstart.yaml")


def modules_after(*words: str) -> set[str]:
    """Top-level modules that a fresh process holds after `cohort WORDS`, or after the import alone."""
    code = (
        "import sys; from recipes.cli import main\n"
        "try: sys.argv[1:] and main()\n"
        "except SystemExit: pass\n"
        "print('\\n' + ' '.join({name.partition('.')[0] for name in sys.modules}))"
    )
    command = [sys.executable, "-c", code, *words]
    said = subprocess.check_output(command, text=True, cwd=ROOT, stderr=subprocess.STDOUT)
    return set(said.splitlines()[-1].split())


def test_importing_the_command_costs_no_torch_and_no_config():
    assert modules_after() & {"torch", "transformers", "datasets", "pydantic", "yaml", "rich"} == set()


@pytest.mark.parametrize(
    "words",
    [
        ["config", CONFIG],
        ["config", CONFIG, "train.steps=0"],
        ["train", CONFIG, "train.stepz=3"],
        ["plan", CONFIG, "train.stepz=3"],
        *([command, "--help"] for command in COMMANDS),
    ],
    ids=" ".join,
)
def test_a_config_is_checked_and_help_is_given_without_torch(words):
    assert modules_after(*words) & {"torch", "transformers", "datasets"} == set()


def test_a_report_is_made_without_torch(tmp_path):
    assert modules_after("report", str(tmp_path)) & {"torch", "transformers"} == set()
    assert (tmp_path / "report.html").is_file()


def test_every_command_is_in_the_help(capsys):
    with pytest.raises(SystemExit) as ended:
        cohort(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    listed = {words[0] for line in said.splitlines() if (words := line.split())}
    assert listed >= {"train", "report", "denoising", "config", "plan", "score", "doctor"} == set(COMMANDS)


def test_the_home_of_a_user_who_does_not_exist_is_one_sentence(capsys):
    assert cohort(["report", "~nobody-of-this-name/run"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("cohort: ") and "Traceback" not in error and error.count("\n") == 1


def test_a_tilde_is_the_home_folder_in_the_paths_of_a_report(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    assert cohort(["report", "~/run", "--out", "~/page.html"]) == 0
    assert (tmp_path / "page.html").is_file()
