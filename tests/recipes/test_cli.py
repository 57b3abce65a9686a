"""The command `cohort`: what is imported for it, and what it says without a run."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from recipes.cli import COMMANDS
from recipes.cli import main as cohort

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "recipes" / "configs" / "quickstart.yaml")


def after(*words: str) -> tuple[str, set[str]]:
    """What a fresh process says, and its top-level modules, after `cohort WORDS` or the import alone."""
    code = (
        "import sys; from recipes.cli import main\n"
        "try: sys.argv[1:] and main()\n"
        "except SystemExit: pass\n"
        "print('\\n' + ' '.join({name.partition('.')[0] for name in sys.modules}))"
    )
    command = [sys.executable, "-c", code, *words]
    said = subprocess.check_output(command, text=True, cwd=ROOT, stderr=subprocess.STDOUT)
    return said, set(said.splitlines()[-1].split())


def modules_after(*words: str) -> set[str]:
    return after(*words)[1]


def test_importing_the_command_costs_no_torch_and_no_config():
    assert modules_after() & {"torch", "transformers", "datasets", "pydantic", "yaml", "rich"} == set()


@pytest.mark.parametrize(
    "words",
    [
        ["config", CONFIG],
        ["config", CONFIG, "train.steps=0"],
        ["config", "--schema"],
        ["config", "--explain", "loss.name"],
        ["init", "DATA", "--out", "OUT"],
        ["--version"],
        ["train", CONFIG, "train.stepz=3"],
        ["plan", CONFIG, "train.stepz=3"],
        *([command, "--help"] for command in COMMANDS),
    ],
    ids=" ".join,
)
def test_a_config_is_checked_and_help_is_given_without_torch(words, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1", "answer": "2"}')
    places = {"DATA": str(tmp_path / "rows.jsonl"), "OUT": str(tmp_path / "made.yaml")}
    words = [places.get(word, word) for word in words]
    assert modules_after(*words) & {"torch", "transformers", "datasets"} == set()


def test_a_report_is_made_without_torch(tmp_path):
    assert modules_after("report", str(tmp_path)) & {"torch", "transformers"} == set()
    assert (tmp_path / "report.html").is_file()


def test_rewards_are_examined_without_torch(tmp_path):
    rows = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(1, 5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = tmp_path / "config.yaml"
    config.write_text(f"run_dir: {tmp_path}/run\ndata: {{source: {tmp_path}/rows.jsonl}}")
    assert (
        modules_after("doctor", "rewards", str(config), "--workers", "1") & {"torch", "transformers"} == set()
    )


def test_every_command_is_in_the_help(capsys):
    with pytest.raises(SystemExit) as ended:
        cohort(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    listed = {words[0] for line in said.splitlines() if (words := line.split())}
    assert (
        listed
        >= set(COMMANDS)
        == {
            *[
                "train",
                "report",
                "denoising",
                "init",
                "config",
                "plan",
                "export",
                "score",
                "doctor",
                "eval",
                "sample",
                "serve",
            ]
        }
    )


def test_the_version_is_that_of_the_package(capsys):
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert cohort(["--version"]) == 0
    assert capsys.readouterr().out == f"cohort {pyproject['project']['version']}\n"


@pytest.mark.parametrize(
    ("word", "hint"),
    [("trian", "did you mean train?"), ("zzz", "there are: train, report, denoising,")],
)
def test_an_unknown_command_gets_near_ones_or_all(word, hint, capsys):
    assert cohort([word, "config.yaml"]) == 2
    assert f"cohort: no command '{word}'; {hint}" in capsys.readouterr().err


def test_the_home_of_a_user_who_does_not_exist_is_one_sentence(capsys):
    assert cohort(["report", "~nobody-of-this-name/run"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("cohort: ") and "Traceback" not in error and error.count("\n") == 1


def test_a_report_on_two_runs_goes_to_the_file_that_is_named(tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert cohort(["report", "a", "b", "--out", "both.html"]) == cohort(["report", "a", "b"]) == 0
    assert capsys.readouterr().out.split() == ["both.html", "compare.html"]
    assert "2 runs side by side" in (tmp_path / "both.html").read_text()
    assert cohort(["report", *["a"] * 9]) == 1 and "at most 8" in capsys.readouterr().err
    assert not (tmp_path / "a" / "report.html").exists()


def test_a_tilde_is_the_home_folder_in_the_paths_of_a_report(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    assert cohort(["report", "~/run", "--out", "~/page.html"]) == 0
    assert (tmp_path / "page.html").is_file()
