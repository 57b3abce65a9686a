"""The report in headless Chromium, from disk: what a reader does with it, without a fault and a request."""

from __future__ import annotations

import json
import time

import pytest

from rl.report.compare import compare_runs
from rl.report.report import build_report, write_report
from rl.report.shelf import Shelf
from rl.store.metrics import MetricsLog
from tests.browser import CHROMIUM, NAMES, Browser
from tests.report_pages import scored_group, write_step

HOSTILE = "</script><img src=x onerror=console.error('boo')><b>bold</b>"
LONG = " ".join(f"word{i}" for i in range(1000))
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"no Chromium here: none of {', '.join(NAMES)}")


@pytest.fixture
def browser(tmp_path):
    found = Browser(tmp_path / "profile")
    yield found
    found.close()
    assert found.complaints == []
    assert [url for url in found.requests if not url.startswith(("file:", "about:"))] == []


def write_run(run, num_steps=12):
    """Six groups a step. In step s, group i has a mean reward of i / 6 and a spread; the prompt says both."""
    log = MetricsLog(run)
    for step in range(num_steps):
        log.write(step + 1, {"reward/mean": step / 20, "reward/std": 0.4, "time/sample": 2.0})
        groups = [
            scored_group(
                [f"{HOSTILE} {LONG} needle{step:02}", "b"],
                [i / 3, 0.0],
                prompt_id=f"train/{step}-{i}",
                prompt=f"{HOSTILE} step {step} group {i}",
            )
            for i in range(6)
        ]
        write_step(run, step, groups)
    write_step(run, 0, [scored_group(["held out"], [1.0], prompt_id="heldout/0")], folder="evaluations")
    (run / "evaluation.jsonl").write_text('{"step": 0, "accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 9}\n')
    (run / "config.yaml").write_text(f"train: {{steps: {num_steps}}}\n")
    return run


def rows(browser):
    """The list as it is shown: step and first words of each group."""
    return json.loads(
        browser.run(
            "JSON.stringify([...document.querySelectorAll('#rows tr')].map((row) => "
            "[row.cells[0].textContent, row.querySelector('.what').textContent]))"
        )
    )


def choose(browser, name, value):
    select = f"document.getElementById({name!r})"
    browser.run(f"{select}.value = {value!r}; {select}.dispatchEvent(new Event('change'))")


@pytest.mark.timeout(60)
def test_a_reader_opens_expands_searches_pages_and_follows_a_link(tmp_path, browser):
    page = build_report(write_run(tmp_path / "run"), page_bytes=100_000).as_uri()
    browser.open(page)
    # 12 steps of 6 groups and one of the evaluation, 25 a page, the newest first.
    assert len(rows(browser)) == 25 and rows(browser)[0] == ["12", "train/11-0"]
    assert browser.run("document.querySelectorAll('#figures svg.plot').length") == 3
    bars = "(({x, width}) => [x, x + width])(document.querySelector('#figures path.fill').getBBox())"
    assert 56 <= browser.run(bars)[0] < browser.run(bars)[1] <= 548  # whole, between the ends of the axis
    assert browser.run("document.getElementById('pages').textContent") == "page 1 of 3"
    browser.press("n")
    browser.press("n")
    assert len(rows(browser)) == 73 - 50
    assert rows(browser)[-1] == ["held-out 0", "heldout/0"]
    choose(browser, "sort", "wide")
    assert all(name.endswith("-5") for _, name in rows(browser)[:12])
    choose(browser, "sort", "low")
    assert all(name.endswith("-0") for _, name in rows(browser)[:12])
    choose(browser, "set", "e")
    assert rows(browser) == [["held-out 0", "heldout/0"]]
    choose(browser, "set", "")

    # What is in the page is searched at once, the side files when asked.
    browser.press("/")
    browser.type("needle11")
    browser.wait("document.querySelectorAll('#rows tr').length === 6")
    browser.run("document.getElementById('search').select()")
    browser.type("needle03")
    browser.wait("document.querySelectorAll('#rows tr').length === 0")
    browser.run("document.getElementById('deep').click()")
    browser.wait("document.querySelectorAll('#rows tr').length === 6")
    assert {step for step, _ in rows(browser)} == {"4"}

    # A group of a side file opens; its best completion fills the page's width, and nothing of it is cut.
    browser.press("Escape")
    browser.press("j")
    browser.press("Enter")
    browser.wait("document.querySelectorAll('details.completion').length === 2")
    assert browser.run("document.querySelector('details.completion mark').textContent") == "needle03"
    assert browser.run("document.querySelectorAll('#view img, #view b').length") == 0
    shown = "document.querySelector('details.completion[open] pre')"
    assert HOSTILE in browser.run(f"{shown}.textContent") and "word999" in browser.run(f"{shown}.textContent")
    assert browser.run(f"{shown}.scrollHeight === {shown}.clientHeight")
    assert browser.run(f"{shown}.offsetWidth / document.querySelector('main').offsetWidth") > 0.9
    for num_open in (0, 2):
        browser.press("o")
        assert browser.run("document.querySelectorAll('details.completion[open]').length") == num_open

    # The address is a link to it, and the keyboard leads on and back.
    title, address = (
        browser.run("document.getElementById('title').textContent"),
        browser.run("document.getElementById('title').href"),
    )
    assert title.startswith("Step 4 · train/3-")
    browser.press("j")
    assert browser.run("document.getElementById('title').textContent") != title
    browser.press("Escape")
    assert browser.run("document.getElementById('reader').hidden")
    browser.open(address)
    browser.wait("document.querySelectorAll('details.completion').length === 2")
    assert browser.run("document.getElementById('title').textContent") == title


@pytest.mark.timeout(60)
def test_the_page_of_a_running_run_comes_again_in_its_place_and_stops_at_the_end(tmp_path, browser):
    run = write_run(tmp_path / "run", num_steps=2)
    path, shelf = run / "report.html", Shelf(run, run / "report")
    write_report(shelf, path, live_s=1)
    browser.open(path.as_uri())
    browser.run("document.querySelector('#rows tr').click()")
    browser.run("window.scrollTo(0, 700); window.isOld = true")
    title = browser.run("document.getElementById('title').textContent")
    write_step(run, 2, [scored_group(["new", "b"], [0.0, 1.0], prompt_id="train/new")])
    write_report(shelf, path)
    there = "document.querySelector('#rows tr').cells[0].textContent === '3'"  # it may have come before that
    browser.wait(f"window.isOld === undefined && document.readyState === 'complete' && {there}")
    assert browser.run("document.getElementById('title').textContent") == title
    assert abs(browser.run("scrollY") - 700) < 2
    browser.run("window.isOld = true")
    browser.press("Escape")
    assert rows(browser)[0] == ["3", "train/new"]
    time.sleep(1.2)
    assert browser.run("window.isOld")


@pytest.mark.timeout(60)
def test_two_runs_lie_side_by_side(tmp_path, browser):
    runs = [write_run(tmp_path / name, num_steps) for name, num_steps in (("first", 3), ("second", 5))]
    browser.open(compare_runs(runs, tmp_path / "both.html").as_uri())
    legends = "[...document.querySelector('#figures .legend').children].map((key) => key.textContent)"
    assert browser.run(legends) == ["accuracy (share)", "first", "second"]
    assert browser.run("document.querySelectorAll('#figures polyline.c2').length") >= 3
    assert browser.run("document.body.innerText").count("train.steps") == 2  # the keys that differ, a verdict
    browser.run("document.querySelector('details.fold').open = true")
    browser.wait("document.querySelectorAll('#more-figures svg.plot').length > 0")
