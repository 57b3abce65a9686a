"""Laws 1 and 2 over processes: two gloo ranks step along the gradient of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.diffusion.processes import launch
from tests.invariants import two_processes
from tests.invariants.two_processes import compare


def test_gradient_does_not_depend_on_the_number_of_processes(tiny_model_dir, ragged_groups, tmp_path):
    """The second rank holds longer completions and, in its first half, only rows without signal."""
    groups, advantages = ragged_groups(num_groups=6)
    advantages[1] = [0.0] * len(advantages[1])
    run_both(tiny_model_dir, groups, advantages, tmp_path, "grpo,dapo")
    for loss in ("grpo", "dapo"):
        compare(tmp_path, loss)


def test_nor_on_who_trains_what_another_has_sampled(tiny_model_dir, ragged_groups, tmp_path):
    """The second rank has sampled the long ones, and the first trains some of them."""
    short, of_short = ragged_groups(num_groups=4, max_length=5)
    long, of_long = ragged_groups(num_groups=4, seed=1)
    dealt = (
        [x for pair in zip(*both, strict=True) for x in pair] for both in ((short, long), (of_short, of_long))
    )
    run_both(tiny_model_dir, *dealt, tmp_path, "grpo", "train.deterministic=false")
    found = [json.loads((tmp_path / f"grpo-rank{rank}of2.json").read_text())["facts"] for rank in (0, 1)]
    assert [set(of_rank["owners"]) for of_rank in found] == [{0}, {0, 1}]
    before, after = ([of_rank[key] for of_rank in found] for key in ("before", "load"))
    assert before[1] > 1.3 * before[0] and sum(after) == pytest.approx(sum(before))
    assert max(after) < 0.9 * max(before)
    compare(tmp_path, "grpo")


@pytest.mark.parametrize("divergence", ["sampled", "reverse"])
def test_nor_does_that_of_a_teacher(tiny_model_dir, other_model_dir, ragged_groups, tmp_path, divergence):
    """No group has an advantage of rewards, and all are trained on."""
    groups, advantages = ragged_groups(num_groups=6)
    zeros = [[0.0] * len(row) for row in advantages]
    teacher = f"teacher={{name: {other_model_dir}, dtype: fp32, divergence: {divergence}, top_k: 5}}"
    run_both(tiny_model_dir, groups, zeros, tmp_path, "grpo", teacher)
    compare(tmp_path, "grpo")
    metrics = json.loads((tmp_path / "grpo-rank0of2.json").read_text())
    assert metrics["teacher/kl"] != 0.0


def run_both(model: Path, groups: list, advantages: list, folder: Path, losses: str, *overrides: str) -> None:
    rows = [
        [list(g.prompt.token_ids), [[c.token_ids, c.behavior_logprobs] for c in g.completions], a]
        for g, a in zip(groups, advantages, strict=True)
    ]
    (folder / "data.json").write_text(json.dumps(rows))
    arguments = [str(model), str(folder / "data.json"), str(folder), losses, *overrides]
    two_processes.main(*arguments)
    launch(Path(two_processes.__file__), arguments, 2)
