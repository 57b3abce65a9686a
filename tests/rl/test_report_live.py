"""The report of a run that runs: rebuilt beside it, and once more when it ends, killed or not."""

import os
import signal
import subprocess
import sys

import pytest

from rl.report import live
from rl.report.live import LiveReport
from rl.store.metrics import MetricsLog
from tests.report_pages import Page, scored_group, write_step
from tests.waiting import wait_until

RUN_AND_DIE = """
import os, signal, sys, time
from pathlib import Path
from rl.report import live
live.FIRST_S = 0.0
report = live.LiveReport(Path(sys.argv[1]))
report.tick()
while not (Path(sys.argv[1]) / "report.html").exists():
    time.sleep(0.05)
os.kill(os.getpid(), signal.SIGKILL)
"""


def write_run(run, step):
    MetricsLog(run).write(step + 1, {"reward/mean": 0.5})
    write_step(run, step, [scored_group(["a", "b"], [0.0, 1.0])])
    return run


def page_of(run):
    return Page((run / "report.html").read_text())


def test_a_report_is_made_beside_the_run_and_once_more_at_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "FIRST_S", 0.0)
    report = LiveReport(write_run(tmp_path, 0))
    report.tick()
    report.tick()  # one process, however many steps
    wait_until((tmp_path / "report.html").is_file, "there is a report")
    page = page_of(tmp_path)
    assert page.data["page"]["live"] == 30 and "1 steps · running, last step" in page.text
    write_run(tmp_path, 1)
    held = os.dup(report._child.stdin.fileno())  # as a process has that was forked meanwhile
    assert report.finish() == tmp_path / "report.html"
    page = page_of(tmp_path)
    assert page.data["page"]["live"] == 0 and len(page.groups) == 2
    os.close(held)


def test_the_page_about_a_killed_run_says_that_it_stopped(tmp_path):
    command = [sys.executable, "-c", RUN_AND_DIE, str(write_run(tmp_path, 0))]
    assert subprocess.run(command, timeout=60).returncode == -signal.SIGKILL
    wait_until(lambda: page_of(tmp_path).data["page"]["live"] == 0, "the report says so")
    assert "running or stopped" in page_of(tmp_path).text


@pytest.mark.parametrize("fault", ["short", "no process"])
def test_without_a_process_beside_it_a_run_makes_its_report_at_the_end(tmp_path, monkeypatch, fault):
    report = LiveReport(write_run(tmp_path, 0))
    if fault == "no process":
        monkeypatch.setattr(live, "FIRST_S", 0.0)
        monkeypatch.setattr(live.sys, "executable", str(tmp_path / "nothing"))
    report.tick()
    assert not (tmp_path / "report.html").exists()
    assert report.finish().is_file()
