"""The report: one page from the files of a run folder, whatever state they are in and whatever they say."""

import base64
import gzip
import hashlib
import json
import re

import pytest

from rl.report.compare import compare_runs
from rl.report.figures import build_figures, with_derived
from rl.report.groups import json_for_html
from rl.report.report import build_report
from rl.report.shelf import Shelf
from rl.report.shelf import _read as shelf_read
from rl.store.metrics import METRICS, MetricsLog
from tests.report_pages import Page, groups_in, scored_group, shelved, write_step

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
    # Ours are the data, in five elements, one script, and the link to the group that is open. No image, link
    # or handler came in with the text.
    assert [attrs.get("type") for attrs, _ in page.scripts] == ["application/json"] * 5 + [None]
    assert {"img", "iframe", "u"} & set(page.tags) == set() and page.tags.count("a") == 1
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
    script = page.scripts[-1][1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert page.meta["Content-Security-Policy"] == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}' 'strict-dynamic'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
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
        log.write(step, dict.fromkeys(METRICS, 0.5) | {"tokens/per_second": 100.0 * step})
    page = Page(build_report(tmp_path, tmp_path / "elsewhere.html").read_text())
    assert "2 of 2 steps · finished after 1 h 2 min" in page.text
    words = " ".join(page.text.split())
    assert "Tokens per second 150 median over the steps" in words
    assert "train train.steps 2 100" in words
    assert "optimizer.lr 1.0e-06" not in words  # it is the default
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
    with_advantages, without = shelved(tmp_path)[0]
    assert [c["text"] for c in with_advantages["completions"]] == ["a", "b", "c"]
    assert [c["text"] for c in without["completions"]] == ["c", "a", "b"]
    assert (with_advantages["tags"], without["tags"]) == (4, 4)  # abstained
    assert (without["mean"], without["spread"]) == (0.5, 0.5)


def test_groups_are_tagged_for_the_filters(tmp_path):
    groups = [
        scored_group(["a", "b"], [1.0, 1.0]),
        scored_group(["a", "b"], [0.0, 1.0], finish="length"),
        scored_group(["a", "b"], [0.0, 1.0]),
    ]
    write_step(tmp_path, 0, groups)
    # no spread: 1, truncated: 2, abstained: 4
    assert [group["tags"] for group in shelved(tmp_path)[0]] == [1, 2, 0]


def test_all_groups_are_listed_by_step_and_process(tmp_path):
    for step in range(30):
        for rank in (0, 1):
            groups = [scored_group(["a", "b"], [0.0, 1.0], prompt_id=f"{step}/{rank}/{i}") for i in range(4)]
            write_step(tmp_path, step, groups, rank=rank, world_size=2)
    expected = [f"{step}/{rank}/{i}" for step in range(30) for rank in (0, 1) for i in range(4)]
    assert [group["id"] for group in Page(build_report(tmp_path).read_text()).groups] == expected


def side_file(path):
    """The call that it is, taken apart."""
    name, packed = re.fullmatch(
        r'cohortGroups\("([\w-]+)","([A-Za-z0-9+/=]*)"\);\n', path.read_text()
    ).groups()
    return name, json.loads(gzip.decompress(base64.b64decode(packed)))


def test_texts_beyond_the_limit_go_to_side_files_the_oldest_first(tmp_path):
    """12 steps of 40,000 characters in a page of 100,000: the last two stay, ten go."""
    for step in range(12):
        write_step(tmp_path, step, [scored_group(["x" * 20_000] * 2, [0.0, 1.0], prompt_id=f"p{step}")])
    page = Page(build_report(tmp_path, page_bytes=100_000).read_text())
    assert [group["parts"] for group in page.groups] == [[1]] * 10 + [None] * 2
    files = sorted((tmp_path / "report").iterdir(), key=lambda path: int(path.name.split("-")[1][1:]))
    assert [path.name for path in files] == [f"groups-t{step}-0-0.js" for step in range(1, 11)]
    name, texts = side_file(files[3])
    assert name == "groups-t4-0-0" and texts[0]["completions"][0]["text"] == "x" * 20_000
    build_report(tmp_path)
    assert not (tmp_path / "report").exists()  # the page holds all of it


def test_side_files_have_a_limit_too_and_the_list_keeps_every_group(tmp_path):
    for step in range(12):
        texts = ["".join(map(chr, range(33 + step, 120))) * 50] * 2
        write_step(tmp_path, step, [scored_group(texts, [0.0, 1.0])])
    build_report(tmp_path, page_bytes=1)
    sizes = [path.stat().st_size for path in (tmp_path / "report").iterdir()]
    page = Page(build_report(tmp_path, page_bytes=1, side_bytes=sum(sizes) // 2).read_text())
    parts = [group["parts"] for group in page.groups]
    assert len(parts) == 12 and parts[0] == [] and parts[-1] == [1]
    assert sum(path.stat().st_size for path in (tmp_path / "report").iterdir()) <= sum(sizes) // 2 + 12 * 40


def test_a_side_file_is_never_written_through_a_link(tmp_path):
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    elsewhere.mkdir()
    (elsewhere / "groups-t9-0-0.js").write_text("mine")
    write_step(run, 0, [scored_group(["a", "b"], [0.0, 1.0])])
    (run / "report").symlink_to(elsewhere)
    build_report(run, page_bytes=1)
    assert [path.name for path in elsewhere.iterdir()] == ["groups-t9-0-0.js"]
    assert [path.name for path in (run / "report").iterdir()] == ["groups-t1-0-0.js"]


def test_side_files_that_somebody_put_there_are_replaced_or_removed(tmp_path):
    write_step(tmp_path, 0, [scored_group(["a", "b"], [0.0, 1.0])])
    (tmp_path / "report").mkdir()
    for name in ("groups-t1-0-0.js", "groups-t7-0-0.js"):
        (tmp_path / "report" / name).write_text("alert('boo')")
    build_report(tmp_path, page_bytes=1)
    (path,) = (tmp_path / "report").iterdir()
    assert side_file(path)[0] == "groups-t1-0-0"


def test_hostile_text_cannot_leave_a_side_file(hostile_run):
    build_report(hostile_run, page_bytes=1)
    (path,) = (hostile_run / "report").iterdir()
    _, (group,) = side_file(path)
    assert {"<script>alert('boo')</script>"} <= {completion["text"] for completion in group["completions"]}


def test_a_record_is_read_once_and_again_when_it_changes(tmp_path, monkeypatch):
    for step in range(3):
        write_step(tmp_path, step, [scored_group(["a", "b"], [0.0, 1.0])])
    shelf, opened = Shelf(tmp_path, tmp_path / "report"), []
    monkeypatch.setattr(
        "rl.report.shelf._read",
        lambda path, *rest, real=shelf_read: opened.append(path.name) or real(path, *rest),
    )
    shelf.refresh()
    assert opened == [f"step-00000{step}-rank0.jsonl.gz" for step in (2, 1, 0)]
    shelf.refresh()
    assert len(opened) == 3
    write_step(tmp_path, 1, [scored_group(["other", "b"], [0.0, 1.0])])
    shelf.refresh()
    assert opened[3:] == ["step-000001-rank0.jsonl.gz"]
    groups = groups_in(json.loads(shelf.records_json()), json.loads(shelf.texts_json()))
    assert [group["completions"][0]["text"] for group in groups] == ["b"] * 3
    assert "other" in shelf.texts_json()
    (tmp_path / "ledger" / "step-000002-rank0.jsonl.gz").unlink()
    shelf.refresh()
    assert shelf.num_groups == 2


def test_a_refresh_that_is_out_of_time_says_what_is_left(tmp_path):
    for step in range(3):
        write_step(tmp_path, step, [scored_group(["a", "b"], [0.0, 1.0])])
    shelf = Shelf(tmp_path, tmp_path / "report")
    shelf.refresh(0.0)
    assert (shelf.num_groups, shelf.num_unread) == (1, 2)
    shelf.refresh()
    assert (shelf.num_groups, shelf.num_unread) == (3, 0)


def test_evaluations_are_listed_beside_the_groups_of_training(tmp_path):
    write_step(tmp_path, 7, [scored_group(["a", "b"], [0.0, 1.0])])
    write_step(tmp_path, 8, [scored_group(["held out"], [1.0])], folder="evaluations")
    groups, _ = shelved(tmp_path)
    assert [(group["kind"], group["step"]) for group in groups] == [("e", 8), ("t", 8)]


def test_a_long_completion_keeps_both_of_its_ends(tmp_path):
    write_step(tmp_path, 0, [scored_group(["<" + "x" * 30_000 + ">"] * 2, [0.0, 1.0])])
    text = shelved(tmp_path)[0][0]["completions"][0]["text"]
    assert text[0] == "<" and text[-1] == ">" and "[… 10,002 characters left out …]" in text


def test_runs_are_compared_by_what_differs(tmp_path):
    for name, rate, steps in (("a", "1.0e-06", 3), ("b", "2.0e-06", 2)):
        log = MetricsLog(tmp_path / name)
        for step in range(1, steps + 1):
            log.write(step, {"reward/mean": step / 10, "groups/without_spread": 0.5})
        settings = f"train: {{steps: {steps}, seed: 7}}\noptimizer: {{lr: {rate}}}\nrun_dir: {name}\n"
        (tmp_path / name / "config.yaml").write_text(settings)
    page = Page(compare_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "both.html").read_text())
    words = " ".join(page.text.split())
    assert "optimizer.lr 1.0e-06 2.0e-06" in words and "train.steps 3 2" in words
    assert "train.seed" not in words and "run_dir a b" not in words
    assert [run["name"] for run in page.data["curves"]] == ["a", "b"]
    assert page.data["curves"][1]["curves"]["reward/mean"] == [[1, 2], [0.1, 0.2]]
    assert "'strict-dynamic'" not in page.meta["Content-Security-Policy"]
    with pytest.raises(ValueError, match="no run folder"):
        compare_runs([tmp_path / "a", tmp_path / "nowhere"], tmp_path / "both.html")


def test_runs_are_compared_by_their_answers_to_the_same_prompts(tmp_path):
    for name, score in (("a", 0.0), ("b", 1.0)):
        for step in (0, 5):
            group = scored_group([f"{name} after {step}"], [score], prompt_id="h/0", prompt="Held <b>?")
            write_step(tmp_path / name, step, [group], folder="evaluations")
        groups = [scored_group([f"{name} poor", f"{name} good"], [0.0, 1.0], prompt="Both?")]
        groups += [scored_group(["alone"], [1.0], prompt_id=name, prompt=f"Only {name}?")]
        write_step(tmp_path / name, 2, groups)
    write_step(tmp_path / "a", 3, [scored_group(["later"], [1.0], prompt="Both?")])
    page = Page(compare_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "both.html").read_text())
    words = " ".join(page.text.split()).partition("The same prompts")[2]
    held = "Held <b>? a, evaluation after step 5 0.0 · 3 tokens a after 5 b, evaluation after step 5 1.0"
    assert words.count("Held <b>?") == 2 and held in words and "after 0" not in words
    # Step 4 of a has no counterpart; of the others the best completion comes first.
    assert "Both? a, step 3 1.0 · 3 tokens a good 0.0 · 3 tokens a poor b, step 3 1.0" in words
    assert "later" not in words and "Only" not in words


def test_a_report_lists_what_changed_while_the_run_went_on(tmp_path):
    row = {"step": 2, "key": "optimizer.lr", "old": 0.001, "new": "<b>0.5"}
    (tmp_path / "changes.jsonl").write_text(json.dumps(row) + "\n{torn")
    words = " ".join(Page(build_report(tmp_path).read_text()).text.split())
    assert (
        "Changed when the run was resumed After step Setting Before From then on 2 optimizer.lr 0.001 <b>0.5"
        in words
    )
    (tmp_path / "changes.jsonl").unlink()
    assert "Changed while" not in Page(build_report(tmp_path).read_text()).text


def test_every_metric_with_data_has_a_curve():
    curves = {name: [[1, 2], [0.5, 0.5]] for name in METRICS}
    evaluations = [{"step": 1, "accuracy": 0.5, "low": 0.4, "high": 0.6}]
    figures, more = build_figures(with_derived(curves, evaluations))
    assert [figure["title"] for figure in figures] == [
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
    assert drawn <= {figure["title"] for figure in more}
    assert build_figures({}) == ([], [])


def test_the_groups_of_a_step_add_up_to_one():
    shares = {"groups/without_spread": 0.75, "groups/all_right": 0.5, "groups/all_wrong": 0.125}
    curves = with_derived({name: [[1], [share]] for name, share in shares.items()}, [])
    (panel,) = build_figures(curves)[0][0]["panels"]
    assert {label: curves[name][1] for label, name in panel["lines"]} == {
        "with spread": [0.25],
        "all wrong": [0.125],
        "all right": [0.5],
        "no verdict": [0.125],
    }
