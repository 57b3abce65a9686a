"""Law 1 with routes: the gradient does not depend on how the work is cut."""

from __future__ import annotations

import json

import pytest

from tests.diffusion.processes import launch
from tests.invariants.test_gradient_laws import relative_error
from tests.invariants.test_processes import SCRIPT, compare
from tests.invariants.two_processes import main
from tests.rl.moe.test_replay import batches, routed
from tests.rl.moe.tiny import load, random_routes, save


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
    main(*arguments)
    launch(SCRIPT, arguments, 2)
    compare(tmp_path, "grpo")
    metrics = json.loads((tmp_path / "grpo-rank0of1.json").read_text())
    assert metrics["moe/flip_rate"] > 0.9 and 0.6 < metrics["moe/replayed"] < 0.9
