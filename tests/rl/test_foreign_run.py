"""A report on a run folder that somebody else made: links, pipes, bombs and odd records do no harm."""

import copy
import gzip
import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from recipes.cli import main
from recipes.cli.denoising import denoising_frames
from rl.report.history import MAX_POINTS, read_history
from rl.report.report import build_report
from rl.report.traces import denoising_html, sampled_traces
from rl.store.folder import write_atomically
from rl.store.ledger import Ledger
from rl.store.metrics import METRICS, MetricsLog
from rl.types import Completion, Group, Prompt, Reason, Reward, ScoredGroup, VersionSpan
from tests.calling import trace_of
from tests.report_pages import Page, shelved

ROOT = Path(__file__).parents[2]
LEDGER = "ledger/step-000000-rank0.jsonl.gz"


def scored(name="good", **columns):
    trace = trace_of([0, 1, 2], [], 2, ["a", "b", "c"])
    spans = [VersionSpan(0, 3)]
    completions = [
        Completion([1, 2, 3], [-0.5] * 3, [True] * 3, "stop", spans, name + end, facts={"trace": trace})
        for end in "ab"
    ]
    rewards = [Reward(score, Reason.SCORED, parts={"math": score}) for score in (0.0, 1.0)]
    return ScoredGroup(Group(Prompt(name, "q", (1,), ({"role": "user"},), columns), completions), rewards)


def write_run(run, *groups, step=0):
    MetricsLog(run).write(step + 1, {"reward/mean": 0.5})
    given = [[1.0, -1.0]] * len(groups)
    Ledger(run).write(step, groups, cursor_before=0, cursor_after=1, policy_version=0, advantages=given)
    return run


@pytest.mark.parametrize("name", [".partial-report.html", "report.html", "report.html.new"])
def test_a_report_is_never_written_through_a_link(tmp_path, name):
    victim, run = tmp_path / "victim", write_run(tmp_path / "run", scored())
    victim.write_text("mine")
    (run / name).symlink_to(victim)
    page = build_report(run)
    assert victim.read_text() == "mine"
    assert page.is_file() and not page.is_symlink()
    assert not (run / ".partial-report.html").is_symlink()


@pytest.mark.parametrize("name", ["metrics.jsonl.new", ".partial-metrics.jsonl", "config.yaml.new"])
def test_nothing_else_of_a_run_is_written_through_a_link(tmp_path, name):
    victim, run = tmp_path / "victim", write_run(tmp_path / "run", scored())
    victim.write_text("mine")
    (run / name).symlink_to(victim)
    MetricsLog(run).truncate_after(0)
    write_atomically(run / "config.yaml", "{}")
    assert victim.read_text() == "mine"
    assert not (run / "metrics.jsonl").is_symlink() and not (run / "config.yaml").is_symlink()


def test_a_folder_under_the_name_of_a_half_written_report_does_not_stop_it(tmp_path):
    (tmp_path / ".partial-report.html" / "kept").mkdir(parents=True)
    assert build_report(write_run(tmp_path, scored())).stat().st_size > 10_000
    assert [path.name for path in tmp_path.glob("*partial*")] == [".partial-report.html"]


def cohort(*words, memory_mib=700):
    """What a `cohort` command prints, in so much address space."""
    limit = f"import resource as r; r.setrlimit(r.RLIMIT_AS, ({memory_mib << 20},) * 2); "
    code = limit + "import sys; from recipes.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def bomb(first=b"", piece=b"\0", num_mib=4096):
    """`first` and that much of `piece`, in a thousandth of the bytes: gzip members may follow each other."""
    block = piece * ((32 << 20) // len(piece))
    return gzip.compress(first) + gzip.compress(block) * (num_mib // 32)


HEADER = json.dumps(
    {"schema": 1, "step": 0, "rank": 0, "world_size": 1, "policy_version": 0, "cursor_before": 0}
    | {"cursor_after": 1, "rows": 1, "has_advantages": False, "counts": {}}
).encode()
BOMBS = {
    "no line": bomb(),
    "one line": bomb(HEADER + b"\n", b"[" * 1024),
    "many lines": bomb(HEADER + b"\n", b"{}\n"),
    "rejected": bomb(HEADER + b"\n", b'{"kept":false}\n'),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_four_gibibytes_in_a_few_megabytes_of_gzip_are_not_unpacked(tmp_path, kind):
    write_run(tmp_path, scored("good"), step=1)
    (tmp_path / LEDGER).write_bytes(BOMBS[kind])
    done = cohort("report", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    page = (tmp_path / "report.html").read_text()
    assert "gooda" in page and (kind == "rejected" or "step-000000-rank0.jsonl.gz: " in page)
    assert kind != "one line" or cohort("denoising", tmp_path).returncode == 0


def test_pipes_are_not_waited_for(tmp_path):
    write_run(tmp_path, scored("good"), step=1)
    (tmp_path / "metrics.jsonl").unlink()
    names = ["metrics.jsonl", "evaluation.jsonl", "config.yaml", "result.json", LEDGER]
    for name in names:
        os.mkfifo(tmp_path / name)
    done = cohort("report", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    page = (tmp_path / "report.html").read_text()
    assert "gooda" in page
    for name in names:
        assert f"{Path(name).name}" in page
    assert page.count("ot a regular file") == len(names)
    assert cohort("denoising", tmp_path).returncode == 0
    os.mkfifo(tmp_path / "rows.jsonl")
    assert "no file" in cohort("score", "think_format", tmp_path / "rows.jsonl").stderr


def places(tree, path=()):
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def changed(tree, path, value):
    if not path:
        return value
    tree = copy.deepcopy(tree)
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return tree


ODD = [None, -1, 10**400, 1e308, float("nan"), "x", [], {"a": 1}]


@pytest.mark.parametrize("odd", [*ODD, "deep"], ids=lambda odd: repr(odd)[:12])
def test_a_group_with_an_odd_field_is_left_out_or_shown_and_the_others_stand(tmp_path, odd):
    """Each field of a header and of a group in turn; what is left out is counted and named."""
    write_run(tmp_path, scored("first", answer="4"), scored("good"))
    path = tmp_path / LEDGER
    header, first, second = (json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines())
    left_out = 0
    for place in places(first):
        mark = "MARK" if odd == "deep" else odd
        line = json.dumps(changed(first, place, mark)).replace('"MARK"', "[" * 5000 + "]" * 5000)
        lines = [json.dumps(header), line, json.dumps(second)]
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
        groups, damaged = shelved(tmp_path)
        assert "good" in [group["id"] for group in groups], place
        assert len(groups) + len(damaged) >= 2, place
        left_out += len(damaged)
        assert all("1 of its groups left out (" in sentence for sentence in damaged), damaged
        for _, group, i in sampled_traces(Ledger(tmp_path)):
            denoising_html(group.completions[i])
            denoising_frames(group.completions[i])
    assert left_out > 10
    for place in places(header):
        line = json.dumps(changed(header, place, "x" if odd == "deep" else odd))
        path.write_bytes(gzip.compress("\n".join([line, json.dumps(first), json.dumps(second)]).encode()))
        groups, damaged = shelved(tmp_path)
        assert groups or damaged, place


ODD_LINES = [
    "[" * 100_000,
    '{"step": 2, "a": ' + "[" * 100_000,
    "3",
    '{"step": 1e400}',
    '{"step": true}',
    '{"step": ' + "9" * 4000 + "}",
    '{"step": -1}',
    '{"step": 3, "reward/mean": ' + "9" * 400 + "}",
    '{"step": 4, "reward/mean": 1e308, "policy/kl": -1e308, "nonfinite": 3}',
    '{"step": 5, "reward/mean": {}, "policy/kl": "x", "nonfinite": [1, {}]}',
    '{"step": 6, "reward/mean": true, "low": "a", "high": [], "accuracy": "b", "n": {}}',
    '{"step": 7, "accuracy": 0.5, "low": "a", "high": [], "n": "many"}',
    '{"step": 8, "pad": "' + "x" * (2 << 20) + '"}',
]


def test_odd_lines_of_metrics_and_evaluations_are_left_out_counted_and_named(tmp_path):
    good = '{"step": 9, "reward/mean": 0.25, "accuracy": 0.75, "low": 0.7, "high": 0.8, "n": 100}'
    for name in ("metrics.jsonl", "evaluation.jsonl"):
        (tmp_path / name).write_text("\n".join([*ODD_LINES, good]) + "\n")
    page = build_report(tmp_path).read_text()
    assert "75.0 %" in page and "9 steps" in page
    for name in ("metrics.jsonl", "evaluation.jsonl"):
        assert f"{name}: 2 lines left out (not JSON)" in page
        assert f"{name}: 5 lines left out (without a step)" in page
        assert f"{name}: 1 lines left out (too long)" in page


CONFIGS = [
    "[" * 100_000,
    "train: {steps: 0x" + "f" * 5000 + "}",
    "a: [{2020-01-01: 1}, {? !!binary aGk= : 2}]\nb: !!set {x, y}\nc: 2020-01-01",
    "train: [1]\nmodel: 3\nobjective: {}",
    "x: " + "y" * (1 << 20),
    "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ),
]
RESULTS = ["[" * 100_000, '{"a": ' * 900 + "1" + "}" * 900, '{"seconds": Infinity}', '{"seconds": {}}', "[]"]


@pytest.mark.parametrize(
    ("name", "text"),
    [*(("config.yaml", text) for text in CONFIGS), *(("result.json", text) for text in RESULTS)],
    ids=range(len(CONFIGS) + len(RESULTS)),
)
def test_an_odd_config_or_result_costs_its_own_part_of_the_report(tmp_path, name, text):
    write_run(tmp_path, scored("good"))
    (tmp_path / name).write_text(text)
    assert "gooda" in build_report(tmp_path).read_text()


def test_each_row_is_parsed_once_and_kept_as_eight_bytes_a_number(tmp_path, monkeypatch):
    lines = [json.dumps({"step": s, **dict.fromkeys(METRICS, 0.5)}) for s in range(1, 5001)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    calls, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda text, **kwargs: calls.append(1) or loads(text, **kwargs))
    build_report(tmp_path)
    assert len(calls) == 5000
    history = read_history(tmp_path / "metrics.jsonl")
    assert sum(c.itemsize * len(c) for c in history.columns.values()) == 8 * 5000 * len(METRICS)


def test_a_long_curve_has_500_points_and_keeps_its_peak(tmp_path):
    """50,000 rows: 100 to a point. A value of 9 among zeros is 0.09 on average and stays the greatest."""
    rows = ({"step": s, "policy/kl": 9.0 if s == 31_000 else 0.0} for s in range(1, 50_001))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps, means, least, greatest = read_history(tmp_path / "metrics.jsonl").curves()["policy/kl"]
    assert len(steps) == MAX_POINTS == 500
    assert (steps[309], means[309], least[309], greatest[309]) == (31_000, 0.09, 0.0, 9.0)
    assert Page(build_report(tmp_path).read_text()).curves["policy/kl"][3][309] == 9.0


def test_bars_of_seconds_add_up_to_those_of_a_step_where_a_phase_is_rare(tmp_path):
    """5,000 rows, ten to a point. One of the ten saved for 20 s: 2 s a step, beside 3 s of training."""
    rows = (
        {"step": s, "time/train": 3.0} | ({"time/save": 20.0} if s % 10 == 0 else {}) for s in range(1, 5001)
    )
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = read_history(tmp_path / "metrics.jsonl").curves()
    assert [curves[name][1][7] for name in ("time/train", "time/save")] == [3.0, 2.0]
    assert [part[7] for part in curves["time/save"][2:]] == [0.0, 20.0]  # a band around the mean


def test_of_a_step_only_the_groups_that_are_asked_for_are_read(tmp_path):
    write_run(tmp_path, *[scored(f"p{i}") for i in range(500)])
    assert len(shelved(tmp_path)[0]) == 500
    path = tmp_path / LEDGER
    path.write_bytes(path.read_bytes()[:-100])  # damage that only a reader of the last groups meets
    ledger = Ledger(tmp_path)
    some = islice(ledger.glance(0, 0), 24)
    assert [group.prompt.id for group in some] == [f"p{i}" for i in range(24)] and not ledger.damaged
    assert 24 < len(list(ledger.glance(0, 0))) < 500 and "damaged after" in ledger.damaged[0]


def test_a_reader_may_be_told_of_damage_by_denoising_too(tmp_path, capsys):
    write_run(tmp_path, scored("good"), step=1)
    (tmp_path / LEDGER).write_bytes(b"\x1f\x8b\x08half")
    assert main(["denoising", str(tmp_path)]) == 0
    assert "step-000000-rank0.jsonl.gz: damaged" in capsys.readouterr().err


def test_denoising_tells_of_records_under_another_name_and_of_damage_beside_what_it_shows(tmp_path, capsys):
    write_run(tmp_path, scored("good"), scored("bad"))
    path = tmp_path / LEDGER
    header, first, _ = gzip.decompress(path.read_bytes()).splitlines()
    path.write_bytes(gzip.compress(b"\n".join([header, first, b'{"kept":true}'])))
    write_run(tmp_path, scored("late"), step=5)
    (tmp_path / "ledger/step-000005-rank0.jsonl.gz").rename(tmp_path / "ledger/step-000007-rank0.jsonl.gz")
    assert main(["denoising", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "'good'" in shown.out and "late" not in shown.out
    assert "step-000007-rank0.jsonl.gz: damaged (ValueError: it says step 5 and rank 0)" in shown.err
    assert "step-000000-rank0.jsonl.gz: 1 of its groups left out (" in shown.err


def test_of_a_step_with_many_damaged_records_some_are_opened_for_denoising(tmp_path):
    write_run(tmp_path, scored("good"))
    for rank in range(100):
        (tmp_path / f"ledger/step-000001-rank{rank}.jsonl.gz").write_bytes(b"\x1f\x8b\x08half")
    ledger = Ledger(tmp_path)
    assert {group.prompt.id for _, group, _ in sampled_traces(ledger)} == {"good"}
    assert len(ledger.damaged) == 24


def test_a_record_that_a_running_run_removes_meanwhile_is_not_damaged(tmp_path):
    ledger = Ledger(write_run(tmp_path, scored("good")))
    (tmp_path / LEDGER).unlink()
    assert (list(ledger.glance(0, 0)), ledger.damaged) == ([], [])
