"""RL of a masked diffusion model by the loop of every run: gradients do not depend on how work is cut, old,
current and reference policy see the same masks, the engine is proved to hold the policy's weights.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from accelerate import Accelerator

from recipes.diffusion_rl import copy_of_model
from rl.advantages import wd1_advantages
from rl.batch import pack
from rl.config.read import load_config
from rl.diffusion.model import hidden_states, logits_at
from rl.diffusion.policy import DiffusionPolicy
from rl.diffusion.rl_policy import MaskedPolicy, diffusion_model_config
from rl.losses import policy_loss
from rl.model.bidirectional import Documents
from rl.references import BaseModel, Copy
from rl.update import pack_rules, update_policy
from rollout.diffusion.engine import DiffusionEngine
from rollout.diffusion.steps import DenoisingParams
from rollout.weight_sync import WeightSyncError, publish
from tests.calling import trace_of
from tests.scoring import alone, logprobs, prepared, relative_error

METHODS = {
    "diffu-GRPO": ["estimator.name=one_step", "estimator.prompt_mask=0.15"],
    "ESPO": ["estimator.name=elbo", "estimator.num_draws=2"],
    "SPG": ["estimator.name=sandwich", "estimator.num_draws=2"],
    "TraceRL": ["estimator.name=trace", "estimator.merge=2"],
}
LOSS = {
    "diffu-GRPO": ["name=bnpo", "kl_coef=0.04"],
    "ESPO": ["name=grpo", "kl_coef=0.001", "kl_estimator=k2"],
    "SPG": ["name=reinforce", "kl_coef=0"],
    "TraceRL": ["name=grpo", "kl_coef=0.01"],
}


def settings(folder, method: str, *overrides: str):
    base = [
        f"model.name={folder}",
        "model.dtype=fp32",
        "sampling.max_completion_length=20",
        "diffusion.block_length=4",
        "diffusion.mask_token=<unk>",
        "loss.sampler_correction=null",
    ]
    method_keys = [f"diffusion.{k}" for k in METHODS[method]] + [f"loss.{k}" for k in LOSS[method]]
    return load_config(None, [*base, *method_keys, *overrides])


@pytest.fixture
def traced_groups(ragged_groups):
    """Ragged groups whose completions were written two tokens a step, right to left, on canvases of 20."""
    groups, advantages = ragged_groups()
    for group in groups:
        for c in group.completions:
            n = len(c.token_ids)
            steps = [(n - 1 - i) // 2 for i in range(n)]
            end = max(steps) + 1
            c.facts = {"trace": trace_of([*steps, *[end] * (20 - n)], [2] * (20 - n), end)}
    return groups, advantages


def make_policy(config) -> MaskedPolicy:
    return MaskedPolicy(config, Accelerator(cpu=True), name=str(config.model.name))


def make_reference(policy, config) -> Copy | None:
    """Near the policy, as after some steps; None without a KL term."""
    if not config.loss.kl_coef:
        return None
    reference = Copy(policy, moves=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in reference.scorer.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return reference


@pytest.mark.parametrize("method", METHODS)
def test_gradient_does_not_depend_on_budget_or_order(tiny_model_dir, traced_groups, gradients, method):
    groups, advantages = traced_groups
    one = settings(tiny_model_dir, method, "train.token_budget=100000")
    policy = make_policy(one)
    reference = make_reference(policy, one)
    whole = gradients(policy, one, groups, advantages, reference)
    many = settings(tiny_model_dir, method, "train.token_budget=40")
    assert len(pack(groups, advantages, pack_rules(many))[0].micro_batches) > 5
    policy.token_budget = 40
    assert relative_error(whole, gradients(policy, many, groups, advantages, reference)) <= 1e-5
    assert relative_error(whole, gradients(policy, many, groups[::-1], advantages[::-1], reference)) <= 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_two_processes_add_up(tiny_model_dir, traced_groups, gradients, method):
    """Each of two packs its groups with the counts of both, and draws its own masks."""
    groups, advantages = traced_groups
    config = settings(tiny_model_dir, method)
    policy = make_policy(config)
    reference = make_reference(policy, config)
    whole = gradients(policy, config, groups, advantages, reference)
    halves = [(groups[a:b], advantages[a:b]) for a, b in ((0, 2), (2, 6))]
    counts: list[list[float]] = []
    for part in halves:
        pack(*part, pack_rules(config), sum_over_processes=lambda n: counts.append(n) or n)
    total = [sum(pair) for pair in zip(*counts, strict=True)]
    for _, p in policy.trainable():
        p.grad = None
    found: dict[str, torch.Tensor] = {}
    for part in halves:
        batches = pack(*part, pack_rules(config), sum_over_processes=lambda _: total)
        optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.0)

        def record(*_, **__) -> None:
            for name, p in policy.trainable():
                if p.grad is not None:
                    found[name] = found.get(name, 0) + p.grad

        optimizer.step = record
        update_policy(
            policy,
            optimizer,
            batches,
            config.loss,
            world=alone(),
            reference=reference,
            max_grad_norm=1e9,
        )
    assert relative_error(whole, found) <= 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_old_and_reference_policy_see_the_masks_of_the_policy(tiny_model_dir, traced_groups, method):
    """Equal weights then give equal numbers to the last bit, in either order; other masks do not."""
    groups, advantages = traced_groups
    estimator = "elbo" if method == "SPG" else METHODS[method][0].split("=")[1]  # no KL with a sandwich
    keys = ["loss.name=grpo", "loss.kl_coef=0.1", f"diffusion.estimator.name={estimator}"]
    config = settings(tiny_model_dir, method, *keys)
    policy = MaskedPolicy(config, Accelerator(cpu=True), name=str(tiny_model_dir))
    batch = pack(groups, advantages, pack_rules(config))[0].micro_batches[0]
    drawn = prepared(policy, batch)
    reference = Copy(policy, moves=False).logprobs(drawn)
    ours = policy.score(drawn).logprobs_L.detach()
    assert torch.equal(ours, reference)
    policy.seed += 1
    others = logprobs(policy, batch).detach()
    assert torch.equal(others, ours) == (config.diffusion.estimator.name == "trace")


def test_lora_reference_is_the_base_model_on_the_same_masks(tiny_model_dir, traced_groups):
    groups, advantages = traced_groups
    config = settings(tiny_model_dir, "ESPO", "model.lora={r: 4, alpha: 8}")
    policy = MaskedPolicy(config, Accelerator(cpu=True), name=str(tiny_model_dir))
    batch = pack(groups, advantages, pack_rules(config))[0].micro_batches[0]
    drawn, reference = prepared(policy, batch), BaseModel(policy)
    before = policy.score(drawn).logprobs_L.detach()
    with torch.no_grad():
        for name, p in policy.trainable():
            assert "lora_" in name
            p.add_(0.1)
    assert torch.equal(reference.logprobs(drawn), before)
    assert not torch.equal(policy.score(drawn).logprobs_L.detach(), before)


def test_espo_has_the_ratio_of_the_sequence(tiny_model_dir, traced_groups):
    """Ratio exp((ELBO - ELBO_old) / L) for every token: the token loss of GRPO equals the sequence loss."""
    groups, advantages = traced_groups
    losses = []
    for name in ("grpo", "gspo"):
        clip = ["loss.clip_low=0.2", "loss.clip_high=0.2", "loss.kl_coef=0", "train.num_epochs=2"]
        config = settings(tiny_model_dir, "ESPO", f"loss.name={name}", *clip)
        policy = make_policy(config)
        optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.5)
        batches = pack(groups, advantages, pack_rules(config))
        result = update_policy(
            policy, optimizer, batches, config.loss, world=alone(), num_epochs=2, max_grad_norm=1.0
        )
        losses.append({name: value for name, value in result.metrics.items() if name != "memory/peak"})
    assert losses[0]["policy/ratio_max"] > 1.001
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_each_pass_has_masks_of_its_own_and_old_log_probs_on_them(
    tiny_model_dir, traced_groups, method, monkeypatch
):
    groups, advantages = traced_groups
    config = settings(tiny_model_dir, method, "train.num_epochs=3")
    policy, before = make_policy(config), make_policy(config)
    seen, compared = [], []

    def noted(drawn, score=policy.score, **asked):
        if torch.is_grad_enabled():
            seen.append(before.score(drawn).logprobs_L.detach())
        return score(drawn, **asked)

    def compared_loss(inputs, *, config):
        if inputs.old_logprobs_N is not None:
            compared.append(torch.equal(seen[-1], inputs.old_logprobs_N))
        return policy_loss(inputs, config=config)

    monkeypatch.setattr(policy, "score", noted)
    monkeypatch.setattr("rl.update.policy_loss", compared_loss)
    (batch,) = pack(groups, advantages, pack_rules(config))
    optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.1)
    reference = make_reference(policy, config)
    result = update_policy(
        policy, optimizer, [batch], config.loss, world=alone(), reference=reference, num_epochs=3
    )
    assert result.num_updates == 3 and len(batch.micro_batches) == 1
    assert len({values.sum().item() for values in seen}) == (3 if policy.redraws else 1)
    assert compared == [True, True]


def test_wd1_weights_by_hand():
    """Rewards 1, 0, 0, 0: A = 3/4 and -1/4. exp(A): 2.117000 and 0.778801, in all 4.453402; exp(-A): 0.472367
    and 1.284025, in all 4.324443. Weights 0.475367 - 0.109232 and 0.174878 - 0.296923.
    """
    assert wd1_advantages([1, 0, 0, 0]) == pytest.approx([0.366135, *[-0.122045] * 3], abs=1e-6)
    assert wd1_advantages([0.3, 0.3]) == [0.0, 0.0]


@pytest.mark.parametrize("lora", ["model.lora=null", "model.lora={r: 4, alpha: 8}"])
def test_the_engine_is_proved_to_hold_the_weights(tiny_model_dir, lora):
    config = settings(tiny_model_dir, "ESPO", lora)
    policy = MaskedPolicy(config, Accelerator(cpu=True), name=str(tiny_model_dir))
    own = copy_of_model(config, config.model, policy, torch.float32)
    engine = DiffusionEngine(own, policy.tokenizer, DenoisingParams(8, block_length=4))
    with torch.no_grad():
        for _, p in policy.trainable():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    report = publish(engine, policy.weights(), version=1, tolerance=None)
    assert report.canary_max_gap < 1e-4 and engine.version == 1
    assert not any(held.sampled for held in engine.tensors.values())  # all bytes are compared
    # The same weights, read in another way: only the canary sees it.
    engine.plain.shift = True
    with pytest.raises(WeightSyncError, match="computes differently"):
        publish(engine, policy.weights(), version=2, tolerance=None)


def test_a_small_adapter_reaches_a_bf16_engine(tiny_model_dir):
    """Added to a weight, a delta of 1e-6 would be lost: bf16 has 8 bits."""
    config = settings(tiny_model_dir, "ESPO", "model.lora={r: 4, alpha: 8}", "model.dtype=bf16")
    policy = MaskedPolicy(config, Accelerator(cpu=True), name=str(tiny_model_dir))
    own = copy_of_model(config, config.model, policy, torch.bfloat16)
    engine = DiffusionEngine(own, policy.tokenizer, DenoisingParams(8, block_length=4))
    with torch.no_grad():
        for name, p in policy.trainable():
            if "lora_B" in name:
                p.copy_(3e-6 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    publish(engine, policy.weights(), version=1, tolerance=None)
    for trained, held in zip(policy.model.modules(), own.modules(), strict=True):
        if hasattr(trained, "get_delta_weight"):
            delta = trained.get_delta_weight("default").float()
            assert delta.norm() > 0
            error = held.get_delta_weight("default").float() - delta
            assert error.norm() < 0.01 * delta.norm()


def test_the_canary_is_of_the_likeliest_tokens_in_bf16(tiny_model_dir):
    config = settings(tiny_model_dir, "ESPO", "model.dtype=bf16-mixed")
    policy = MaskedPolicy(config, Accelerator(cpu=True), name=str(tiny_model_dir))
    ids, logprobs = policy.weights().canary()
    canvas = torch.full((len(ids),), policy.trained.mask_token_id)
    canvas[0] = ids[0]
    documents = Documents.of([len(ids)])
    with torch.no_grad():
        hidden = hidden_states(policy.model.eval(), canvas, documents)
        logits = logits_at(policy.model, hidden, torch.arange(1, len(ids)), documents)
    assert logits.log_softmax(-1).amax(-1).tolist() == pytest.approx(logprobs, abs=0.1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.sampler_correction={}"], "use loss.sampler_correction=null, or estimator.name=trace"),
        (
            ["diffusion.estimator.name=sandwich"],
            "use loss.name=reinforce, loss.kl_coef=0",
        ),
        (["diffusion.estimator={name: sandwich}"], "use diffusion.estimator.num_draws=2 or more"),
        (["diffusion.estimator.name=trace", "diffusion.estimator.max_canvases=2"], "or max_canvases=null"),
        (["engine.name=vllm"], "use engine.name=auto"),
        (["advantage.name=wd1"], "use loss.name=reinforce"),
        (["diffusion.blocklength=3"], "did you mean block_length?"),
        (["diffusion.estimator.name=elba"], "diffusion.estimator.name='elba'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tiny_model_dir, overrides, message):
    with pytest.raises(ValueError) as error:
        settings(tiny_model_dir, "ESPO", *overrides)
    assert message in str(error.value)


def test_a_narrow_reference_has_the_log_probs_of_a_wide_one(tiny_model_dir, traced_groups):
    config = settings(tiny_model_dir, "ESPO", "model.dtype=bf16-mixed")
    policy = make_policy(config)
    batch = pack(*traced_groups, pack_rules(config))[0].micro_batches[0]
    wide, narrow = (Copy(policy, moves=False, narrow=narrow) for narrow in (False, True))
    assert any(p.dtype == torch.bfloat16 for p in narrow.scorer.parameters())
    drawn = prepared(policy, batch)
    assert torch.equal(wide.logprobs(drawn), narrow.logprobs(drawn))


def test_dropout_of_the_checkpoint_is_off_where_log_probs_are_compared(
    tiny_model_dir, ragged_groups, tmp_path
):
    """A fine-tuning keeps it; the ratio and the KL of an unchanged policy must be 1 and 0."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    values = json.loads((folder / "config.json").read_text()) | {"attention_dropout": 0.5}
    (folder / "config.json").write_text(json.dumps(values))
    config = settings(folder, "ESPO")
    policy = MaskedPolicy(config, Accelerator(cpu=True), name=str(folder))
    groups, advantages = ragged_groups()
    batch = pack(groups, advantages, pack_rules(config))[0].micro_batches[0]
    policy.weights().canary()
    drawn = prepared(policy, batch)
    ours = policy.score(drawn).logprobs_L
    torch.testing.assert_close(policy.score(drawn).logprobs_L, ours, rtol=0, atol=0)
    torch.testing.assert_close(Copy(policy, moves=False).logprobs(drawn), ours.detach())
    tuned = DiffusionPolicy(diffusion_model_config(config), Accelerator(cpu=True), name=str(folder))
    assert all(module.training for module in tuned.model.modules())
