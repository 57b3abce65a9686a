"""The report: one page from the files of a run folder, whatever state they are in and whatever they say."""

import base64
import hashlib
import html.parser
import json
import re
from itertools import pairwise

import pytest

from rl.report.figures import build_figures
from rl.report.groups import MAX_GROUPS, json_for_html, sample_groups
from rl.report.plots import Series, columns_of, line_plot, nice_ticks, smooth, sparkline, stacked_bars
from rl.report.report import build_report
from rl.store.ledger import Ledger
from rl.store.metrics import METRICS, MetricsLog
from rl.types import Completion, Group, Prompt, Reason, Reward, ScoredGroup, VersionSpan

HOSTILE = (
    "<script>alert('boo')</script>",
    "</script><script>alert('boo')</script>",
    "<img src=x onerror=alert('boo')>",
    "[click](javascript:alert('boo'))",
    "\x1b[31mred\x1b]0;title\x07",
    "\u202egnp.exe",
    "{{7*7}}{% raw %}",
    "\u2028\u2029<!--",
)


def scored_group(
    texts, scores, *, prompt_id="train/000001", prompt="What is 2 + 2?", finish="stop", **reward
):
    completions = [
        Completion([1, 2, 3], [-0.5, -0.25, -3.0], [True] * 3, finish, [VersionSpan(0, 3)], text)
        for text in texts
    ]
    rewards = [Reward(score, Reason.SCORED, **reward) for score in scores]
    return ScoredGroup(Group(Prompt(prompt_id, prompt, (1,), columns={"answer": "4"}), completions), rewards)


def write_step(run_dir, step, groups, advantages=None, **ledger):
    Ledger(run_dir, **ledger).write(
        step, groups, cursor_before=0, cursor_after=1, policy_version=0, advantages=advantages
    )


class Page(html.parser.HTMLParser):
    """The elements, texts and scripts of a page, as a browser's parser sees them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.scripts, self.words = [], [], [], []
        self.meta = {}
        self._inside = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self._inside = tag
        if tag == "script":
            self.scripts.append([dict(attrs), ""])
        if tag == "meta":
            self.meta[dict(attrs).get("http-equiv")] = dict(attrs).get("content")

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1][1] += data
        elif self._inside != "style":
            self.words.append(data)

    @property
    def groups(self):
        return json.loads(
            next(body for attrs, body in self.scripts if attrs.get("type") == "application/json")
        )

    @property
    def text(self):
        return " ".join(self.words)


@pytest.fixture
def hostile_run(tmp_path):
    run = tmp_path / "run<u>"
    run.mkdir()
    part = HOSTILE[0]
    (run / "config.yaml").write_text(
        json.dumps({"train": {"steps": 9}, HOSTILE[1]: HOSTILE[2], "hub_token": "t0p"})
    )
    (run / "result.json").write_text(json.dumps({HOSTILE[0]: HOSTILE[1], "seconds": 75}))
    MetricsLog(run).write(
        1, {"reward/mean": 0.5, f"reward/{part}/mean": 0.25, f"reward/{HOSTILE[2]}/mean": 0.5}
    )
    group = scored_group(
        HOSTILE,
        [float(i % 2) for i in range(len(HOSTILE))],
        prompt_id=HOSTILE[1],
        prompt="".join(HOSTILE),
        detail=HOSTILE[2],
        extracted=HOSTILE[0],
        parts={HOSTILE[1]: 1.0},
    )
    write_step(run, 0, [group])
    return run


def test_hostile_text_stays_text(hostile_run):
    source = build_report(hostile_run).read_text()
    page = Page(source)
    # Two scripts, ours: the data and the browser. No image, no link, no handler came in with the text.
    assert [attrs.get("type") for attrs, _ in page.scripts] == ["application/json", None]
    assert {"img", "a", "iframe", "u"} & set(page.tags) == set()
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("href", "src")]
    assert "alert('boo')</script>" not in source
    for character in "\x1b\x07\u202e\u2028\u2029":
        assert character not in source
    assert "⟨U+001B⟩[31mred" in source and "⟨U+202E⟩gnp.exe" in source
    assert "{{7*7}}" in source  # the template never evaluates what it is given
    texts = [completion["text"] for completion in page.groups[0]["completions"]]
    assert {"<script>alert('boo')</script>", "[click](javascript:alert('boo'))"} <= set(texts)
    assert "t0p" not in source


def test_the_policy_allows_exactly_the_script_of_the_page(hostile_run):
    page = Page(build_report(hostile_run).read_text())
    script = page.scripts[1][1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert page.meta["Content-Security-Policy"] == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    forbidden_words = (
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|fetch\(|https?://(?!www\.w3)"
    )
    assert re.findall(forbidden_words, script) == []


def test_json_cannot_end_its_element():
    assert json_for_html({"a": "</script>&\u2028\u2029"}) == (
        '{"a":"\\u003c/script\\u003e\\u0026\\u2028\\u2029"}'
    )


def test_a_half_written_run_still_has_a_report(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1, "policy/loss": null, "nonfinite": ["policy/loss"]}\n{"step": 2, "rew\xff'
    )
    (tmp_path / "evaluation.jsonl").write_text(
        '{"step": 0, "accuracy": 0.25, "low": 0.2, "high": 0.3, "n": 100}\n{"s'
    )
    (tmp_path / "config.yaml").write_text("train: {steps: 7")
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "step-000001-rank0.jsonl.gz").write_bytes(b"\x1f\x8b\x08half")
    page = Page(build_report(tmp_path).read_text())
    assert "1 steps · running or stopped" in page.text
    assert "Broken: policy/loss not finite in 1 of the last 1 steps, since step 1" in page.text
    assert "step-000001-rank0.jsonl.gz: damaged" in page.text
    assert "25.0 %" in page.text


def test_an_empty_run_folder_has_a_report_and_no_folder_is_an_error(tmp_path):
    page = Page(build_report(tmp_path).read_text())
    assert "No data: no step is recorded yet" in page.text
    with pytest.raises(ValueError, match=r"no run folder .*nowhere"):
        build_report(tmp_path / "nowhere")


def test_a_finished_run_says_so_and_shows_what_was_changed(tmp_path):
    (tmp_path / "config.yaml").write_text("train: {steps: 2}\noptimizer: {lr: 1.0e-06}\n")
    (tmp_path / "result.json").write_text('{"steps": 2, "seconds": 3725}')
    log = MetricsLog(tmp_path)
    for step in (1, 2):
        log.write(step, dict.fromkeys(METRICS, 0.5))
    page = Page(build_report(tmp_path, tmp_path / "elsewhere.html").read_text())
    assert "2 of 2 steps · finished after 1 h 2 min" in page.text
    assert "train.steps" in page.text and "default 100" in page.text
    assert "default 1e-06" not in page.text  # optimizer.lr is the default
    assert not (tmp_path / "report.html").exists()


def test_checks_name_the_first_step_out_of_range_and_the_remedy(tmp_path):
    log = MetricsLog(tmp_path)
    for step in range(1, 11):
        log.write(step, {"policy/entropy": 0.5 if step < 4 else 0.01})
    page = Page(build_report(tmp_path).read_text())
    assert "Warning: policy/entropy is 0.01, healthy is 0.02 to 2.5, since step 4" in page.text
    assert "step 4 7 of 10 steps" in " ".join(page.text.split())
    assert "What to do: low: the policy has collapsed" in page.text


def test_completions_are_sorted_by_advantage_else_by_score(tmp_path):
    group = scored_group(["a", "b", "c"], [0.0, None, 1.0])
    write_step(tmp_path, 0, [group], [[2.0, 0.0, -1.0]])
    write_step(tmp_path, 1, [group])
    with_advantages, without = sample_groups(tmp_path)[0]
    assert [c["text"] for c in with_advantages["completions"]] == ["a", "b", "c"]
    assert [c["text"] for c in without["completions"]] == ["c", "a", "b"]
    assert without["tags"] == ["abstained"]


def test_groups_are_tagged_for_the_filters(tmp_path):
    groups = [
        scored_group(["a", "b"], [1.0, 1.0]),
        scored_group(["a", "b"], [0.0, 1.0], finish="length"),
        scored_group(["a", "b"], [0.0, 1.0]),
    ]
    write_step(tmp_path, 0, groups)
    assert sorted(group["tags"] for group in sample_groups(tmp_path)[0]) == [[], ["no spread"], ["truncated"]]


def test_the_sample_spreads_over_the_run_and_its_processes(tmp_path):
    for step in range(100):
        for rank in (0, 1):
            groups = [scored_group(["a", "b"], [0.0, 1.0], prompt_id=f"{step}/{rank}/{i}") for i in range(4)]
            write_step(tmp_path, step, groups, rank=rank, world_size=2)
    groups, _ = sample_groups(tmp_path)
    steps = sorted({group["step"] for group in groups})
    assert len(groups) == MAX_GROUPS and len(steps) == 20
    assert (steps[0], steps[-1]) == (1, 100)
    assert max(b - a for a, b in pairwise(steps)) <= 6


def test_the_size_cap_holds_and_keeps_both_ends_of_the_run(tmp_path):
    # Every "<" takes six bytes. 12 steps of 4 groups of 8 completions of 20,000 are 46 MB as they come.
    for step in range(12):
        groups = [scored_group(["<" * 20_000] * 8, [0.0, 1.0] * 4, prompt="&" * 20_000) for _ in range(4)]
        write_step(tmp_path, step, groups)
    path = build_report(tmp_path)
    assert path.stat().st_size < 3_000_000
    page = Page(path.read_text())
    assert {1, 12} <= {group["step"] for group in page.groups}
    assert "characters left out" in page.groups[0]["completions"][0]["text"]


def test_a_line_plot_puts_points_where_they_belong():
    # 560 x 262 with margins 52 left, 10 right, 10 top, 24 bottom: 498 x 228. Steps 0..10 and values 0..1:
    # (0, 0) -> (52, 238); (5, 0.5) -> (52 + 249, 238 - 114); (10, 1) -> (550, 10).
    svg = line_plot(
        [Series("a<b", [(0, 0.0), (5, 0.5), (10, 1.0)])],
        x_range=(0, 10),
        y_range=(0.0, 1.0),
        show=lambda v: f"{v:g}",
    )
    assert '<polyline class="line c1" points="52,238 301,124 550,10"/>' in svg
    assert "<title>step 5\na&lt;b: 0.5</title>" in svg


def test_a_band_shows_the_interval():
    svg = line_plot(
        [Series("a", [(0, 0.5), (10, 0.5)], 2, low=[0.0, 0.25], high=[1.0, 0.75])],
        x_range=(0, 10),
        y_range=(0.0, 1.0),
        show=str,
    )
    # There along the high ends, back along the low ones.
    assert '<polygon class="band c2" points="52,10 550,67 550,181 52,238"/>' in svg
    assert "a: 0.5 [0.0, 1.0]" in svg


def test_bars_stack():
    # Steps 1 and 2 over 0..2: 249 pixels a step, bars 247 wide, the last cut at the frame; heights of 4.
    svg = stacked_bars(
        [Series("a", [(1, 1.0), (2, 1.0)], 1), Series("b", [(1, 3.0)], 2)],
        x_range=(0, 2),
        y_range=(0.0, 4.0),
        show=str,
    )
    assert '<path class="fill c2" d="M177.5 238V10H424.5V238zM426.5 238V181H550V238z"/>' in svg
    assert '<path class="fill c1" d="M177.5 238V181H424.5V238zM426.5 238V181H550V238z"/>' in svg
    assert svg.index("fill c2") < svg.index("fill c1")


def test_long_series_become_means_with_extremes():
    columns = columns_of(Series("a", [(step, float(step % 2)) for step in range(1000)]), limit=100)
    assert len(columns) == 100
    assert (columns[0].first, columns[0].last, columns[0].mean, columns[0].low, columns[0].high) == (
        0,
        9,
        0.5,
        0.0,
        1.0,
    )


def test_smoothing_keeps_the_step_of_a_jump():
    points = [(step, 0.0 if step < 50 else 1.0) for step in range(100)]
    assert smooth(points) == points


@pytest.mark.parametrize(
    "low, high, ticks",
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 120, [0, 20, 40, 60, 80, 100, 120]),
        (3, 3, [3]),
        (0.11, 0.19, [0.12, 0.14, 0.16, 0.18]),
    ],
)
def test_ticks_are_round_numbers(low, high, ticks):
    assert nice_ticks(low, high) == pytest.approx(ticks)


def test_sparkline_marks_a_bound_that_is_in_view():
    svg = sparkline([(0, 0.0), (1, 1.0)], high=0.5, low=-3.0)
    assert '<polyline class="line c1" points="2,21 114,3"/>' in svg
    assert svg.count('class="bound"') == 1 and 'd="M2,12 L114,12"' in svg


def test_every_metric_with_data_has_a_curve():
    rows = [{"step": step, **dict.fromkeys(METRICS, 0.5)} for step in (1, 2)]
    evaluations = [{"step": 1, "accuracy": 0.5, "low": 0.4, "high": 0.6}]
    figures, more = build_figures(rows, evaluations)
    assert [figure.title for figure in figures] == [
        "Held-out accuracy",
        "Reward",
        "Bound on the training text",
        "Do groups teach?",
        "Exploration and drift",
        "Completion length",
        "Time per step",
        "Clipped tokens",
        "Does the sampler match the policy?",
    ]
    drawn = {
        METRICS[name].description
        for name in ("reward/std", "policy/grad_norm", "staleness/max", "memory/peak")
    }
    assert drawn <= {figure.title for figure in more}
    assert build_figures([], []) == ([], [])


def test_the_groups_of_a_step_add_up_to_one():
    rows = [{"step": 1, "groups/without_spread": 0.75, "groups/all_right": 0.5, "groups/all_wrong": 0.125}]
    groups = build_figures(rows, [])[0][0]
    assert [label for label, _ in groups.panels[0].legend] == [
        "with spread",
        "all right",
        "all wrong",
        "no verdict",
    ]
    for text in ("with spread: 25 %", "all right: 50 %", "all wrong: 12.5 %", "no verdict: 12.5 %"):
        assert text in groups.panels[0].svg
