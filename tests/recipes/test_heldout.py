"""Evaluation during a run: it leaves training as it is; and a control arm says what it is."""

from __future__ import annotations

import json
from itertools import product
from statistics import fmean

import pytest
from safetensors.torch import load_file

from recipes.grpo import main
from rl.store.folder import evaluation_log
from rl.store.ledger import Ledger
from rl.store.rows import read_rows

MATH = "rewards.functions=[{name: 'toy_rewards:low_words'}, {name: math}]"


def trained_on(run) -> list:
    """What the ledger holds of each step, without the time that graders took."""
    return [
        (
            step.step,
            step.cursor_after,
            step.advantages,
            group.prompt,
            group.completions,
            reward.score,
            reward.parts,
        )
        for step in Ledger(run).sample(99)
        for group in step.groups
        for reward in group.rewards
    ]


def test_evaluating_every_step_with_several_samples_leaves_training_as_it_is(config_file, heldout):
    folder, sampled = config_file.parent, ["evaluation.num_samples=3", "evaluation.sampling.temperature=1.0"]
    often = [*heldout, *sampled, "evaluation.every=1", f"run_dir={folder / 'often'}", "train.steps=3"]
    held = ["evaluation.data=null", f"run_dir={folder / 'never'}", "train.steps=3"]
    assert main([str(config_file), *often]) == 0
    # The prompt that is held out is left out of the rows, so that both runs draw from the same ones.
    rows = [row for i, row in enumerate((folder / "train.jsonl").read_text().splitlines()) if i != 3]
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
    assert main([str(config_file), *held]) == 0
    found = [
        [(*row[:3], row[3].token_ids, *row[4:]) for row in trained_on(folder / n)] for n in ("often", "never")
    ]
    assert len(found[0]) == 3 * 2 * 4 and found[0] == found[1]
    weights = [
        load_file(folder / n / "checkpoints/step-000003/model.safetensors") for n in ("often", "never")
    ]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    rows = read_rows(folder / "often" / "evaluation.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(
        0 <= row["truncated"] <= 1 and row["abstained"] == 0 and row["mean_tokens"] > 0 for row in rows
    )


def test_the_gain_since_step_0_is_that_of_a_paired_test_of_the_kept_rewards(config_file, heldout, capsys):
    run, sampled = (
        config_file.parent / "run",
        ["evaluation.num_samples=4", "evaluation.sampling.temperature=1.0"],
    )
    settings = [
        *heldout,
        *sampled,
        "train.steps=2",
        "optimizer.lr=0.05",
        f"run_dir={run}",
        "evaluation.every=1",
    ]
    assert main([str(config_file), *settings]) == 0
    means = [
        {g.prompt.id: fmean(r.score for r in g.rewards) for g in step.groups}
        for step in Ledger(run, folder="evaluations").sample(9)
    ]
    assert (
        means[0].keys() == means[2].keys() and means[0] != means[2] and means[1] not in (means[0], means[2])
    )
    gains = [means[2][key] - means[0][key] for key in means[0]]
    row = read_rows(run / "evaluation.jsonl")[-1]
    assert (row["gain"], row["paired"]) == (pytest.approx(fmean(gains)), len(gains))
    moved = [g for g in gains if g]
    signs = [
        abs(sum(s * g for s, g in zip(way, moved, strict=True)))
        for way in product((-1, 1), repeat=len(moved))
    ]
    assert row["gain_p"] == pytest.approx(fmean(s >= abs(sum(moved)) - 1e-9 for s in signs))
    assert f"{row['gain']:+.1%} since step 0" in capsys.readouterr().out


def test_an_evaluation_recorded_without_shares_is_read(tmp_path):
    (tmp_path / "evaluation.jsonl").write_text(
        '{"step": 0, "accuracy": 0.5, "low": 0.2, "high": 0.8, "n": 8}\n'
    )
    (found,) = evaluation_log(tmp_path).read().values()
    assert (found.accuracy, found.n, found.truncated) == (0.5, 8, 0.0)


@pytest.mark.parametrize("arm", ["random", "format"])
def test_a_control_arm_says_what_it_is_and_is_measured_by_the_real_reward(config_file, heldout, capsys, arm):
    overrides = [MATH, "evaluation.metric=math", f"rewards.control={arm}", *heldout[:1], heldout[2]]
    assert main([str(config_file), *overrides]) == 0
    run, out = config_file.parent / "run", capsys.readouterr().out
    assert f"warning: control arm: rewards.control={arm} ignores right answers" in out
    assert f"verdict: Control arm ({arm} reward). " in out
    result = json.loads((run / "result.json").read_text())
    assert result["control"] == arm and result["verdict"].startswith(f"Control arm ({arm} reward). ")
    assert f"Control arm ({arm} reward). " in (run / "report.html").read_text()
    rows = read_rows(run / "metrics.jsonl")
    paid = f"reward/{arm}_control/mean"
    assert all(row["reward/mean"] == pytest.approx(row[paid]) for row in rows)
    assert all("reward/math/mean" in row and "reward/toy_rewards:low_words/mean" in row for row in rows)
    held = [g for step in Ledger(run, folder="evaluations").sample(9) for g in step.groups]
    right = [reward.parts["math"] for group in held for reward in group.rewards]
    assert result["heldout_after"] == pytest.approx(sum(right[len(right) // 2 :]) / 4)


@pytest.mark.parametrize("arm", ["none", "random"])
def test_a_share_that_was_not_graded_stands_beside_the_held_out_number(config_file, heldout, capsys, arm):
    """The logged grader abstains on one of the four held-out prompts, whose answer is w70."""
    module = config_file.parent / "abstaining.py"
    module.write_text(
        "def but_one(completions, answer, **columns):\n"
        "    return [None if a == 'w70' else 1.0 for a in answer]\n"
    )
    words = ["rewards.functions=[{name: 'abstaining:but_one'}]", "evaluation.metric=abstaining:but_one"]
    words += [heldout[0], heldout[2], f"rewards.control={arm}", "train.steps=1"]
    assert main([str(config_file), *words]) == 0
    out = capsys.readouterr().out
    assert "held-out after: 100.0% right (95 % interval 43.9% to 100.0%, n = 3; 25.0% not graded" in out
    result = json.loads((config_file.parent / "run" / "result.json").read_text())
    assert result["heldout_after_abstained"] == 0.25


def test_a_held_out_number_of_cut_completions_says_so_once(config_file, heldout, capsys):
    """The evaluation has a length of its own, 256 by default, whatever that of training."""
    words = [*heldout, "evaluation.sampling.max_completion_length=1", "train.steps=1"]
    assert main([str(config_file), *words]) == 0
    out, rows = capsys.readouterr().out, read_rows(config_file.parent / "run" / "evaluation.jsonl")
    assert len(rows) == 2 and min(row["truncated"] for row in rows) >= 0.25
    said = "of the held-out completions were cut, so mostly wrong: raise "
    assert out.count(f"{said}evaluation.sampling.max_completion_length=1") == 1
    assert f"; {rows[1]['truncated']:.1%} of the completions were cut" in out.partition("held-out after")[2]


def test_a_control_arm_whose_real_reward_fails_is_stopped(config_file, heldout, capsys):
    """The real reward has no weight there, so its faults leave no gap among the rewards that are paid."""
    (config_file.parent / "failing.py").write_text(
        "def fails(completions, **columns):\n    raise OSError('gone')\n"
    )
    words = [
        "rewards.functions=[{name: 'failing:fails'}]",
        "evaluation.metric=failing:fails",
        "train.steps=1",
    ]
    assert main([str(config_file), *words, heldout[0], heldout[2], "rewards.control=random"]) == 1
    error = capsys.readouterr().err
    assert "graders failed on 4 of 4 held-out completions" in error
    assert "so that the arm cannot be measured: " in error and "OSError: gone" in error
    assert not (config_file.parent / "run" / "graders.log").exists()  # it has what rewards print
