"""Mixtures whose rows cannot be packed are computed in padded batches; routers' sums leave padding out."""

from __future__ import annotations

import pytest
import torch

from rl.batch import pack
from rl.update import pack_rules, update_policy
from tests.invariants.drawn_episodes import episodes
from tests.rl.moe.tiny import batches, load, random_routes, save
from tests.scoring import alone, prepared, relative_error

BALANCED = ["moe.balance_coef=1.0", "moe.z_loss_coef=0.01"]
FAMILIES = [
    "granitemoehybrid",
    *(pytest.param(n, marks=pytest.mark.rotation) for n in ("qwen3_next", "lfm2_moe")),
]


def with_routes(policy):
    """Episodes of several rows; experts that no router chose are replayed."""
    groups, advantages = episodes(12)
    for number, completion in enumerate(row for g in groups for c in g.completions for row in c.rows):
        completion.routes = random_routes(policy, len(completion.token_ids), number)
    return groups, advantages


@pytest.mark.parametrize(
    ("kind", "checkpointing"), [("switch", "true"), ("sequence", "false"), ("entropy", "true")]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_and_metrics_are_those_of_one_sequence_at_a_time(
    name, checkpointing, kind, tiny_model_dir, tmp_path, gradients
):
    options = [f"moe.balance={kind}", *BALANCED, f"model.gradient_checkpointing={checkpointing}"]
    policy, config = load(save(name, tmp_path, tiny_model_dir), *options, "train.token_budget=120")
    assert policy.inner.scorer.padded and policy.replays
    groups, advantages = with_routes(policy)
    optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.0)
    found, metrics = [], []
    for padded in (True, False):
        policy.inner.scorer.padded = padded
        found.append(gradients(policy, config, groups, advantages))
        rules = pack_rules(config, share_prompts=policy.shares_prompts)
        result = update_policy(
            policy, optimizer, pack(groups, advantages, rules), config.loss, world=alone(policy)
        )
        metrics.append({n: v for n, v in result.metrics.items() if n.startswith(("moe/", "policy/"))})
    assert relative_error(*found) <= 1e-5  # law 1; a scan of Mamba rounds by up to 1e-6
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5, abs=1e-6)
    assert abs(metrics[0]["moe/balance"]) > 0.5 and 0.1 < metrics[0]["moe/replayed"] < 1


def test_a_router_counts_every_token_once_and_no_padding(tiny_model_dir, tmp_path):
    policy, config = load(save("granitemoehybrid", tmp_path, tiny_model_dir), "train.token_budget=120")
    padding = 0
    for batch in batches(policy, config, *with_routes(policy)):
        drawn, (slots,) = prepared(policy, batch).drawn, {len(batch.blocks) * batch.layout.longest}
        assert len(drawn.rows.segments_N) == slots <= 120
        assert drawn.rows.tokens_S.tolist() == [float(sum(block.lengths)) for block in batch.blocks]
        with torch.no_grad():
            policy.score(prepared(policy, batch))
        replayed = sum(int((row.completion.routes[:, 0, 0] >= 0).sum()) for row in batch.rows)
        assert policy.replay.tokens_S.tolist() == [float(replayed)] * len(policy.sites)
        padding += slots - len(batch.token_ids_N)
    assert padding > 20
