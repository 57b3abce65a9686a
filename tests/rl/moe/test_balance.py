"""Balance losses against transformers, Megatron's and DeepSeek's formulas, and one big batch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from rl.batch import PackRules, pack
from rl.moe.balance import (
    Load,
    Rows,
    Seen,
    bias_of,
    entropy_loss,
    move_biases,
    seeing,
    sequence_loss,
    switch_loss,
    z_loss,
)
from rl.moe.routers import find_routers
from rl.types import Completion, Continuation, Group, Prompt, Reward, ScoredGroup
from tests.rl.families import tiny_config
from tests.rl.moe.tiny import E, K, mixtral


def batch() -> tuple[Tensor, Tensor]:
    """Eight ragged rows, right-padded with ids that are not all alike."""
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(12) < torch.tensor([12, 3, 7, 1, 9, 12, 5, 2])[:, None]).long()
    return torch.randint(0, 100, (8, 12), generator=generator), mask


def answers(model, ids: Tensor, mask: Tensor):
    sites = find_routers(model)
    with seeing(sites) as seen:
        out = model(ids, attention_mask=mask, use_cache=False, output_router_logits=True)
    return seen.sums(sites, Rows.of_mask(mask)), out.router_logits


def gradient(model) -> Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def test_one_layer_is_transformers_loss_over_k():
    ids, mask = batch()
    sums, logits = answers(mixtral(layers=1), ids, mask)
    theirs = load_balancing_loss_func(logits, E, K, mask)
    torch.testing.assert_close(switch_loss(sums, sums.load()).float() * K, theirs)


def test_a_layer_is_megatrons_formula_and_layers_are_averaged():
    ids, mask = batch()
    sums, logits = answers(mixtral(), ids, mask)
    expected = []
    for layer in logits:  # switch_load_balancing_loss_func: sum(P) * counts * E / (topk * T * T)
        probs = layer.softmax(-1)[mask.bool().flatten()]
        counts = torch.bincount(probs.topk(K).indices.flatten(), minlength=E)
        expected.append((probs.sum(0) * counts).sum() * E / (K * len(probs) ** 2))
    torch.testing.assert_close(switch_loss(sums, sums.load()).float(), sum(expected) / 2)


def test_the_z_loss_is_that_of_switch_transformers():
    ids, mask = batch()
    sums, logits = answers(mixtral(layers=1), ids[:1], mask[:1])  # the first row has no padding
    torch.testing.assert_close(z_loss(sums, sums.load()).float(), router_z_loss_func(logits[0][None]))


def test_four_layers_collapsed_on_different_experts_do_not_look_balanced():
    """Known bad: transformers pools the layers and says 2.0, its value of perfect balance (K)."""
    sites = find_routers(mixtral(layers=4))
    chosen = [torch.tensor([2 * layer, 2 * layer + 1]).expand(6, 2) for layer in range(4)]
    logits = [torch.full((6, E), -40.0).scatter(-1, experts, 0.0) for experts in chosen]
    seen = Seen({s.name: [z] for s, z in zip(sites, logits, strict=True)})
    seen.experts = {s.name: [e] for s, e in zip(sites, chosen, strict=True)}
    sums = seen.sums(sites, Rows.of_mask(torch.ones(1, 6)))
    assert load_balancing_loss_func(tuple(logits), E, K).item() == pytest.approx(2.0)
    # each layer: f = P = 1/2 on two experts, so 8 (1/4 + 1/4) = 4, which is 8.0 on transformers' scale
    assert switch_loss(sums, sums.load()).item() * K == pytest.approx(8.0)


def test_balance_is_one_and_its_entropy_form_minus_e_log_e():
    sites, logits = find_routers(mixtral(layers=1)), torch.zeros(8, E)
    experts = torch.tensor([[i, (i + 1) % E] for i in range(8)])
    sums = Seen({sites[0].name: [logits]}, {sites[0].name: [experts]}).sums(
        sites, Rows.of_mask(torch.ones(2, 4))
    )
    assert switch_loss(sums, sums.load()).item() == pytest.approx(1.0)
    assert sequence_loss(sums, sums.load()).item() == pytest.approx(1.0)
    assert entropy_loss(sums, sums.load()).item() == pytest.approx(-E * math.log(E))


def test_the_sequence_loss_is_deepseeks_equation_sequence_by_sequence():
    ids, mask = batch()
    model = mixtral()
    sums, logits = answers(model, ids, mask)
    expected = []
    for layer, row in itertools.product(logits, range(8)):
        probs = layer.softmax(-1).reshape(8, 12, E)[row][mask[row].bool()]
        f = torch.bincount(probs.topk(K).indices.flatten(), minlength=E) * E / (K * len(probs))
        expected.append((f * probs.mean(0)).sum())
    torch.testing.assert_close(sequence_loss(sums, sums.load()).float(), torch.stack(expected).mean())


def test_counted_shares_have_no_gradient_and_the_entropy_of_probabilities_has():
    ids, mask = batch()
    model = mixtral()
    sums, _ = answers(model, ids, mask)
    assert not sums.counts_LGE.requires_grad
    entropy_loss(sums, sums.load()).backward()
    ours = gradient(model)
    _, logits = answers(model, ids, mask)
    means = [layer.softmax(-1)[mask.bool().flatten()].mean(0) for layer in logits]
    (sum(E * (p * p.log()).sum() for p in means) / 2).backward()
    theirs = gradient(model)
    assert theirs.norm() > 1e-3 and (ours - theirs).norm() / theirs.norm() < 1e-5


@pytest.mark.parametrize("loss", [switch_loss, sequence_loss, entropy_loss, z_loss])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_cuts_into_passes_give_the_value_and_gradient_of_one_big_batch(loss, size):
    ids, mask = batch()
    model = mixtral()
    sums, _ = answers(model, ids, mask)
    whole = loss(sums, sums.load())
    whole.backward()
    expected = gradient(model)
    cuts = [(ids[i : i + size], mask[i : i + size]) for i in range(0, 8, size)]
    with torch.no_grad():
        loads = [answers(model, *cut)[0].load() for cut in cuts]
    load, total = sum(loads[1:], loads[0]), 0.0
    for cut in cuts:
        part = loss(answers(model, *cut)[0], load)
        part.backward()
        total += part.item()
    assert total == pytest.approx(whole.item(), rel=1e-6)
    assert (gradient(model) - expected).norm() / expected.norm() < 1e-6


def test_packed_sequences_count_as_padded_ones_do():
    ids, mask = batch()
    model = mixtral(attn_implementation="eager")
    padded, _ = answers(model, ids, mask)
    positions = torch.cat([torch.arange(int(n)) for n in mask.sum(-1)])
    packed = Rows.of_positions(positions[None])
    seen = packed.segments_N.tolist(), packed.members_SG
    assert seen[0] == [row for row in range(8) for _ in range(int(mask[row].sum()))]
    assert torch.equal(seen[1], torch.eye(8)) and torch.equal(packed.tokens_S, padded.rows.tokens_S)


def test_what_stands_in_padding_changes_nothing():
    ids, mask = batch()
    model = mixtral()
    other = torch.where(mask.bool(), ids, 99 - ids)
    for loss in (switch_loss, sequence_loss, z_loss):
        a, b = (loss(s, s.load()).item() for s in (answers(model, i, mask)[0] for i in (ids, other)))
        assert a == pytest.approx(b, rel=1e-6)
    empty, _ = answers(model, ids, torch.zeros_like(mask))  # transformers' own says NaN
    assert switch_loss(empty, empty.load()).item() == 0.0


def test_recomputed_layers_count_once_and_keep_the_gradient():
    ids, mask = batch()
    found = []
    for checkpointing in (False, True):
        model = mixtral()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        sums, _ = answers(model, ids, mask)
        assert sums.load().tokens.item() == mask.sum()
        switch_loss(sums, sums.load()).backward()
        found.append(gradient(model))
    assert found[0].norm() > 1e-3
    torch.testing.assert_close(found[0], found[1])


def test_reentrant_checkpointing_is_refused():
    model = mixtral()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match=r"use_reentrant=true .* no balance loss"):
        answers(model, *batch())


def test_the_bias_moves_as_torchtitans_does_and_evens_out_the_load():
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=100, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=E, num_experts_per_tok=K, n_group=1,
        topk_group=1, first_k_dense_replace=0, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, initializer_range=0.3, n_shared_experts=1,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config)
    sites, (ids, mask), violation = find_routers(model), batch(), []
    for _ in range(60):
        with torch.no_grad(), seeing(sites) as seen:
            model(ids, attention_mask=mask)
        load = seen.sums(sites, Rows.of_mask(mask)).load()
        before, counts = bias_of(sites[0]).clone(), load.counts_LE[0].float()
        violation.append((counts.max() / counts.mean() - 1).item())
        move_biases(sites, load, rate=0.01)
        # torchtitan's _update_expert_bias: delta = rate * sign(mean - counts), less its mean
        delta = 0.01 * torch.sign(counts.mean() - counts)
        torch.testing.assert_close(bias_of(sites[0]), before + delta - delta.mean())
    assert violation[0] > 0.5 > 0.25 > min(violation[-5:])


def test_a_router_without_a_bias_is_refused_one():
    sites = find_routers(mixtral())
    with pytest.raises(ValueError, match=r"moe.bias_rate=0.1: routers of mixtral have no bias"):
        move_biases(sites, Load(torch.ones(2, 2 * E + 2)), 0.1)


@pytest.mark.parametrize("name", ["afmoe", "hunyuan_v1_moe", "longcat_flash"])
def test_the_sums_of_routers_around_a_linear_layer_begin_at_0(name):
    sites = find_routers(AutoModelForCausalLM.from_config(tiny_config(name)))
    sums = Load.nothing(sites).sums
    assert sums.shape == (len(sites), 2 * sites[0].num_experts + 2) and not sums.any()


def test_each_row_of_an_episode_is_a_sequence_with_its_prompt():
    """Two rows of an episode after prompts of 2 and 3 tokens: sequences of 2 + 4 and 3 + 1."""
    completion = Completion([5] * 4, [0.0] * 4, [True] * 4, "stop", [])
    completion.continuations = [Continuation((1, 2, 3), Completion([5], [0.0], [True], "stop", []))]
    group = ScoredGroup(Group(Prompt("p", "", (1, 2)), [completion]), [Reward(1.0)])
    rules = PackRules(64, row_weight=lambda *_: 1.0)
    (micro_batch,) = pack([group], [[1.0]], rules)[0].micro_batches
    for packed in (True, False):
        assert Rows.of_batch(micro_batch, packed=packed).tokens_S.tolist() == [6, 4]
