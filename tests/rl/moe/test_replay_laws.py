"""Law 1 with routes: the gradient does not depend on how the work is cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.diffusion.processes import launch
from tests.invariants import two_processes
from tests.invariants.drawn_episodes import episodes
from tests.rl.moe.tiny import batches, load, random_routes, routed, save
from tests.scoring import prepared, relative_error


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_dir):
    return save("qwen3_moe", tmp_path_factory.mktemp("moe"), tiny_model_dir)


@pytest.fixture(scope="module")
def given(folder, ragged_groups):
    """Eight groups whose completions carry experts that no router chose, and the gradient of one cut."""
    policy, _ = load(folder)
    groups, advantages = ragged_groups(num_groups=8)
    return routed(groups, lambda p, ids, n: random_routes(policy, len(ids), n)), advantages


@pytest.fixture(scope="module")
def expected(folder, given, gradients):
    policy, config = load(folder, "train.token_budget=100000")
    assert len(batches(policy, config, *given)) == 1
    found = gradients(policy, config, *given)
    live = gradients(load(folder, "moe.replay=none")[0], config, *given)
    assert relative_error(found, live) > 0.1
    return found


@pytest.mark.parametrize(
    ("least", "options"),
    [
        (3, ["train.token_budget=120"]),
        (7, ["train.token_budget=60"]),
        (20, ["train.token_budget=16"]),
        (4, ["train.token_budget=120", "model.attention=rows"]),
        (1, ["train.token_budget=100000", "model.attention=rows", "model.gradient_checkpointing=true"]),
        (7, ["train.token_budget=60", "model.gradient_checkpointing=true"]),
    ],
)
def test_gradient_does_not_depend_on_the_cut(least, options, folder, given, expected, gradients):
    policy, config = load(folder, *options)
    groups, advantages = given
    assert len(batches(policy, config, groups, advantages)) >= least
    found = gradients(policy, config, groups[::-1], advantages[::-1])
    assert relative_error(found, expected) <= 1e-5


def test_rows_that_share_a_groups_prompt_or_branch_are_replayed_as_rows_alone(folder, gradients):
    """Also the share of replayed tokens, and a balance loss: what rows have of their own prompts counts."""
    policy, _ = load(folder)
    groups, advantages = episodes(12)
    for number, completion in enumerate(row for g in groups for c in g.completions for row in c.rows):
        completion.routes = random_routes(policy, len(completion.token_ids), number)
    found = {}
    for attention in ("auto", "rows"):
        options = ["moe.balance=switch", "moe.balance_coef=1.0", f"model.attention={attention}"]
        policy, config = load(folder, *options, "train.token_budget=100000")
        cut = batches(policy, config, groups, advantages)
        assert any(block.branches for m in cut for block in m.blocks) == (attention == "auto")
        sums = [policy.score(prepared(policy, m)).metrics["moe/replayed"] for m in cut]
        found[attention] = gradients(policy, config, groups, advantages), torch.tensor(sums).sum(0).tolist()
    assert relative_error(found["auto"][0], found["rows"][0]) <= 1e-5
    assert found["auto"][1] == found["rows"][1] and 0 < found["auto"][1][0] < found["auto"][1][1]


@pytest.mark.rotation
def test_gradient_does_not_depend_on_the_number_of_processes(folder, given, tmp_path):
    rows = [
        [
            list(g.prompt.token_ids),
            [[c.token_ids, c.behavior_logprobs, c.routes.tolist()] for c in g.completions],
            a,
        ]
        for g, a in zip(*given, strict=True)
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    arguments = [str(folder), str(tmp_path / "data.json"), str(tmp_path), "grpo"]
    two_processes.main(*arguments)
    launch(Path(two_processes.__file__), arguments, 2)
    two_processes.compare(tmp_path, "grpo")
    metrics = json.loads((tmp_path / "grpo-rank0of1.json").read_text())
    assert metrics["moe/flip_rate"] > 0.9 and 0.6 < metrics["moe/replayed"] < 0.9
