"""How commands end: their exit code, and what their last words may hold."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from recipes.cli import main as cohort
from recipes.grpo import main
from rl.config.read import load_config
from rl.store.folder import check_whole, write_config
from rl.store.redact import redact

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("taken", ["", "ledger", "metrics.jsonl"])
def test_a_run_whose_files_are_taken_away_is_an_error_that_names_them(
    config_file, monkeypatch, capsys, taken
):
    """In the third of four steps, by a grader."""
    monkeypatch.setenv("TOY_TAKE", str(config_file.parent / "run" / taken))
    away = "rewards.functions=[{name: 'toy_rewards:takes_away'}]"
    assert main([str(config_file), away, "train.steps=4"]) == 1
    captured = capsys.readouterr()
    assert "is gone: it, or its folder, was removed, renamed or replaced during the run" in captured.err
    assert (taken or "run/") in captured.err and "report:" not in captured.out


def test_what_is_missing_when_all_steps_are_done_is_listed(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 4}\n')
    with pytest.raises(RuntimeError, match=r"config.yaml, metrics.jsonl \(rows of 2 steps"):
        check_whole(tmp_path, first=0, last=4)
    (tmp_path / "config.yaml").touch()
    check_whole(tmp_path, first=3, last=4)
    check_whole(tmp_path / "none", first=9, last=9)  # stopped before its first step


@pytest.mark.parametrize(
    "sink",
    ["full", pytest.param("head", marks=pytest.mark.slow), pytest.param("closed", marks=pytest.mark.slow)],
)
def test_output_that_nobody_takes_changes_no_exit_code(config_file, sink):
    redirect = {"head": "| head -n 1; exit ${PIPESTATUS[0]}", "full": "> /dev/full", "closed": ">&-"}[sink]
    command = f"{sys.executable} -m recipes.cli train {config_file} train.steps=1 {redirect}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (config_file.parent / "run" / "report.html").is_file() and "rror" not in done.stderr
    assert json.loads((config_file.parent / "run" / "result.json").read_text())["steps"] == 1


@pytest.mark.parametrize(
    ("soft", "hard", "code"), [(64, 64, 1), pytest.param(64, 4096, 0, marks=pytest.mark.slow)]
)
def test_few_open_files_are_raised_where_they_may_be_and_else_named(config_file, soft, hard, code):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    done = subprocess.run(
        [sys.executable, "-m", "recipes.cli", "train", str(config_file), "train.steps=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        preexec_fn=limit,
    )
    assert done.returncode == code, done.stderr[-2000:]
    if code:
        assert "cohort: this process may open only 64 files (ulimit -n)" in done.stderr
        assert "ulimit -n 4096" in done.stderr and "Traceback" not in done.stderr


HOSTILE = "\x1b]0;title\x07\x1b[2J\u202e hf_abcdefghijklmnopqrstuvwx https://me:hunter2secret@host/x"


@pytest.mark.parametrize("command", ["train", "config", "plan", "report", "denoising", "score"])
def test_final_errors_hold_no_escapes_and_no_secrets(command, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    bad = f"{HOSTILE} 0123456789abcdef"
    given = {"train": ["nowhere.yaml"], "score": ["math", bad]}.get(command, [bad])
    if command in ("train", "config", "plan"):
        (tmp_path / "c.yaml").write_text("")
        given = [str(tmp_path / "c.yaml"), f"optimizer.lr={json.dumps(bad)}"]
    assert cohort([command, *given]) == 1
    error = capsys.readouterr().err
    assert error.startswith("cohort: ") and "host" in error
    for hidden in ("\x1b", "\u202e", "\x07", "hf_abc", "hunter2", "0123456789abcdef"):
        assert hidden not in error


def test_an_unexpected_fault_has_its_traceback_without_secrets_either(config_file, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "verysecretvalue")
    (config_file.parent / "my_rows.py").write_text("class rows:\n    def __init__(self): pass\n")
    monkeypatch.syspath_prepend(str(config_file.parent))
    import recipes.grpo

    def broken(*_):
        raise KeyError("\x1b[31mverysecretvalue")

    monkeypatch.setattr(recipes.grpo, "kind_of", broken)
    assert main([str(config_file)]) == 1
    error = capsys.readouterr().err
    assert "KeyError" in error and "Traceback" in error
    assert "\x1b" not in error and "verysecretvalue" not in error


SECRETS = {"api_key": "abc", "db_password": "x", "url": "postgres://u:pass@h/d", "access_token": "t"}


def test_a_config_with_secrets_is_for_its_owner_alone_and_is_shown_without_them(tmp_path, capsys):
    reward = "rewards.functions=[{name: math, options: " + json.dumps(SECRETS) + "}]"
    for name, overrides, mode in (("open", [], 0o644), ("secret", [reward], 0o600)):
        run = tmp_path / name
        run.mkdir()
        old = os.umask(0o022)
        try:
            write_config(load_config(None, [f"run_dir={run}", *overrides]))
        finally:
            os.umask(old)
        assert (run / "config.yaml").stat().st_mode & 0o777 == mode
    options = yaml.safe_load((tmp_path / "secret" / "config.yaml").read_text())["rewards"]["functions"][0]
    assert options["options"] == SECRETS  # the run can be repeated from it
    assert cohort(["config", str(tmp_path / "secret" / "config.yaml")]) == 0
    shown = capsys.readouterr()
    assert "api_key: '***'" in shown.out and "pass@" not in shown.out and "secrets are shown" in shown.err
    assert cohort(["report", str(tmp_path / "secret")]) == 0
    assert "pass@h" not in (tmp_path / "secret" / "report.html").read_text()


def test_numbers_and_tokens_of_a_vocabulary_are_no_secrets():
    plain = {
        "mask_token": "<mask>",
        "token_budget": 5,
        "stop_token_ids": [1],
        "max_tokens": 3,
        "eos_token": "x",
    }
    assert redact(plain) == plain
    assert set(redact({"hf_token": "a", "openai_key": "b", "secret": "c", "API-KEY": "d"}).values()) == {
        "***"
    }
