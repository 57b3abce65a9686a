"""`recipes.grpo.run` in a script, in `python -c`, on standard input and in a notebook."""

from __future__ import annotations

import json
import linecache
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes.grpo import run
from rewards.compose import RewardSpec
from rewards.functions import find_function, origin_of
from rewards.pool.pool import RewardPool
from rl.config import Config
from rl.store.rows import read_rows
from rl.types import Completion, Group, Prompt
from tests.invariants.toy_rewards import low_words

ROOT = Path(__file__).parents[2]
FUNCTION = """
import math

SCALE = {"by": 2.0}

def share(text):
    words = text if isinstance(text, str) else text[-1]["content"]
    return SCALE["by"] * math.fsum(map(words.count, ("w1", "w2", "w3", "w4", "w5")))

def low(completions, **columns):
    return [share(c) for c in completions]
"""
CALL = """
open("began.txt", "a").write("x")
from recipes.grpo import run
result = run(CONFIG, rewards={"low": low}, train={"steps": 1}, **{"checkpoint.every": 1})
open("done.txt", "a").write(str(result["steps"]))
"""


def program(config_file: Path) -> str:
    return FUNCTION + CALL.replace("CONFIG", repr(str(without_rewards(config_file))))


def without_rewards(config_file: Path) -> Path:
    tree = yaml.safe_load(config_file.read_text())
    del tree["rewards"]
    config_file.write_text(yaml.safe_dump(tree))
    return config_file


def execute(words: list[str], folder: Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """A Python program; `text` is piped to it."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    options: dict[str, Any] = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
    return subprocess.run([sys.executable, *words], input=text, timeout=200, **options)


def test_a_script_without_a_guard_trains_once_by_its_own_function(config_file, tmp_path):
    """Its grader imports the script again, up to the call of run, and without the trainer's libraries."""
    (tmp_path / "train.py").write_text(program(config_file) + "import sys; assert 'torch' in sys.modules\n")
    done = execute(["train.py"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "done.txt").read_text() == "1"
    assert (tmp_path / "began.txt").read_text() == "xx"  # the script, and its grader
    (row,) = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert row["reward/low/mean"] > 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert [spec["name"] for spec in config["rewards"]["functions"]] == ["low"]


def test_the_script_of_the_readme_trains(config_file, tmp_path):
    text = (ROOT / "README.md").read_text()
    (source,) = re.findall(r"```python\n(from recipes\.grpo import run.*?)```", text, re.DOTALL)
    assert without_rewards(config_file) == tmp_path / "config.yaml"
    assert len([line for line in source.splitlines() if line]) <= 10
    (tmp_path / "train.py").write_text(source.replace('"steps": 20', '"steps": 2'))
    done = execute(["train.py"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].endswith("/run/checkpoints/step-000002")


@pytest.mark.parametrize("how", ["-c", "stdin"])
def test_a_program_without_a_file_sends_the_source(config_file, tmp_path, how):
    (tmp_path / "text").write_text(program(config_file))
    run_it = f'{sys.executable} -c "$(cat text)"' if how == "-c" else f"{sys.executable} - < text"
    done = execute(["-c", f"import os; os.execvp('bash', ['bash', '-c', {run_it!r}])"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "done.txt").read_text() == "1" and (tmp_path / "began.txt").read_text() == "x"


def test_a_piped_program_is_told_to_put_its_function_into_a_file(config_file, tmp_path):
    done = execute([], tmp_path, program(config_file))
    assert done.returncode == 1 and "has no source that can be read: put the function" in done.stderr


@pytest.fixture
def notebook(monkeypatch):
    """A `__main__` whose cells have no file; returns how a cell is run."""
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)

    def cell(text: str) -> types.ModuleType:
        name = f"<cell {len(text)}>"
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        exec(compile(text, name, "exec"), vars(main))
        return main

    return cell


def test_a_function_of_a_notebook_is_sent_with_what_it_uses(notebook):
    notebook("import re\nfrom collections import Counter as C\nLIMIT = 3\nword = re.compile('w[0-9]+')\n")
    notebook("def count(text, most=LIMIT):\n    return min(C(word.findall(text))['w1'], most)\n")
    notebook("import torch\nmodel = torch.nn.Linear(1, 1)\n")
    cell = notebook(
        "def low(completions, model=None, **_) -> 'list[float]':\n"
        "    return [float(count(c)) for c in completions]\n"
    )
    origin = origin_of("low", cell.low)
    assert "torch" not in origin["text"] and "file" not in origin
    assert grade({"low": origin}, ["w1 w1", "w1 " * 9, "w2"]) == [2.0, 3.0, 0.0]


def grade(origins, texts):
    pool = RewardPool([RewardSpec(name, origin=origin) for name, origin in origins.items()])
    try:
        completions = [Completion([1], [], [True], "stop", [], text=text) for text in texts]
        (scored,) = pool.score([Group(Prompt("p", "", (1,)), completions)])
    finally:
        pool.close()
    assert pool.faults.num_faulty == 0, str(pool.faults)
    return [reward.score for reward in scored.rewards]


def test_two_functions_of_a_notebook_do_not_meet(notebook):
    cell = notebook("K = 1\ndef a(completions, **_):\n    return [float(K)] * len(completions)\n")
    first = origin_of("a", cell.a)
    second = origin_of(
        "b", notebook("K = 5\ndef a(completions, **_):\n    return [K] * len(completions)\n").a
    )
    assert grade({"a": first, "b": second}, ["x"]) == [6.0]


def test_what_a_grader_cannot_get_is_refused_by_name(notebook):
    cell = notebook(
        "import threading\nlock = threading.Lock()\n"
        "def make(k):\n    def scaled(completions, **_):\n        return [k]\n    return scaled\n"
        "def locked(completions, **_):\n    with lock:\n        return [1.0]\n"
        "class Own:\n    def __call__(self, completions, **_):\n        return [1.0]\n"
    )
    for fn, words in (
        (cell.make(2), "reward 'mine' is a closure over k"),
        (lambda completions: [1.0], "reward 'mine' is a lambda"),
        (cell.Own(), r"reward 'mine' is a configured object \(Own\)"),
        (cell.Own().__call__, "reward 'mine' is a configured object"),
        (cell.locked, "reward 'mine' needs lock, of type lock, and that cannot be sent"),
    ):
        with pytest.raises(ValueError, match=words):
            origin_of("mine", fn)


def test_a_function_behind_the_guard_of_its_script_is_named(tmp_path):
    (tmp_path / "s.py").write_text("if __name__ == '__main__':\n    def low(completions, **_): ...\n")
    origin = {"function": "low", "source": "", "file": str(tmp_path / "s.py"), "package": "", "argv": []}
    code = f"from rewards.functions import find_function; find_function('low', {origin!r})"
    done = execute(["-c", code], tmp_path)
    assert "s.py has no 'low' once it is imported; define it at the top level" in done.stderr
    (tmp_path / "s.py").write_text("import sys; sys.exit(3)")
    done = execute(["-c", code], tmp_path)
    assert "importing" in done.stderr and "SystemExit: 3; put the statements" in done.stderr


def test_a_function_of_a_module_is_imported():
    origin = origin_of("low", low_words)
    assert origin["module"] == "tests.invariants.toy_rewards" and find_function("low", origin) is low_words


def test_a_dict_a_path_and_a_config_run_alike_and_go_on(config_file):
    tree, own = yaml.safe_load(config_file.read_text()), {"low": low_words}
    tree["rewards"] = {"functions": [{"name": "toy_rewards:even_words", "weight": 0.5}, {"name": "low"}]}
    before = json.dumps(tree)
    results = []
    for name, config in (("dict", tree), ("config", None), ("path", config_file)):
        folder = config_file.parent / name
        if name == "path":
            config_file.write_text(before)
        if name == "config":
            config = Config.model_validate(tree)
        result = run(config, rewards=own, run_dir=str(folder), train={"steps": 1})
        assert result["steps"] == 1
        results.append(read_rows(folder / "metrics.jsonl")[0]["reward/mean"])
    assert results[0] == results[1] == results[2]
    assert json.dumps(tree) == before
    assert run(tree, rewards=own, run_dir=str(folder), train={"steps": 2})["steps"] == 2


@pytest.mark.parametrize(
    ("overrides", "rewards", "message"),
    [
        ({"train": {"stepz": 2}}, {}, "did you mean steps?"),
        ({"trian": {"steps": 2}}, {}, "did you mean train?"),
        ({}, {"math": low_words}, "'math': ...} is the name of a built-in reward"),
        ({}, {"low": low_words}, "is not among rewards.functions of the config"),
        ({"data.source": "nowhere.jsonl"}, {}, "nowhere.jsonl"),
    ],
)
def test_faults_are_raised(config_file, overrides, rewards, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        run(config_file, rewards=rewards, **overrides)


def test_ctrl_c_raises_once_the_step_is_saved_and_the_same_call_goes_on(config_file):
    folder = config_file.parent / "run"
    slow = {"train": {"steps": 50}, "rewards.functions": [{"name": "toy_rewards:slow"}]}

    def interrupt() -> None:
        while not (folder / "metrics.jsonl").is_file():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run(config_file, **slow)
    done = len(read_rows(folder / "metrics.jsonl"))
    assert 0 < done < 50 and (folder / "checkpoints" / f"step-{done:06d}").is_dir()
    assert run(config_file, **slow | {"train": {"steps": done + 1}})["steps"] == done + 1


def test_an_edited_function_of_a_program_is_said(config_file, notebook, capsys):
    path = without_rewards(config_file)
    for score in ("0.5", "0.25"):
        cell = notebook(f"def own(completions, **_):\n    return [{score}] * len(completions)\n")
        steps = {"0.5": 1, "0.25": 2}[score]
        run(path, {"own": cell.own}, train={"steps": steps})
    assert "warning: rewards: own (" in capsys.readouterr().out


def test_a_child_that_imports_the_script_again_is_refused(config_file, tmp_path):
    """Without this a script that starts processes itself would train in each of them."""
    text = program(config_file).replace(
        "from recipes.grpo import run",
        "import multiprocessing\nfrom recipes.grpo import run\n"
        "if __name__ == '__main__':\n"
        "    p = multiprocessing.get_context('spawn').Process(target=print)\n    p.start()\n    p.join()\n",
    )
    (tmp_path / "train.py").write_text(text)
    done = execute(["train.py"], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "a child process imports this script again" in done.stderr
    assert (tmp_path / "done.txt").read_text() == "1"
