"""Runs that are stopped, killed or out of disk: what they leave, what they say, and how they end."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

import recipes.cli.launch
from recipes.cli import main as cohort
from recipes.cli.launch import _end, _wait
from recipes.grpo import main
from rl.store.ledger import Ledger
from rl.store.rows import read_rows

ROOT = Path(__file__).parents[2]


def checkpoints(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").glob("step-*"))


def test_a_run_that_ended_before_its_last_evaluation_makes_it_when_started_again(config_file, heldout):
    """What a kill during the last evaluation leaves: the checkpoint, the first evaluation and no result."""
    run = config_file.parent / "run"
    assert main([str(config_file), *heldout]) == 0
    whole = json.loads((run / "result.json").read_text())
    assert whole["heldout_before"] != whole["heldout_after"]
    first, _last = (run / "evaluation.jsonl").read_text().splitlines()
    (run / "evaluation.jsonl").write_text(first + "\n")
    (run / "result.json").unlink()
    assert main([str(config_file), *heldout]) == 0
    again = json.loads((run / "result.json").read_text())
    assert {k: v for k, v in again.items() if k != "seconds"} == {
        k: v for k, v in whole.items() if k != "seconds"
    }


def test_seconds_count_the_whole_run_and_a_second_start_does_not_change_the_result(config_file):
    run = config_file.parent / "run"
    assert main([str(config_file)]) == 0
    state = run / "checkpoints" / "step-000002" / "trainer" / "state.json"
    assert 0 < json.loads(state.read_text())["counters"]["seconds"] < 60
    result = (run / "result.json").read_text()
    assert main([str(config_file)]) == 0
    assert (run / "result.json").read_text() == result
    before = json.loads(result)["seconds"]
    assert main([str(config_file), "train.steps=3"]) == 0
    extended = json.loads((run / "result.json").read_text())
    assert extended["steps"] == 3 and extended["seconds"] > before


def test_a_signal_during_an_evaluation_still_saves_the_step(config_file, heldout, capsys):
    """The grader sends SIGTERM at the second evaluation, after the step's own look at signals."""
    run = config_file.parent / "run"
    rewards = "rewards.functions=[{name: 'toy_rewards:stops_the_trainer'}]"
    overrides = [rewards, "evaluation.metric=toy_rewards:stops_the_trainer", "evaluation.every=1"]
    assert main([str(config_file), *heldout, *overrides, "train.steps=5"]) == 128 + signal.SIGTERM
    assert checkpoints(run) == ["step-000001"]
    capsys.readouterr()
    assert main([str(config_file), *heldout, *overrides, "train.steps=2"]) == 0
    assert checkpoints(run)[-1] == "step-000002"
    before = json.loads((run / "result.json").read_text())["heldout_before"]
    assert f"at step 2, from {100 * before:.1f} %" in capsys.readouterr().out


def test_a_full_disk_at_the_end_is_no_success_and_the_same_command_finishes(config_file, capsys):
    run = config_file.parent / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))  # the model file is larger, a ledger smaller
    try:
        assert main([str(config_file)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    error = capsys.readouterr().err
    assert "checkpoint of step 2 could not be written" in error and "the run repeats" in error
    assert not checkpoints(run) and not (run / "result.json").exists()
    sampled = Ledger(run).read(1)
    assert main([str(config_file)]) == 0
    assert checkpoints(run) == ["step-000002"]
    assert Ledger(run).read(1) == sampled


def launch(config_file: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "recipes.cli", "train", "--processes", "2", str(config_file), *overrides]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )


@pytest.mark.parametrize(
    ("number", "to_one"), [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGTERM, True)]
)
def test_two_processes_save_and_stop_together_at_a_signal(config_file, number, to_one):
    """At the launcher, or at the second process alone."""
    run = config_file.parent / "run"
    slow = "rewards.functions=[{name: 'toy_rewards:slow'}]"
    launcher = launch(config_file, slow, "train.steps=200")
    wait_until(lambda: (run / "metrics.jsonl").is_file(), launcher)
    children = psutil.Process(launcher.pid).children(recursive=True)
    second = max(psutil.Process(launcher.pid).children(), key=lambda child: child.pid)
    (second if to_one else launcher).send_signal(number)
    out, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 128 + number, err[-2000:]
    assert "the same command goes on from there" in out
    assert "Traceback" not in err and "failed first" not in err
    steps = len((run / "metrics.jsonl").read_text().splitlines())
    assert 0 < steps < 200 and checkpoints(run) == [f"step-{steps:06d}"]
    assert len(children) >= 4 and not psutil.wait_procs(children, timeout=60)[1]


ENDS_WHEN_ASKED = """
import os, signal, sys, time

def main(words):
    rank = os.environ["RANK"]
    if rank == "0":
        signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), sys.exit(143)))
    open(os.environ["READY"] + rank, "w").close()
    while not os.path.exists(os.path.dirname(os.environ["READY"]) + "/end"):
        time.sleep(0.05)
    return 0
"""


def launch_two(folder, program: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """The launcher of two processes of a program, and these, once both are ready."""
    (folder / "waits.py").write_text(program)
    code = "import sys; from recipes.cli.launch import launch; sys.exit(launch([], 2, 'waits'))"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{folder}", "READY": str(folder / "ready")}
    command = [sys.executable, "-c", code]
    launcher = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(list(folder.glob("ready*"))) == 2, launcher)
    return launcher, sorted(psutil.Process(launcher.pid).children(), key=lambda child: child.pid)


@pytest.mark.parametrize("to_one", [False, True])
def test_a_process_that_ends_at_a_signal_to_all_is_not_blamed(tmp_path, to_one):
    """The second process ends first, as where the first signal ends a wait. Alone it is blamed."""
    launcher, (_, second) = launch_two(tmp_path, ENDS_WHEN_ASKED)
    (second if to_one else launcher).send_signal(signal.SIGTERM)
    if to_one:
        (tmp_path / "end").touch()  # for the first one, which no signal has asked
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGTERM
    assert ("process 1 failed first" in err) == to_one, err


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_named_with_what_ended_it(tmp_path, rank):
    """As the kernel does where memory runs out: it leaves no words."""
    launcher, children = launch_two(tmp_path, ENDS_WHEN_ASKED)
    children[rank].kill()
    (tmp_path / "end").touch()
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGKILL
    assert f"process {rank} failed first (Killed; the host's memory may have run out)\n" in err


def test_a_process_that_does_not_end_with_the_others_is_killed(monkeypatch):
    monkeypatch.setattr(recipes.cli.launch, "ENDING_S", 0.5)
    children = [subprocess.Popen(["sleep", seconds]) for seconds in ("0", "60")]
    assert _wait(children) == -1
    assert [child.poll() for child in children] == [0, None]
    _end(children)
    assert children[1].returncode == -signal.SIGKILL


def test_more_processes_than_gpus_are_refused(config_file, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert cohort(["train", str(config_file), "--processes", "2"]) == 1
    assert "--processes 2, but the number of GPUs is 1" in capsys.readouterr().err


def test_the_processes_of_a_killed_launcher_save_and_end(config_file):
    run = config_file.parent / "run"
    launcher = launch(config_file, "rewards.functions=[{name: 'toy_rewards:slow'}]", "train.steps=200")
    wait_until(lambda: (run / "metrics.jsonl").is_file(), launcher)
    children = psutil.Process(launcher.pid).children(recursive=True)
    launcher.kill()
    assert not psutil.wait_procs(children, timeout=60)[1]
    assert len(checkpoints(run)) == 1


def test_a_fault_in_a_run_of_two_processes_is_one_sentence(config_file):
    launcher = launch(config_file, "rewards.functions=[{name: math}]", "data.columns=[prompt]")
    out, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 1, out
    assert "reward 'math' needs the column 'answer'" in err and "Traceback" not in err


def wait_until(condition, launcher: subprocess.Popen[str], limit_s: float = 120.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert launcher.poll() is None and time.monotonic() < deadline, launcher.communicate()
        time.sleep(0.1)


def test_a_second_ctrl_c_stops_at_once_and_the_run_goes_on_later(config_file):
    """While a grader takes 60 s for a completion: the step would not end."""
    run = config_file.parent / "run"
    slow = ["rewards.functions=[{name: 'toy_rewards:stuck'}]", "rewards.deadline_s=60"]
    command = [sys.executable, "-m", "recipes.cli", "train", str(config_file), *slow]
    log = config_file.parent / "said"
    with log.open("w") as said:
        own = {"stdout": said, "stderr": said, "text": True, "env": {**os.environ, "PYTHONUNBUFFERED": "1"}}
        process = subprocess.Popen(command, cwd=ROOT, preexec_fn=default_sigint, **own)
    wait_until(lambda: (run / "graders.log").is_file(), process)
    graders = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    asked = "stopping after this step; Ctrl-C again stops at once"
    wait_until(lambda: asked in log.read_text(), process)
    time.sleep(1.5)  # a second one of the same moment would be the same wish
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and time.monotonic() - began < 40
    said = log.read_text()
    assert "stopped at once; the same command goes on" in said and "Traceback" not in said
    assert graders and not psutil.wait_procs(graders, timeout=60)[1]
    ready = "rewards.functions=[{name: 'toy_rewards:stuck', options: {stuck_s: 0}}]"
    assert main([str(config_file), ready]) == 0


def default_sigint() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it


def test_two_processes_of_which_one_was_killed_end_as_if_none_had_been(config_file, monkeypatch):
    """Dynamic sampling, two epochs and a checkpoint every other step; the other process is ended."""
    order = config_file.parent / "kill"
    monkeypatch.setenv("TOY_KILL", str(order))
    overrides = [
        "rewards.functions=[{name: 'toy_rewards:kills_the_trainer'}]",
        "advantage.dynamic_sampling={max_rounds: 3}",
        "train.steps=5",
        "train.num_epochs=2",
        "checkpoint.every=2",
    ]
    codes, runs = [], {}
    for name in ("whole", "killed", "killed"):
        if name == "killed" and name not in runs:
            order.touch()
        runs[name] = config_file.parent / name
        launcher = launch(config_file, *overrides, f"run_dir={runs[name]}")
        _out, err = launcher.communicate(timeout=200)
        codes.append(launcher.returncode)
    assert codes == [0, 128 + signal.SIGKILL, 0], err
    files = [r / "checkpoints" / "step-000005" / "model.safetensors" for r in runs.values()]
    assert files[0].read_bytes() == files[1].read_bytes()
    consumed = [
        [
            g.prompt.id
            for step in range(5)
            for r in Ledger(run, 0, 2).read_all(step)
            for g in r.groups + r.rejected
        ]
        for run in runs.values()
    ]
    assert consumed[0] == consumed[1] and len(consumed[0]) > 5 * 2
    outcomes = [
        [row["groups/without_spread"] for row in read_rows(run / "metrics.jsonl")] for run in runs.values()
    ]
    assert outcomes[0] == outcomes[1] and max(outcomes[0]) > 0
