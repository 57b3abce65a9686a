"""What an engine writes while it starts goes into a file, which its faults name; the display stays."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import recipes.engines
from recipes.engines import begin_imports, naming, said_of_start, start_into, started_into
from recipes.program import Laps
from rl.config.read import load_config
from rollout.engine import EngineError

ROOT = Path(__file__).parents[2]


def test_output_of_libraries_and_children_goes_into_the_file_and_comes_back(tmp_path, capfd):
    log = tmp_path / "run" / "engine.log"
    with start_into(log):
        os.write(1, b"C++ warns\n")
        child = subprocess.Popen(["sh", "-c", "echo child; read x; echo later"], stdin=subprocess.PIPE)
    print("after")
    child.communicate(b"\n")
    assert log.read_text().splitlines() == ["C++ warns", "child", "later"]
    assert capfd.readouterr().out == "after\n"


def test_the_display_keeps_its_place_while_an_engine_starts(tmp_path):
    code = f"""
from recipes.engines import start_into
from pathlib import Path
from rl.report.display import Display
with Display(1) as display, start_into(Path({str(tmp_path / "engine.log")!r})):
    display.note("shown")
    print("chatter")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout == "shown\n", done.stderr
    assert (tmp_path / "engine.log").read_text() == "chatter\n"


@pytest.mark.parametrize("kind", [ValueError, EngineError])
def test_a_fault_names_the_file_if_something_is_in_it(tmp_path, kind):
    log = tmp_path / "engine.log"
    with pytest.raises(kind, match=f"^it died; its output is in {log}$"), start_into(log):
        os.write(2, b"why\n")
        raise kind("it died")
    with pytest.raises(kind, match=r"^it died$"), naming(log):
        raise kind("it died")


def test_a_fault_of_a_server_does_not_name_the_trainers_file(tmp_path):
    log = tmp_path / "engine.log"
    with (
        pytest.raises(EngineError, match=r"^it died; a server's output is where `cohort serve` was started$"),
        start_into(log, is_own=False),
    ):
        os.write(2, b"of the trainer\n")
        raise EngineError("it died")
    with pytest.raises(ValueError, match=r"^not fit$"), start_into(log, is_own=False):
        os.write(2, b"of the trainer\n")
        raise ValueError("not fit")


def test_a_run_that_samples_with_transformers_does_not_wait_for_the_import_of_vllm(monkeypatch):
    monkeypatch.setattr(recipes.engines, "vllm_available", lambda: pytest.fail("vLLM is imported"))
    given = {"trained": nn.Linear(1, 1), "long_factors": False}
    assert recipes.engines._engine_name("transformers", "model", print, **given) == "transformers"


@pytest.mark.parametrize(
    ("asked", "gpu", "expected"),
    [
        ("engine.name=auto", True, True),
        ("engine.process=auto", True, False),
        ("engine.name=vllm", True, True),
        ("engine.name=auto", False, False),  # the core's libraries on a CPU are loaded as its process starts
        ("engine.process=inside", True, False),
        ("engine.name=transformers", True, False),
    ],
)
def test_vllm_is_imported_early_only_for_a_core_that_may_come(tmp_path, monkeypatch, asked, gpu, expected):
    begun = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(recipes.engines, "begin_early", lambda: begun.append(True))
    monkeypatch.setattr(recipes.engines, "vllm_missing", lambda: None)
    given = ["engine.process=early", f"run_dir={tmp_path}/run", asked]
    config = load_config(ROOT / "recipes/configs/quickstart.yaml", given)
    begin_imports(config)()
    assert bool(begun) is expected


@pytest.mark.parametrize(("measured_wrong", "starts"), [(0, 1), (2, 3), (3, 3)])
def test_a_start_is_made_again_where_memory_came_back_while_vllm_measured(tmp_path, measured_wrong, starts):
    """vLLM 0.25.1 said so on an H200 where an SFT beside it ended, and the run was over."""
    log, notes, begun, engine = tmp_path / "engine.log", [], [], object()
    log.write_text("AssertionError: Error in memory profiling. Of a start before.\n")

    def make():
        begun.append(True)
        if len(begun) > measured_wrong:
            return engine
        os.write(2, b"AssertionError: Error in memory profiling. Initial free memory 83.71 GiB\n")
        raise ValueError("vLLM did not start with M")

    if measured_wrong < 3:
        assert started_into(log, make, notes.append) is engine
    else:
        with pytest.raises(ValueError, match="did not start with M; its output is in"):
            started_into(log, make, notes.append)
    assert len(begun) == starts and len(notes) == starts - 1


@pytest.mark.parametrize("gib_after, starts", [(40, 2), (100, 1)])
def test_a_start_without_room_is_made_again_if_another_process_took_memory(
    tmp_path, monkeypatch, gib_after, starts
):
    """vLLM 0.25.1 said so on an H200 where an evaluation started at the same time and took 90 GiB."""
    begun, engine = [], object()
    monkeypatch.setattr(
        recipes.engines, "free_on_gpu", lambda: 2**30 * (gib_after if len(begun) == 1 else 100)
    )

    def make():
        begun.append(True)
        if len(begun) == 2:
            return engine
        os.write(2, b"ValueError: No available memory for the cache blocks. Try increasing\n")
        raise ValueError("vLLM did not start with M")

    if starts == 2:
        assert started_into(tmp_path / "engine.log", make, print) is engine
    else:
        with pytest.raises(ValueError, match="did not start with M"):
            started_into(tmp_path / "engine.log", make, print)
    assert len(begun) == starts


def test_a_refused_start_is_not_made_again(tmp_path):
    begun = []

    def make():
        begun.append(True)
        raise ValueError("vLLM did not start with M: no such model")

    with pytest.raises(ValueError, match="no such model"):
        started_into(tmp_path / "engine.log", make, print)
    assert begun == [True]


def test_a_start_says_what_took_how_long(tmp_path):
    log = tmp_path / "engine.log"
    log.write_text("Graph capturing finished in 9 secs, took 0.42 GiB\n")  # of a start before
    begin = log.stat().st_size
    with log.open("a") as file:
        file.write(
            "Imports of the core were waited for 1.25 seconds\nModel loading took 2.98 GiB and 2 seconds\n"
        )
    lap = Laps(time.monotonic() - 5)
    lap("policy")
    lap("engine", said_of_start(log, begin))
    words = "policy 5.0, engine 0.0 (imports of its process 1.2, weights 2.0), other 0.0"
    assert lap("other") == f"ready after 5 s: {words}"
