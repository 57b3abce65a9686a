"""`graders.log`: whole lines of several graders, bounded, and harmless on a screen."""

from __future__ import annotations

import re

import rewards.pool.log
from rewards.compose import RewardSpec
from rewards.pool.log import GraderLog
from rewards.pool.pool import RewardPool
from rl.types import Completion, Group, Prompt


def group(texts):
    return Group(Prompt("p", "", (1,)), [Completion([1], [], [True], "stop", [], text=t) for t in texts])


def test_what_several_graders_print_is_there_line_by_line(tmp_path):
    spec = RewardSpec("rewards_for_tests:prints", options={"per_completion": True})
    pool = RewardPool([spec], workers=2, log=tmp_path / "graders.log")
    try:
        pool.score([group([f"{i} " * 200 for i in range(40)])])
    finally:
        pool.close()
    lines = (tmp_path / "graders.log").read_text().splitlines()
    assert sorted(int(line.split()[1]) for line in lines) == list(range(40))
    assert all(re.fullmatch(r"saw( \d+){200} \?\[31m", line) for line in lines), lines[:2]


def test_the_log_is_bounded_and_keeps_the_newest(tmp_path, monkeypatch):
    monkeypatch.setattr(rewards.pool.log, "HALF_BYTES", 1000)
    log = GraderLog(tmp_path / "graders.log")
    for i in range(1000):
        log.take(bytearray(b"line %d\n" % i))
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 2 and sum(sizes) < 2100
    assert (tmp_path / "graders.log").read_text().endswith("line 999\n")


def test_a_line_without_an_end_waits_for_it_and_does_not_grow_for_ever(tmp_path):
    log, path = GraderLog(tmp_path / "graders.log"), tmp_path / "graders.log"
    line = bytearray(b"half")
    log.take(line)
    assert line == b"half" and not path.exists()
    line += b" and half\nrest"
    log.take(line)
    assert line == b"rest" and path.read_text() == "half and half\n"
    log.take(line, ended=True)
    assert path.read_text() == "half and half\nrest\n"
    log.take(line := bytearray(b"x" * 70_000))
    assert not line
