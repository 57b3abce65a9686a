"""Routing replay: own routes change nothing, others are really computed, and the unknown is routed live."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from rl.moe.routers import find_routers, observed, watching
from rl.references import make_reference
from tests.rl.families import words
from tests.rl.moe.tiny import batches, live_routes, load, random_routes, routed, save
from tests.scoring import prepared

ALWAYS = ["qwen3_moe", "deepseek_v3"]
OTHERS = words("mixtral olmoe gpt_oss granitemoe glm4_moe qwen3_next cohere2_moe")
FAMILIES = [*ALWAYS, *[pytest.param(name, marks=pytest.mark.rotation) for name in OTHERS]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_dir):
    return save("qwen3_moe", tmp_path_factory.mktemp("moe"), tiny_model_dir)


@pytest.fixture(scope="module")
def policy(folder):
    return load(folder)[0]


def loss_and_metrics(policy, micro_batch):
    scores = policy.score(prepared(policy, micro_batch))
    policy.backward(scores.logprobs_L.sum(), last=True)
    values = {name: (s / n).item() for name, (s, n) in scores.metrics.items()}
    return scores.logprobs_L.detach(), values


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_own_routes_change_neither_loss_nor_gradient(
    name, checkpointing, ragged_groups, gradients, tiny_model_dir, tmp_path
):
    save(name, tmp_path, tiny_model_dir)
    policy, config = load(tmp_path, f"model.gradient_checkpointing={checkpointing}".lower())
    groups, advantages = ragged_groups(num_groups=2)
    own = routed(groups, lambda prompt, ids, _: live_routes(policy, prompt, ids))
    plain = gradients(policy, config, groups, advantages)
    replayed = gradients(policy, config, own, advantages)
    assert plain.keys() == replayed.keys()
    assert all(torch.equal(plain[n], replayed[n]) for n in plain)
    for a, b in zip(*(batches(policy, config, g, advantages) for g in (groups, own)), strict=True):
        expected, nothing = loss_and_metrics(policy, a)
        found, metrics = loss_and_metrics(policy, b)
        assert torch.equal(found, expected) and "moe/flip_rate" not in nothing
        assert metrics["moe/flip_rate"] == 0.0
        # All but the last token of each completion have a route.
        rows = [len(row.completion.token_ids) for row in b.rows]
        assert metrics["moe/replayed"] == pytest.approx(1 - len(rows) / sum(rows))


def test_a_trace_that_is_shifted_by_one_row_flips_routes(policy, folder, ragged_groups):
    config = load(folder)[1]
    groups, advantages = ragged_groups()
    shifted = routed(groups, lambda p, ids, _: np.roll(live_routes(policy, p, ids)[:-1], 1, axis=0))
    for group in shifted:
        for completion in group.completions:
            last = np.full((1, *completion.routes.shape[1:]), -1, dtype=np.int16)
            completion.routes = np.concatenate([completion.routes, last])
    for batch in batches(policy, config, shifted, advantages):
        metrics = loss_and_metrics(policy, batch)[1]
        # Two random choices of 2 of 8 experts are equal once in 28 draws.
        assert metrics["moe/flip_rate"] > 0.5
        assert all(metrics[f"moe/flip_rate/layer_{i}"] > 0.3 for i in range(4))


@pytest.mark.parametrize("attention", ["packed", "rows"])
def test_replayed_experts_are_those_that_compute(attention, folder, ragged_groups):
    """Against transformers' eager experts, whose routers are told the indices one sequence at a time."""
    policy, config = load(folder, f"model.attention={attention}")
    groups, advantages = ragged_groups()
    given = routed(groups, lambda p, ids, n: random_routes(policy, len(ids), n))
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    assert plain.config._experts_implementation == "eager"
    replayed = tokens = 0.0
    for batch in batches(policy, config, given, advantages):
        expected = []
        for row in batch.rows:
            prompt, ids, routes = row.prompt.token_ids, row.completion.token_ids, row.completion.routes

            def told(site, output, prompt=prompt, routes=routes):
                logits, _, live = observed(site, output)
                wanted = torch.tensor(routes[:, site.layer].astype(int))
                chosen = live.clone()
                chosen[len(prompt) :] = torch.where(wanted >= 0, wanted, chosen[len(prompt) :])
                found = logits.softmax(-1).gather(-1, chosen)
                return logits, found / found.sum(-1, keepdim=True), chosen

            with watching(find_routers(plain), told), torch.no_grad():
                logits = plain(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits
            of_ids = (logits[0, len(prompt) - 1 : -1] / 0.9).log_softmax(-1)
            expected.append(of_ids.gather(-1, torch.tensor(ids)[:, None])[:, 0])
        found, metrics = loss_and_metrics(policy, batch)
        torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-4)
        replayed += metrics["moe/replayed"] * len(found)
        tokens += len(found)
        assert metrics["moe/flip_rate"] > (0.9 if len(found) > 50 else 0.5)
    assert 0.6 < replayed / tokens < 0.9


def test_tokens_without_a_route_are_routed_live_and_never_to_expert_0(policy, folder, ragged_groups):
    config = load(folder)[1]
    groups, advantages = ragged_groups(num_groups=2)
    missing = routed(groups, lambda p, ids, _: np.full((len(ids), 4, 2), -1, dtype=np.int8))
    zeros = routed(groups, lambda p, ids, _: np.zeros((len(ids), 4, 2), dtype=np.uint8))
    plain, *others = (batches(policy, config, g, advantages)[0] for g in (groups, missing, zeros))
    expected, _ = loss_and_metrics(policy, plain)
    for batch in others:
        assert prepared(policy, batch).drawn.routes_NSK is None
        assert torch.equal(loss_and_metrics(policy, batch)[0], expected)

    def some(value):
        def make(_prompt, ids, number):
            routes = random_routes(policy, len(ids), number)
            routes[::2] = value
            return routes

        return batches(policy, config, routed(groups, make), advantages)[0]

    (found, of_found), (wanted, of_wanted) = (loss_and_metrics(policy, some(value)) for value in (0, -1))
    assert torch.equal(found, wanted) and of_found == of_wanted and 0 < of_found["moe/replayed"] < 0.5
    assert (found - expected).abs().max() > 0.05


def test_a_router_has_its_gradient_from_the_scores_of_all_experts(policy, folder, ragged_groups, gradients):
    config = load(folder)[1]
    groups, advantages = ragged_groups(num_groups=2)
    given = routed(groups, lambda p, ids, n: random_routes(policy, len(ids), n))
    found = gradients(policy, config, given, advantages)
    assert all(found[f"model.layers.{i}.mlp.gate.weight"].norm() > 1e-5 for i in range(4))


def test_a_reference_never_replays_and_nothing_stays_installed(policy, folder, ragged_groups):
    config = load(folder)[1]
    groups, advantages = ragged_groups(num_groups=2)
    given = routed(groups, lambda p, ids, n: random_routes(policy, len(ids), n))
    reference = make_reference(policy, moves=False)
    live, replayed = (prepared(policy, batches(policy, config, g, advantages)[0]) for g in (groups, given))
    expected = reference.logprobs(live)
    scores = policy.score(replayed)
    assert (scores.logprobs_L - expected).abs().max() > 0.05
    with pytest.raises(AssertionError, match="reference"):
        reference.logprobs(replayed)
    policy.backward(scores.logprobs_L.sum(), last=True)
    assert torch.equal(reference.logprobs(replayed), expected)
    with torch.no_grad():  # old log-probs: no backward pass follows
        torch.testing.assert_close(policy.score(replayed).logprobs_L, scores.logprobs_L)
    assert torch.equal(reference.logprobs(replayed), expected)
    torch.testing.assert_close(policy.score(live).logprobs_L, expected)


def test_reentrant_checkpointing_is_refused(folder, ragged_groups):
    policy, config = load(folder, "model.gradient_checkpointing=true")
    policy.inner.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    groups, advantages = ragged_groups(num_groups=2)
    given = routed(groups, lambda p, ids, n: random_routes(policy, len(ids), n))
    with pytest.raises(ValueError, match=r"use_reentrant=true .* no replay"):
        policy.score(prepared(policy, batches(policy, config, given, advantages)[0]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda routes: routes[:-1], "tokens and this model need integers of"),
        (lambda routes: routes[:, :2], "4 or more layers, 2"),
        (lambda routes: np.where(routes < 0, routes, routes + 8), "name expert 15, but the model has 8"),
        (lambda routes: routes.astype(float), "need integers"),
    ],
)
def test_a_trace_of_another_model_is_refused(change, words, policy, folder, ragged_groups):
    config = load(folder)[1]
    groups, advantages = ragged_groups(num_groups=2)
    given = routed(groups, lambda p, ids, n: change(random_routes(policy, len(ids) + 30, n)[-len(ids) :]))
    with pytest.raises(ValueError, match=words):
        prepared(policy, batches(policy, config, given, advantages)[0])
