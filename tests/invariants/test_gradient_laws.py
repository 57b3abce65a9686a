"""Law 1, 2 and 4: the gradient of a step is a sum over tokens, however the work is cut."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from rl.batch import pack
from rl.causal import CausalPolicy
from rl.config.read import load_config
from rl.references import Copy
from rl.update import pack_rules
from tests.scoring import relative_error

LOSSES = ["grpo", "dr_grpo", "bnpo", "dapo", "gspo", "cispo", "sapo", "reinforce"]


def settings(folder, *overrides: str):
    base = [
        f"model.name={folder}",
        "model.dtype=fp32",
        "sampling.max_completion_length=20",
        "loss.clip_high=4.0",
    ]
    return load_config(None, [*base, *overrides])


@pytest.fixture(scope="module")
def policy(tiny_model_dir) -> CausalPolicy:
    config = settings(tiny_model_dir)
    policy = CausalPolicy(config.model, Accelerator(cpu=True), temperature=0.9)
    assert policy.settle_attention() is None
    return policy


@pytest.fixture(scope="module")
def reference(policy) -> Copy:
    """Near the policy, as after some steps."""
    reference = Copy(policy, moves=False)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in reference.scorer.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return reference


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_does_not_depend_on_the_token_budget(
    policy, reference, tiny_model_dir, ragged_groups, gradients, loss
):
    groups, advantages = ragged_groups()
    one = settings(tiny_model_dir, f"loss.name={loss}", "train.token_budget=100000")
    many = settings(tiny_model_dir, f"loss.name={loss}", "train.token_budget=40")
    assert len(pack(groups, advantages, pack_rules(one))[0].micro_batches) == 1
    assert len(pack(groups, advantages, pack_rules(many))[0].micro_batches) > 5
    a, b = (gradients(policy, c, groups, advantages, reference) for c in (one, many))
    assert relative_error(a, b) <= 1e-5


def test_gradient_does_not_depend_on_the_order_of_groups(
    policy, reference, tiny_model_dir, ragged_groups, gradients
):
    groups, advantages = ragged_groups()
    config = settings(tiny_model_dir)
    a = gradients(policy, config, groups, advantages, reference)
    b = gradients(policy, config, groups[::-1], advantages[::-1], reference)
    assert relative_error(a, b) <= 1e-5


@pytest.mark.parametrize("loss", ["grpo", "dapo", "gspo"])
def test_shared_prompts_give_the_gradient_of_one_sequence_at_a_time(
    policy, reference, tiny_model_dir, ragged_groups, gradients, loss
):
    groups, advantages = ragged_groups()
    config = settings(tiny_model_dir, f"loss.name={loss}")
    a = gradients(policy, config, groups, advantages, reference)
    policy.set_packed(False)
    b = gradients(policy, config, groups, advantages, reference)
    policy.set_packed(True)
    assert relative_error(a, b) <= 1e-5


def test_packed_gradient_equals_transformers_own_padded_forward(
    policy, reference, tiny_model_dir, ragged_groups, gradients
):
    """The plain formula written out with `model(...).logits` on padded rows, REINFORCE with a global token
    mean.
    """
    groups, advantages = ragged_groups()
    config = settings(tiny_model_dir, "loss.name=reinforce", "loss.kl_coef=0", "loss.sampler_correction=null")
    packed = gradients(policy, config, groups, advantages, reference)
    rows = [
        (g.prompt.token_ids, c.token_ids, a)
        for g, row in zip(groups, advantages, strict=True)
        for c, a in zip(g.completions, row, strict=True)
    ]
    longest = max(len(p) + len(c) for p, c, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask, in_loss = torch.zeros_like(ids), torch.zeros(len(rows), longest)
    for i, (p, c, a) in enumerate(rows):
        ids[i, : len(p) + len(c)] = torch.tensor([*p, *c])
        mask[i, : len(p) + len(c)] = 1
        in_loss[i, len(p) : len(p) + len(c)] = a
    policy.set_packed(False)
    policy.scorer.zero_grad()
    logits = policy.model(input_ids=ids, attention_mask=mask, use_cache=False).logits / 0.9
    logprobs = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    num_tokens = sum(len(c) for _, c, _ in rows)
    (-(logprobs * in_loss[:, 1:]).sum() / num_tokens).backward()
    padded = {name: p.grad.clone() for name, p in policy.trainable()}
    policy.scorer.zero_grad()
    policy.set_packed(True)
    assert relative_error(packed, padded) <= 1e-5


def test_rows_without_signal_are_skipped_and_stay_in_the_denominators(
    policy, reference, tiny_model_dir, ragged_groups, gradients
):
    groups, advantages = ragged_groups()
    num_zero = sum(a == 0 for row in advantages for a in row)
    assert num_zero >= 3
    lazy = settings(tiny_model_dir, "loss.kl_coef=0")
    batch = pack(groups, advantages, pack_rules(lazy))[0]
    assert sum(len(m.rows) for m in batch.micro_batches) == 24 - num_zero
    assert batch.num_sequences == 24
    # A KL term of weight 1e-30 changes no gradient and forbids skipping.
    eager = settings(tiny_model_dir, "loss.kl_coef=1e-30")
    batch = pack(groups, advantages, pack_rules(eager))[0]
    assert sum(len(m.rows) for m in batch.micro_batches) == 24
    a, b = (gradients(policy, c, groups, advantages, reference) for c in (lazy, eager))
    assert relative_error(a, b) <= 1e-5


def test_minibatch_gradients_of_the_global_token_mean_add_up_to_the_whole(
    policy, tiny_model_dir, ragged_groups
):
    """dapo weighs every token of the sampled batch alike: 3 minibatches hold 3 times the weight of one
    pass.
    """
    groups, advantages = ragged_groups()
    whole = pack(groups, advantages, pack_rules(settings(tiny_model_dir, "loss.name=dapo")))
    parts = pack(
        groups,
        advantages,
        pack_rules(
            settings(tiny_model_dir, "loss.name=dapo", "train.num_minibatches=3", "train.prompts_per_step=6")
        ),
    )
    assert len(whole) == 1 and len(parts) == 3
    total = sum(m.weights_L.sum().item() for m in whole[0].micro_batches)
    assert total == pytest.approx(1.0, rel=1e-6)
    assert sum(m.weights_L.sum().item() for b in parts for m in b.micro_batches) == pytest.approx(
        3.0, rel=1e-6
    )
    assert len({round(w, 12) for b in parts for m in b.micro_batches for w in m.weights_L.tolist()}) == 1


@pytest.mark.parametrize("mode", ["gradient_checkpointing=true", "attention=rows", "keep_logits=true"])
def test_memory_options_do_not_change_the_gradient(
    policy, reference, tiny_model_dir, ragged_groups, gradients, mode
):
    groups, advantages = ragged_groups()
    config = settings(tiny_model_dir, f"model.{mode}", "loss.kl_coef=0")
    other = CausalPolicy(config.model, Accelerator(cpu=True), temperature=0.9)
    other.settle_attention()
    a = gradients(policy, config, groups, advantages, reference)
    b = gradients(other, config, groups, advantages, reference)
    assert relative_error(a, b) <= 1e-5
