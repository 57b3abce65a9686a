"""The heat map of experts in the report, from `experts.jsonl` alone."""

from __future__ import annotations

import json

import pytest

from rl.report.experts import expert_loads
from rl.report.report import build_report
from rl.store.metrics import MetricsLog
from tests.browser import CHROMIUM, NAMES, Browser
from tests.report_pages import scored_group, write_step


def write_loads(run, rows) -> None:
    run.mkdir(exist_ok=True)
    (run / "experts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_at_most_six_maps_are_shown_the_first_and_the_last_among_them(tmp_path):
    write_loads(tmp_path, [{"step": step, "load": [[step, 200 - step]]} for step in range(1, 41)])
    found = expert_loads(tmp_path / "experts.jsonl")
    assert [row["step"] for row in found] == [1, 9, 17, 24, 32, 40]
    assert found[-1]["load"] == [[40, 160]]


@pytest.mark.parametrize(
    "load",
    [
        "<b>",
        [],
        [[]],
        [[1], [1, 2]],
        [["</script>"]],
        [[None]],
        [1, 2],
        [[1] * 70_000],
        [[float("inf")]],
        {"a": 1},
    ],
)
def test_what_is_not_a_map_of_numbers_is_left_out(tmp_path, load):
    write_loads(tmp_path, [{"step": 1, "load": load}, {"step": 2, "load": [[100, 100]]}])
    assert expert_loads(tmp_path / "experts.jsonl") == [{"step": 2, "load": [[100, 100]]}]


def test_only_a_run_with_experts_has_a_heat_map(tmp_path):
    MetricsLog(tmp_path).write(1, {"reward/mean": 0.5})
    assert "Load of the experts" not in build_report(tmp_path).read_text()
    write_loads(tmp_path, [{"step": 1, "load": [[150, 50], [100, 100]]}])
    page = build_report(tmp_path).read_text()
    assert "Load of the experts" in page and '"load":[[150,50],[100,100]]' in page.replace(" ", "")


@pytest.mark.skipif(CHROMIUM is None, reason=f"no Chromium here: none of {', '.join(NAMES)}")
def test_an_even_cell_is_grey_an_idle_one_blue_and_a_busy_one_orange(tmp_path):
    MetricsLog(tmp_path).write(1, {"reward/mean": 0.5})
    write_loads(tmp_path, [{"step": 1, "load": [[100, 0, 300]]}])
    write_step(tmp_path, 0, [scored_group(["a", "b"], [1.0, 0.0])])
    browser = Browser(tmp_path / "profile")
    try:
        browser.open(build_report(tmp_path).as_uri())
        pixels = "[...document.querySelector('.heat').getContext('2d').getImageData(0, 0, 3, 1).data]"
        found = json.loads(browser.run(f"JSON.stringify({pixels})"))
        assert [found[:3], found[4:7], found[8:11]] == [[205, 205, 205], [30, 80, 190], [215, 95, 0]]
        assert browser.complaints == []
    finally:
        browser.close()
