"""A gap between policy and engine that grows is told long before it is out of range; sound runs say
nothing.
"""

import pytest

from rl.report.verdict import Watch, growing_gaps, judge

GAP = "sampler/logprob_gap_mean"
# Mean gaps by step of runs of this library. Sound: dense fp32 on vLLM and on transformers, dense bf16, MoE
# bf16, two diffusion policies, whose estimates of log-probs differ by a draw.
SOUND = {
    "dense fp32, vllm": [1.4e-5, 1.4e-5, 1.2e-5, 1.0e-5, 9.4e-6, 8.5e-6],
    "dense fp32, transformers": [2.9e-7, 4.1e-7, 3.9e-7, 4.1e-7],
    "moe bf16": [0.04] * 6,
    "tiny mixtral bf16 with adapters, vllm": [
        *(0.0225, 0.0142, 0.0163, 0.0192, 0.0193, 0.0305, 0.0246, 0.0167, 0.0263, 0.0325, 0.0257, 0.0161)
    ],
    "JustGRPO": [0.0034, 0.0087, 0.010, 0.011, 0.011, 0.014],
    "TraceRL": [0.0091, 0.011, 0.0072, 0.0071, 0.0089, 0.0063],
}
# First step, last step, number of steps: experts left out of every sync, bf16; an adapter whose delta is not
# sent, in fp32 at lr 1e-4 and in bf16 at lr 1e-3. Between the two ends the test draws a line.
FAULTY = {
    "stale experts": (
        0.046,
        0.227,
        4,
        3,
    ),  # 0.046 0.106 0.167 0.227: above 2.5 x 0.046 = 0.115 from step 3 on
    "unsent adapter fp32": (1e-6, 0.013, 12, 4),  # 0.0012 a step: above 0.003 from step 4 on
    "unsent adapter bf16": (0.03, 0.68, 12, 3),  # 0.059 a step: above 0.075 from step 3 on
}


def rows(gaps, **more):
    return [{"step": step, GAP: gap, **more} for step, gap in enumerate(gaps, 1)]


@pytest.mark.parametrize("name", SOUND)
def test_sound_runs_say_nothing(name):
    assert growing_gaps(rows(SOUND[name])) == []


@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_is_told_with_its_first_step_and_both_numbers(name):
    first, last, number, since = FAULTY[name]
    gaps = [first + (last - first) * k / (number - 1) for k in range(number)]
    (finding,) = growing_gaps(rows(gaps))
    assert (finding.level, finding.metric, finding.since) == ("Warning", GAP, since)
    assert f"has grown from {first:.2g} to {last:.2g}" in finding.text
    assert judge(rows(gaps)).headline.startswith(("Warning", "Broken"))


def test_a_single_step_and_samples_of_an_older_policy_are_not_growth():
    assert growing_gaps(rows([0.04, 0.04, 0.3])) == []
    assert growing_gaps([*rows([1e-6, 1e-6]), *rows([0.05] * 6, **{"staleness/max": 2.0})[2:]]) == []


def test_a_run_is_told_of_growth_however_long_it_has_run():
    """The first steps have left the latest rows by then."""
    watch = Watch()
    for step in range(1, 1001):
        assert watch.broken(step, {GAP: 1e-5}) == []
    watch.broken(1001, {GAP: 0.01})
    (finding,) = watch.broken(1002, {GAP: 0.01})
    assert str(finding).startswith(f"{GAP} has grown from 1e-05 to 0.01") and finding.since == 1001


def test_a_canary_that_grows_is_told_too():
    gaps = [0.02, 0.03, 0.08, 0.115]
    (finding,) = growing_gaps([{"step": s, "sync/canary_gap_mean": g} for s, g in enumerate(gaps, 1)])
    assert (finding.metric, finding.since) == ("sync/canary_gap_mean", 3)
