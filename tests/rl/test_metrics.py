"""Metrics: names, rows that never lie about missing numbers, verdicts, trackers that cannot stop a run."""

import json
import math
import os
import subprocess
import sys

import pytest

from rl.report.report import build_report
from rl.report.trackers import Trackers
from rl.report.verdict import Watch, judge, judge_run, range_text
from rl.store.metrics import METRICS, Metric, MetricsLog, metric_of, show_seconds, show_value, wilson_interval
from rl.store.redact import redact, show_controls, strip_controls


def test_wilson_interval_by_hand():
    # z^2 = 3.8414588. 8 of 10: centre = (0.8 + z^2/20) / (1 + z^2/10) = 0.9920729 / 1.3841459 = 0.7167401;
    # half = 1.959964 sqrt(0.016 + z^2/400) / 1.3841459 = 1.959964 * 0.1600114 / 1.3841459 = 0.2265769.
    assert wilson_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    # 0 of 10: low is 0, high = z^2 / (10 + z^2) = 3.8414588 / 13.8414588.
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-6)
    # 10 of 10 mirrors it.
    assert wilson_interval(10, 10) == pytest.approx((0.7224672, 1.0), abs=1e-6)
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("successes, n", [(-1, 10), (11, 10), (0, -1)])
def test_wilson_interval_rejects_impossible_counts(successes, n):
    with pytest.raises(AssertionError, match=f"{successes} successes of {n}"):
        wilson_interval(successes, n)


def test_healthy_range_lies_inside_the_range_that_is_not_broken():
    for metric in METRICS.values():
        bounds = [metric.broken_below, metric.low, metric.high, metric.broken_above]
        known = [bound for bound in bounds if math.isfinite(bound)]
        assert known == sorted(known), metric.name
        assert bool(known) == bool(metric.hint), f"{metric.name} needs a hint exactly if it has a range"


def test_misspelt_metric_is_an_error_that_names_the_right_one(tmp_path):
    with pytest.raises(ValueError, match=r"unknown metric 'policy/entrpy'; did you mean policy/entropy"):
        MetricsLog(tmp_path).write(1, {"policy/entrpy": 1.0})
    assert not (tmp_path / "metrics.jsonl").exists()


OWN = Metric("mixture/balance", "loss", "how evenly experts are used")


def test_a_metric_of_the_runs_own_is_written_and_a_misspelt_one_is_still_an_error(tmp_path):
    log = MetricsLog(tmp_path, [OWN])
    log.write(1, {"mixture/balance": 0.25, "reward/mean": 0.5})
    assert log.read() == [{"step": 1, "mixture/balance": 0.25, "reward/mean": 0.5}]
    with pytest.raises(ValueError, match="unknown metric 'mixture/balanse'; did you mean mixture/balance"):
        log.write(2, {"mixture/balanse": 0.25})
    with pytest.raises(ValueError, match="unknown metric 'mixture/balance'"):
        MetricsLog(tmp_path).write(2, {"mixture/balance": 0.25})


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["policy/kl"], "'policy/kl' is defined already; give it another name"),
        (["a/b", "a/b"], "'a/b' is defined already"),
        (["balance"], "'balance' must be section/name, such as mixture/balance"),
        (["a/\x1b"], "must be section/name"),
        (["reward/x"], "must be section/name"),
    ],
)
def test_a_name_that_is_taken_or_is_no_name_is_refused_for_a_metric_of_the_runs_own(tmp_path, names, reason):
    with pytest.raises(ValueError, match=reason):
        MetricsLog(tmp_path, [Metric(name, "", "") for name in names])


def test_a_metric_that_only_the_run_knows_is_shown_plainly(tmp_path):
    log = MetricsLog(tmp_path, [OWN])
    for step in (1, 2, 3):
        log.write(step, {"mixture/balance": 0.25 * step, "reward/mean": 0.5})
    assert show_value("mixture/balance", 12345.678) == "1.235e+04"
    page = build_report(tmp_path).read_text()
    assert page.count("mixture/balance") >= 1
    assert judge(log.read()).level == "Too early" and not judge(log.read()).findings


def test_parts_of_a_reward_need_no_definition():
    metric = metric_of("reward/my.module:fn/mean")
    assert (metric.unit, metric.description) == ("score", "mean of the reward part my.module:fn")


def test_rows_are_lines_of_json_on_disk_at_once(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(1, {"reward/mean": 0.5, "reward/math/mean": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "reward/mean": 0.5, "reward/math/mean": 1.0}\n'
    )


def test_nonfinite_values_are_null_and_named_never_zero(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(1, {"policy/loss": float("nan"), "policy/grad_norm": float("inf"), "reward/mean": 0.0})
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row == {
        "step": 1,
        "policy/loss": None,
        "policy/grad_norm": None,
        "reward/mean": 0.0,
        "nonfinite": ["policy/loss", "policy/grad_norm"],
    }


def test_a_step_is_never_written_twice(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(4, {})
    for writer in (log, MetricsLog(tmp_path)):
        with pytest.raises(AssertionError, match="step 4 come after those of step 4"):
            writer.write(4, {})


def test_resume_leaves_neither_gaps_nor_doubles(tmp_path):
    log = MetricsLog(tmp_path)
    for step in range(1, 6):
        log.write(step, {"reward/mean": step})
    resumed = MetricsLog(tmp_path)
    assert resumed.truncate_after(3) == 2
    for step in (4, 5, 6):
        resumed.write(step, {"reward/mean": 10 * step})
    assert [(row["step"], row["reward/mean"]) for row in resumed.read()] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
        (5, 50.0),
        (6, 60.0),
    ]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_torn_last_line_is_left_out_and_never_glued_to_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "reward/mean": 0.5}\n{"step": 2, "reward/me')
    log = MetricsLog(tmp_path)
    assert [row["step"] for row in log.read()] == [1]
    log.write(2, {"reward/mean": 0.75})
    assert path.read_text() == '{"step": 1, "reward/mean": 0.5}\n{"step": 2, "reward/mean": 0.75}\n'


def test_truncating_a_run_without_rows_is_fine(tmp_path):
    assert MetricsLog(tmp_path).truncate_after(0) == 0
    assert MetricsLog(tmp_path).read() == []


@pytest.mark.parametrize(
    "name, value, text",
    [
        ("groups/all_right", 0.125, "12.5 %"),
        ("time/step", 200.0, "3 min 20 s"),
        ("tokens/per_second", 5310.2, "5,310"),
        ("policy/kl", 0.0021234, "0.002123"),
        ("policy/loss", float("nan"), "not finite"),
    ],
)
def test_values_are_shown_in_their_unit(name, value, text):
    assert show_value(name, value) == text


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.42, "0.42 s"),
        (12.4, "12 s"),
        (60, "1 min"),
        (3599.7, "1 h"),
        (7500, "2 h 5 min"),
        (273600, "3 d 4 h"),
    ],
)
def test_durations_have_two_units(seconds, text):
    assert show_seconds(seconds) == text


HEALTHY_ROWS = [
    {"step": s, "policy/entropy": 0.3, "policy/kl": 0.01, "groups/without_spread": 0.2} for s in range(1, 8)
]


def test_a_run_inside_every_range_is_healthy():
    assert judge(HEALTHY_ROWS).headline == "Healthy: every number is inside its range"
    early = (
        "Too early: 4 of the 5 steps (train.steps) that rules wait for; no number is out of its range so far"
    )
    assert judge(HEALTHY_ROWS[:4]).headline == early and judge(HEALTHY_ROWS[:4]).level == "Too early"
    assert judge(HEALTHY_ROWS[:5]).headline.endswith("range")
    assert judge([]).headline == "No data: no step is recorded yet"


def test_a_short_run_in_which_all_rewards_abstained_blames_the_grader_and_not_the_prompts():
    rows = [{"step": n, "groups/without_spread": 1.0, "reward/abstained": 1.0} for n in (1, 2)]
    (finding,) = judge(rows).findings
    assert judge(rows).headline == "Warning: no completion got a reward in any step (2), since step 1"
    assert "graders time out, crash, return None" in finding.hint
    assert judge([rows[0], rows[1] | {"reward/abstained": 0.9}]).findings[0].metric == "groups/without_spread"


def test_a_short_run_without_spread_has_taught_nothing():
    def shares(*values):
        return [{"step": s, "groups/without_spread": v} for s, v in enumerate(values, start=1)]

    verdict = judge(shares(1.0, 1.0))
    said = "Warning: all rewards of every group were equal in all steps (2), so they taught nothing"
    assert verdict.headline == f"{said}, since step 1" and verdict.findings[0].hint.startswith(
        "all right: harder prompts;"
    )
    assert judge(shares(1.0, 0.875)).level == "Too early"
    assert [f.level for f in judge(shares(*[1.0] * 5)).findings] == ["Broken"]  # the metric's own rule


def test_a_range_fires_after_its_patience_with_the_first_step_of_the_stretch():
    def entropies(values):
        return [{"step": s, "policy/entropy": v} for s, v in enumerate(values, start=1)]

    assert judge(entropies([0.3, 0.3, 0.01, 0.01, 0.01, 0.01])).level == "Healthy"
    verdict = judge(entropies([0.3, 0.3, 0.01, 0.01, 0.01, 0.01, 0.01]))
    assert verdict.headline == "Warning: policy/entropy is 0.01, healthy is 0.02 to 2.5, since step 3"
    assert judge(entropies([0.3, *[0.0005] * 5])).level == "Broken"
    # The stretch counts from its own beginning, not from an earlier one that healed.
    healed = judge(entropies([0.01] * 6 + [0.3] + [0.01] * 5))
    assert (healed.level, healed.findings[0].since) == ("Warning", 8)


def test_one_bad_canary_is_enough():
    verdict = judge([*HEALTHY_ROWS, {"step": 8, "sync/canary_gap_mean": 3.0}])
    assert (verdict.level, verdict.findings[0].metric, verdict.findings[0].since) == (
        "Broken",
        "sync/canary_gap_mean",
        8,
    )


def test_a_gap_to_the_engine_is_told_in_the_first_step():
    """0.44 nats is a sampler that computes differently: not broken yet, but not worth waiting for."""
    assert Watch().broken(1, {"sampler/logprob_gap_mean": 0.05}) == []
    (finding,) = Watch().broken(1, {"sampler/logprob_gap_mean": 0.44, "policy/kl": 0.9})
    assert (finding.level, finding.metric, finding.since) == ("Warning", "sampler/logprob_gap_mean", 1)
    assert "engine.name=transformers" in finding.hint


def test_groups_without_any_spread_break_a_run():
    verdict = judge([{"step": s, "groups/without_spread": 1.0} for s in range(1, 6)])
    assert verdict.level == "Broken"
    assert "dynamic_sampling" in verdict.findings[0].hint


def test_a_nonfinite_loss_is_broken_now_and_a_warning_later():
    nan = {"step": 8, "policy/loss": None, "nonfinite": ["policy/loss"]}
    assert judge([*HEALTHY_ROWS, nan]).headline == (
        "Broken: policy/loss not finite in 1 of the last 8 steps, since step 8"
    )
    assert judge([*HEALTHY_ROWS, nan, {"step": 9, "policy/loss": 0.1}]).level == "Warning"
    assert judge([nan, *({"step": 8 + k, "policy/loss": 0.1} for k in range(1, 21))]).level == "Healthy"


def test_a_run_is_told_of_what_overflows_while_it_runs_as_its_report_is_later(tmp_path):
    watch, log = Watch(), MetricsLog(tmp_path)
    for step in range(1, 4):
        log.write(step, values := {"reward/std": 0.4, "sampler/mismatch_kl": math.inf})
        (finding,) = watch.broken(step, values)
    assert str(finding).startswith("sampler/mismatch_kl not finite in 3 of the last 3 steps, since step 1")
    assert watch.verdict.headline == judge_run(tmp_path).headline


def test_a_held_out_interval_below_the_first_breaks_a_run():
    def at(step, low, high):
        return {"step": step, "accuracy": (low + high) / 2, "low": low, "high": high, "n": 100}

    assert judge(HEALTHY_ROWS, [at(0, 0.4, 0.5), at(10, 0.3, 0.41)]).level == "Healthy"
    verdict = judge(HEALTHY_ROWS, [at(0, 0.4, 0.5), at(10, 0.3, 0.41), at(20, 0.2, 0.3), at(30, 0.1, 0.2)])
    assert (verdict.level, verdict.findings[0].since) == ("Broken", 20)


def test_the_worst_finding_comes_first():
    rows = [{"step": s, "policy/kl": 0.9, "sampler/logprob_gap_mean": 2.0} for s in range(1, 6)]
    assert [(f.level, f.metric) for f in judge(rows).findings] == [
        ("Broken", "sampler/logprob_gap_mean"),
        ("Warning", "policy/kl"),
    ]


def test_ranges_read_as_words():
    assert range_text(Metric("a", "", "", low=0.5, high=2)) == "0.5 to 2"
    assert range_text(Metric("a", "", "", high=0.3)) == "at most 0.3"
    assert range_text(Metric("a", "", "", low=0.3)) == "at least 0.3"
    assert range_text(Metric("a", "", "")) == ""


def test_tensorboard_gets_finite_values_and_no_secrets(tmp_path, monkeypatch):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("SOME_API_KEY", "canary-secret-value")
    warnings = []
    config = {
        "train": {"steps": 3, "token_budget": 64},
        "hub_token": "t0p",
        "data": {"source": "canary-secret-value"},
    }
    trackers = Trackers(["tensorboard"], run_dir=tmp_path, config=config, warn=warnings.append)
    trackers.log(7, {"reward/mean": 0.25, "policy/loss": float("nan")})
    trackers.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(7, 0.25)]
    assert events.Tags()["scalars"] == ["reward/mean"]
    everything = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"token_budget" in everything and b"***" in everything
    assert b"canary-secret-value" not in everything and b"t0p" not in everything
    assert warnings == []


def test_a_tracker_that_fails_at_start_is_reported_once_and_dropped(tmp_path):
    (tmp_path / "run").write_text("a file where the tracker wants a folder")
    warnings = []
    trackers = Trackers(
        ["tensorboard", "nonesuch"], run_dir=tmp_path / "run", config={}, warn=warnings.append
    )
    assert not trackers.active
    for step in range(3):
        trackers.log(step, {"reward/mean": 1.0})
    trackers.close()
    assert len(warnings) == 2
    assert (
        "tracker tensorboard did not start" in warnings[0] and "metrics.jsonl is still written" in warnings[0]
    )
    assert "accelerate has no tracker 'nonesuch'" in warnings[1]


def test_a_missing_tracker_package_names_the_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # `import wandb` raises ModuleNotFoundError
    warnings = []
    Trackers(["wandb"], run_dir=tmp_path, config={}, warn=warnings.append)
    assert len(warnings) == 1 and 'pip install "cohort-rl[wandb]"' in warnings[0]


def test_a_tracker_that_fails_while_logging_is_reported_once_and_dropped(tmp_path):
    pytest.importorskip("tensorboard")
    warnings = []
    trackers = Trackers(["tensorboard"], run_dir=tmp_path, config={}, warn=warnings.append)
    trackers.active["tensorboard"].writer = None  # what a tracker that lost its backend looks like
    for step in range(3):
        trackers.log(step, {"reward/mean": 1.0})
    assert len(warnings) == 1 and "tracker tensorboard failed" in warnings[0]
    assert not trackers.active


def test_secrets_are_hidden_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("MY_SECRET", "swordfish-1234")
    tree = {
        "hf_token": "abc",
        "token_budget": 8192,
        "stop_token_ids": [1, 2],
        "url": "https://me:pass@host/path",
        "nested": [{"api_key": "x"}, "says swordfish-1234 aloud", "hf_abcdefghijklmnopqrstuv"],
    }
    assert redact(tree) == {
        "hf_token": "***",
        "token_budget": 8192,
        "stop_token_ids": [1, 2],
        "url": "https://***@host/path",
        "nested": [{"api_key": "***"}, "says *** aloud", "***"],
    }


def test_controls_are_stripped_for_terminals_and_shown_in_reports():
    hostile = "a\x1b[31mb\x1b]0;title\x07c\x9b1md\u202ee\u200bf\rg\x00h\udc80i\n\tj"
    assert strip_controls(hostile) == "abcdefghi\n\tj"
    assert show_controls("a\x1b[31m\u202e\r\udc80\x7f\n") == "a⟨U+001B⟩[31m⟨U+202E⟩⟨U+000D⟩⟨U+DC80⟩⟨U+007F⟩\n"


def test_metrics_cost_no_torch():
    names = "rl.store.metrics, rl.report.verdict, rl.report.trackers, rl.report.display"
    code = f"import sys, {names}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n", done.stderr
