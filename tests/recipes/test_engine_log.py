"""What an engine writes while it starts goes into a file, which its faults name; the display stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import recipes.engines
from recipes.engines import naming, start_into
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


def test_a_run_that_samples_with_transformers_does_not_wait_for_the_import_of_vllm(monkeypatch):
    monkeypatch.setattr(recipes.engines, "vllm_available", lambda: pytest.fail("vLLM is imported"))
    given = {"trained": nn.Linear(1, 1), "long_factors": False}
    assert recipes.engines._engine_name("transformers", "model", print, **given) == "transformers"
