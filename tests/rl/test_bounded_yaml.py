"""What a config file may be: text of bounded size, each key once, and paths that mean what a shell means."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipes.cli import main as cohort
from rl.config.diffusion import DiffusionConfig
from rl.config.read import load_config, read_config
from rl.report.report import build_report

ROOT = Path(__file__).parents[2]
BOMB = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))


def refusal(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_config(path)
    return " ".join(str(caught.value).split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "train: {steps: 3}\nmodel: {}\ntrain:\n  seed: 1\n",
            "'train' is given twice, in line 1 and in line 3",
        ),
        ("train:\n  steps: 3\n  seed: 1\n  steps: 4\n", "'steps' is given twice, in line 2 and in line 4"),
        ("train: {steps: 3, 'steps': 4}\n", "'steps' is given twice, in line 1 and in line 1"),
        (
            "rewards:\n  functions:\n  - name: math\n    name: gsm\n",
            "'name' is given twice, in line 3 and in",
        ),
    ],
)
def test_a_key_given_twice_is_refused_by_name_and_line(tmp_path, text, message):
    assert message in refusal(tmp_path / "c.yaml", text)


@pytest.mark.parametrize("tag", ["object/apply:os.getcwd []", "name:os.getcwd ''", "module:os ''"])
def test_no_tag_makes_an_object_of_python(tmp_path, tag):
    said = refusal(tmp_path / "c.yaml", f"run_dir: !!python/{tag}\n")
    assert (
        "is not valid YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/" in said
    )


def test_a_key_given_twice_in_an_override_is_refused():
    with pytest.raises(ValueError, match="'lr' is given twice"):
        load_config(None, ["optimizer={lr: 1e-5, eps: 1e-8, lr: 1e-6}"])


def test_a_merged_key_may_be_given_again_and_an_override_changes_one_alias_alone(tmp_path):
    """YAML's merge key says which of the two counts: the section's own."""
    path = tmp_path / "c.yaml"
    path.write_text(
        "data: &data {source: a.jsonl, size: 5}\n"
        "evaluation: {data: {<<: *data, size: 7}}\n"
        "sampling: &s {max_completion_length: 9}\n"
    )
    assert load_config(path).evaluation.data.size == 7
    path.write_text("data: &data {source: a.jsonl, size: 5}\nevaluation: {data: *data}\n")
    config = load_config(path, ["evaluation.data.size=7"])
    assert (config.data.size, config.evaluation.data.size) == (5, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "with its aliases (*name) written out it holds more than 100,000 values"),
        ("run_dir: &a [*a]\n", "the value holds itself"),
        ("[" * 200_000, "nested more than 50 levels deep"),
        ("".join(" " * i + "-\n" for i in range(400)), "line 51: sections and lists are nested"),
        ("a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 99)), "levels deep"),
        ("run_dir: x\n#" + "x" * (1 << 20), "is larger than 1,048,576 bytes"),
        ("run_dir: 2026-13-45\n", "is not valid YAML: month must be in 1..12"),
    ],
    ids=["alias bomb", "cycle", "flow", "block", "chain of aliases", "size", "date"],
)
def test_a_config_that_would_never_end_or_fill_the_memory_is_refused_at_once(tmp_path, text, message):
    began = time.thread_time()
    assert message in refusal(tmp_path / "c.yaml", text)
    assert time.thread_time() - began < 5


def test_a_config_that_is_no_text_is_named(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"run_dir: \xff\xfe\n")
    with pytest.raises(ValueError, match="it is not UTF-8 text"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("kind", "name"), [("fifo", "a pipe"), ("device", "a device"), ("folder", "a folder")]
)
def test_a_config_that_is_no_regular_file_is_refused_without_a_wait(tmp_path, kind, name):
    path = tmp_path / "c.yaml"
    if kind == "fifo":
        os.mkfifo(path)
    if kind == "folder":
        path.mkdir()
    given = Path("/dev/zero") if kind == "device" else path
    code = "import sys; from recipes.cli import main; sys.exit(main(['config', sys.argv[1]]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(given)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and f"cohort: {given} is {name}" in done.stderr


def test_a_run_folder_whose_config_is_a_bomb_still_has_a_report(tmp_path):
    (tmp_path / "config.yaml").write_text(BOMB)
    began = time.thread_time()
    assert build_report(tmp_path).is_file()
    assert time.thread_time() - began < 10


def test_a_tilde_is_the_home_folder_in_every_path_of_a_config(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(
        None,
        [
            "run_dir=~/runs/a",
            "model={name: ~/models/m, chat_template: ~/t.jinja}",
            "data.source=~/d.jsonl",
            "evaluation.data={source: ~/e.jsonl}",
        ],
    )
    assert config.run_dir == tmp_path / "runs/a"
    assert config.model.name == f"{tmp_path}/models/m"
    assert config.model.chat_template == f"{tmp_path}/t.jinja"
    assert config.data.source == f"{tmp_path}/d.jsonl"
    assert config.evaluation.data.source == f"{tmp_path}/e.jsonl"
    (tmp_path / "c.yaml").write_text("run_dir: ~/runs/b\ndata: {source: ~/d.jsonl}\n")
    config = read_config(DiffusionConfig, "~/c.yaml")
    assert (config.run_dir, config.data.source) == (tmp_path / "runs/b", f"{tmp_path}/d.jsonl")


def test_the_home_of_a_user_who_does_not_exist_is_named(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("run_dir: ~nobody-of-this-name/runs\n")
    assert cohort(["config", str(tmp_path / "c.yaml")]) == 1
    assert "run_dir='~nobody-of-this-name/runs': there is no home folder" in capsys.readouterr().err
