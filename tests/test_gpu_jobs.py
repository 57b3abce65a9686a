"""The benchmarks' own rules: jobs can be read and started, what failed is said, and which steps count."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import threading

import pytest
import yaml

from rl.config.read import load_config
from tests.bench import grpo_vs_trl, launch, learning_curves, on_gpu
from tests.bench.on_gpu import JOBS, Job, Jobs

BENCHES, HOUSE = JOBS.parent, ("rl", "rollout", "rewards", "recipes", "tests")
PASSES, FAILS = "platform", "no_such_module"


def test_every_job_can_be_started(tmp_path):
    names: set[str] = set()
    data = tmp_path / "a folder"
    for row in yaml.safe_load(JOBS.read_text()):
        job = Job(**row)
        assert job.name not in names and names.issuperset(job.needs)
        names.add(job.name)
        module, *arguments = job.words(data, tmp_path / "out")
        assert importlib.util.find_spec(module) is not None, job.name
        assert all(str(data) in word for word in arguments if "a folder" in word), job.name
        if module == "recipes.grpo":
            load_config(arguments[0], arguments[1:])


@pytest.mark.parametrize("file", sorted(BENCHES.glob("*.py")), ids=lambda file: file.stem)
def test_a_benchmark_imports_only_what_there_is(file):
    """Most of them need a GPU, so that nothing else would notice a name that has moved."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in HOUSE:
            module = importlib.import_module(node.module)
            missing = [a.name for a in node.names if not hasattr(module, a.name)]
            assert all(importlib.util.find_spec(f"{node.module}.{name}") for name in missing), missing


def test_what_failed_and_what_needed_it_is_named(tmp_path, capsys):
    jobs = [Job("a", 60, FAILS), Job("b", 60, PASSES, ("a", "c")), Job("c", 60, PASSES)]
    assert Jobs(jobs, tmp_path, tmp_path).work(["0"]) == ["a", "b"]
    assert "b was not run: it needs a\n" in capsys.readouterr().out
    assert (tmp_path / "c.done").exists() and not (tmp_path / "a.done").exists()


def test_a_job_that_cannot_be_started_holds_no_other_thread(tmp_path, capsys):
    jobs = [Job("a", 60, "platform {nowhere}"), Job("b", 60, PASSES, ("a",)), Job("c", 60, PASSES)]
    failed: list[str] = []
    worker = threading.Thread(target=lambda: failed.extend(Jobs(jobs, tmp_path, tmp_path).work(["0", "1"])))
    worker.daemon = True
    worker.start()
    worker.join(timeout=60)
    assert not worker.is_alive() and failed == ["a", "b"]
    assert "a ended with KeyError ('nowhere')" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--at-once", "0"], "--at-once 0 runs nothing; use 1 or more"),
        (["--only", "w-3b,w-4b"], "no job is named 'w-4b'; there are tests, "),
    ],
)
def test_options_that_name_nothing_to_run_are_refused(tmp_path, monkeypatch, capsys, words, sentence):
    argv = ["on_gpu", "--data", str(tmp_path), "--out", str(tmp_path / "out"), *words]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match="2"):
        on_gpu.main()
    assert sentence in capsys.readouterr().err


def test_the_exit_status_says_that_a_job_failed(tmp_path, monkeypatch):
    jobs = tmp_path / "jobs.yaml"
    jobs.write_text(f"- {{name: a, limit_s: 60, run: {PASSES}}}\n- {{name: b, limit_s: 60, run: {FAILS}}}\n")
    monkeypatch.setattr(on_gpu, "JOBS", jobs)
    argv = ["on_gpu", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    for only, status in ((["--only", "a"], 0), ([], 1)):
        monkeypatch.setattr(sys, "argv", [*argv, *only])
        assert on_gpu.main() == status


def test_a_run_that_takes_too_long_ends_with_a_sentence(tmp_path):
    (tmp_path / "run.log").write_text("step 7\n")
    with pytest.raises(SystemExit, match=r"ended after 0\.01 s; the last lines of .*run\.log:\nstep 7"):
        launch.launch_or_exit(tmp_path / "run.log", "platform", [], 0.01)


def test_an_unfinished_run_goes_on_with_the_same_settings_alone(tmp_path):
    folder = tmp_path / "new" / "run"
    found: list[bool] = []

    def work() -> None:
        found.append((folder / "half").exists())
        folder.mkdir(exist_ok=True)
        (folder / "half").touch()
        if len(found) < 3:
            raise KeyboardInterrupt

    for settings, goes_on in ((["a"], True), (["b"], True), (["b"], True), (["b"], True)):
        try:
            launch.once(folder, settings, work, goes_on=goes_on)
        except KeyboardInterrupt:
            continue
    # Begun anew; anew, as the settings are others; gone on from; and done.
    assert found == [False, False, True]
    folder.with_suffix(".done").unlink()
    launch.once(folder, ["b"], work)
    assert found == [False, False, True, False]


@pytest.mark.parametrize("seeds", [",", "0,,1", "", "0,x", "1,1"])
def test_seeds_are_whole_numbers(tmp_path, monkeypatch, capsys, seeds):
    monkeypatch.setattr(sys, "argv", ["curves", "CONFIG", "--out", str(tmp_path), "--seeds", seeds])
    with pytest.raises(SystemExit, match="2"):
        learning_curves.main()
    assert "must be whole numbers, each once, such as 0,1,2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("num_steps", "stale", "first", "end"),
    [
        (5, 0, 2, 5),
        (16, 1, 3, 13),
        (15, 1, 3, 13),
        (16, 0, 2, 16),
        (7, 1, 3, 5),
        (6, 1, 2, 6),
        (2, 0, 1, 2),
        (1, 1, 0, 1),
    ],
)
def test_warm_up_and_the_end_of_a_stale_run_do_not_count(num_steps, stale, first, end):
    found = grpo_vs_trl.counted(num_steps, stale)
    assert found[:2] == (first, end)
    assert ("too few steps" in found[2]) == ((num_steps, stale) in {(6, 1), (2, 0), (1, 1)})


def test_steps_in_turn_long_and_short_are_judged_by_their_sums(capsys):
    steps = [
        {"step": 6.0, "sample": 4.0, "train": 2.0, "tokens": 900.0, "peak": 3.0},
        {"step": 2.0, "train": 2.0, "tokens": 700.0, "peak": 5.0},
        {"step": 6.0, "sample": 5.0, "train": 1.0, "tokens": 800.0, "peak": 4.0},
    ]
    result = grpo_vs_trl.summary(steps)
    assert result["per_second"] == pytest.approx(2400 / 14)  # a median of each column would say 800 / 6
    assert result["sample"] + result["train"] == pytest.approx(result["step"])
    assert result["peak"] == 5.0
    grpo_vs_trl.show({"trl-best": result})
    row = capsys.readouterr().out.splitlines()[-1].split()
    # step, sample, score, pack, train, sync, rest, tokens per second, MFU, GiB
    assert row == ["trl-best", "4.67", "3.00", "-", "-", "1.67", "-", "-", "171", "-", "5.0"]
