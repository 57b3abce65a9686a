"""The policy: LoRA, the stream of weights, the reference, saving, and models that do not fit."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from rl.batch import pack
from rl.causal import CausalPolicy
from rl.config.read import load_config
from rl.packed_check import probe_batch
from rl.references import Copy, make_reference
from rl.update import pack_rules, update_policy
from tests.scoring import alone, prepared


def make(folder, *overrides) -> tuple[CausalPolicy, object]:
    config = load_config(None, [f"model.name={folder}", "model.dtype=fp32", *overrides])
    policy = CausalPolicy(config.model, Accelerator(cpu=True), temperature=1.0)
    policy.settle_attention()
    return policy, config


def step(policy, config, ragged_groups, lr=0.5, **options):
    groups, advantages = ragged_groups()
    optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=lr)
    batches = pack(groups, advantages, pack_rules(config))
    if config.loss.kl_coef and "reference" not in options:
        options["reference"] = make_reference(policy, moves=False)
    return update_policy(policy, optimizer, batches, config.loss, world=alone(), **options)


def test_the_weight_stream_of_an_adapter_is_the_merged_model(tiny_model_dir, ragged_groups, tmp_path):
    policy, config = make(tiny_model_dir, "model.lora={r: 4, alpha: 16}", "loss.kl_coef=0")
    assert all("lora_" in name for name, _ in policy.trainable())
    step(policy, config, ragged_groups)
    streamed = dict(policy.weights())
    policy.write_model(tmp_path)
    from peft import AutoPeftModelForCausalLM

    merged = AutoPeftModelForCausalLM.from_pretrained(tmp_path).merge_and_unload()
    assert dict(merged.named_parameters()).keys() == streamed.keys()
    plain = dict(AutoModelForCausalLM.from_pretrained(tiny_model_dir).named_parameters())
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(streamed[name], parameter, rtol=0, atol=1e-6)
    moved = [n for n in streamed if not torch.equal(streamed[n], plain[n])]
    assert moved and all("proj" in n for n in moved)


def test_with_an_adapter_the_reference_is_the_base_model(tiny_model_dir, ragged_groups):
    policy, config = make(tiny_model_dir, "model.lora={r: 4}")
    base, _ = make(tiny_model_dir)
    step(policy, config, ragged_groups)
    batch = prepared(policy, probe_batch(policy.model))
    with torch.no_grad():
        expected = base.score(batch).logprobs_L
        assert not torch.allclose(policy.score(batch).logprobs_L, expected, atol=1e-3)
    reference = make_reference(policy, moves=False)
    torch.testing.assert_close(reference.logprobs(batch), expected)
    assert reference.snapshot() is None


def test_an_adapter_is_fp32_beside_a_bf16_base_and_is_added_before_rounding(tiny_model_dir, ragged_groups):
    policy, config = make(tiny_model_dir, "model.lora={r: 4}", "model.dtype=bf16-mixed", "loss.kl_coef=0")
    assert policy.settle_attention() is None
    step(policy, config, ragged_groups)
    kinds = {("lora_" in name, p.dtype) for name, p in policy.model.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    name = "model.layers.0.mlp.down_proj"
    layer = policy.model.get_submodule(name)
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
    assert delta.abs().max() > 0
    sent = dict(policy.weights())[f"{name}.weight"]
    torch.testing.assert_close(sent, layer.base_layer.weight.float() + delta, rtol=0, atol=1e-7)


def test_the_reference_follows_by_its_mixup(tiny_model_dir, ragged_groups):
    policy, config = make(tiny_model_dir)
    reference = Copy(policy, moves=True)
    start = [p.clone() for p in reference.scorer.parameters()]
    step(policy, config, ragged_groups, reference=reference)
    reference.follow(policy, 0.25)
    for theirs, ours, old in zip(
        reference.scorer.parameters(), policy.scorer.parameters(), start, strict=True
    ):
        torch.testing.assert_close(theirs, 0.75 * old + 0.25 * ours)


def test_the_canary_is_the_models_own_log_softmax(tiny_model_dir):
    policy, _ = make(tiny_model_dir)
    ids, logprobs = policy.weights().canary()
    logits = AutoModelForCausalLM.from_pretrained(tiny_model_dir)(torch.tensor([ids])).logits[0]
    expected = [logits[i - 1].log_softmax(-1)[ids[i]].item() for i in range(1, len(ids))]
    assert logprobs == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16-mixed", "bf16"])
def test_saved_weights_load_back_bitwise_and_name_the_compute_dtype(
    tiny_model_dir, ragged_groups, tmp_path, dtype
):
    policy, config = make(tiny_model_dir, f"model.dtype={dtype}", "loss.kl_coef=0")
    step(policy, config, ragged_groups)
    policy.write_model(tmp_path)
    other, _ = make(tiny_model_dir, f"model.dtype={dtype}")
    other.load_weights(tmp_path)
    for (name, a), (_, b) in zip(policy.trainable(), other.trainable(), strict=True):
        assert a.dtype == b.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
        assert torch.equal(a, b), name
    wanted = "float32" if dtype == "fp32" else "bfloat16"
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == wanted
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == getattr(torch, wanted)


def test_strictly_on_policy_needs_one_forward_pass_and_has_ratio_one(tiny_model_dir, ragged_groups):
    policy, config = make(tiny_model_dir, "loss.kl_coef=0")
    calls = []
    policy.scorer.register_forward_hook(lambda *_: calls.append(1))
    result = step(policy, config, ragged_groups)
    assert len(calls) == 1
    assert result.metrics["policy/ratio_mean"] == result.metrics["policy/ratio_max"] == 1.0
    assert result.metrics["policy/clip_fraction"] == 0.0


def test_a_second_epoch_has_the_ratio_of_the_first_update(tiny_model_dir, ragged_groups):
    policy, config = make(tiny_model_dir, "loss.kl_coef=0", "train.num_epochs=2")
    result = step(policy, config, ragged_groups, num_epochs=2)
    assert result.num_updates == 2
    assert result.metrics["policy/ratio_max"] > 1.001


def test_the_loss_of_several_epochs_is_their_mean(tiny_model_dir, ragged_groups):
    losses = []
    for epochs in (1, 3):
        policy, config = make(tiny_model_dir, "loss.kl_coef=0.1", f"train.num_epochs={epochs}")
        result = step(policy, config, ragged_groups, lr=0.0, num_epochs=epochs)
        losses.append(result.metrics["policy/loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and abs(losses[0]) > 1e-3


def test_a_batch_without_signal_changes_nothing_not_even_moments(tiny_model_dir, ragged_groups):
    policy, config = make(tiny_model_dir, "loss.kl_coef=0")
    groups, advantages = ragged_groups()
    optimizer = torch.optim.AdamW([p for _, p in policy.trainable()], lr=0.1, weight_decay=0.1)
    update_policy(policy, optimizer, pack(groups, advantages, pack_rules(config)), config.loss, world=alone())
    weights = [p.clone() for _, p in policy.trainable()]
    moments = [s["exp_avg"].clone() for s in optimizer.state.values()]
    zeros = [[0.0] * len(row) for row in advantages]
    result = update_policy(
        policy, optimizer, pack(groups, zeros, pack_rules(config)), config.loss, world=alone()
    )
    assert result.num_updates == 0
    assert all(torch.equal(a, b) for a, (_, b) in zip(weights, policy.trainable(), strict=True))
    assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(moments, optimizer.state.values(), strict=True))


def test_a_non_finite_gradient_is_skipped_and_counted(tiny_model_dir, ragged_groups):
    policy, config = make(tiny_model_dir, "loss.kl_coef=0")
    groups, advantages = ragged_groups()
    advantages[0][0] = float("nan")
    before = [p.clone() for _, p in policy.trainable()]
    optimizer = torch.optim.AdamW([p for _, p in policy.trainable()], lr=0.1)
    result = update_policy(
        policy, optimizer, pack(groups, advantages, pack_rules(config)), config.loss, world=alone()
    )
    assert (result.num_updates, result.bad_steps) == (0, 1)
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, policy.trainable(), strict=True))
    assert all(p.grad is None for _, p in policy.trainable())
    policy, config = make(tiny_model_dir, "loss.kl_coef=0", "train.num_minibatches=2")
    batches = pack(groups, advantages, pack_rules(config))  # the second minibatch is sound
    optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.1)
    result = update_policy(policy, optimizer, batches, config.loss, world=alone())
    assert (result.num_updates, result.bad_steps) == (1, 1)
    assert math.isnan(result.metrics["policy/grad_norm"])


def test_the_gradient_norm_of_a_step_is_its_greatest(tiny_model_dir, ragged_groups):
    """The second of two minibatches has advantages a thousandth as large."""
    norms = {}
    for minibatches in (1, 2):
        policy, config = make(tiny_model_dir, "loss.kl_coef=0", f"train.num_minibatches={minibatches}")
        groups, advantages = ragged_groups(num_groups=4)
        advantages = [[a * (1 if i < 2 else 1e-3) for a in row] for i, row in enumerate(advantages)]
        kept = slice(0, 2 * minibatches)  # alone, the first half is the first minibatch
        batches = pack(groups[kept], advantages[kept], pack_rules(config))
        optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.0)
        result = update_policy(policy, optimizer, batches, config.loss, world=alone())
        assert result.num_updates == minibatches
        norms[minibatches] = result.metrics["policy/grad_norm"]
    assert norms[1] > 0.01 and norms[2] == pytest.approx(norms[1], rel=1e-6)


def test_a_number_that_overflows_is_reported_and_not_left_out(tiny_model_dir, ragged_groups):
    """The engine gave a token e^-120 where the policy gives about e^-5: fp32 has no exp(115)."""
    policy, config = make(tiny_model_dir, "loss.kl_coef=0")
    groups, advantages = ragged_groups()
    advantages[0][0], groups[0].completions[0].behavior_logprobs[0] = 1.0, -120.0
    optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.0)
    result = update_policy(
        policy, optimizer, pack(groups, advantages, pack_rules(config)), config.loss, world=alone()
    )
    assert result.num_updates == 1  # its weight is cut to 2
    for name in ("sampler/mismatch_kl", "sampler/ratio_mean", "sampler/ratio_max"):
        assert result.metrics[name] == float("inf")
    assert 100 < result.metrics["sampler/logprob_gap_max"] < 120


def test_a_tokenizer_larger_than_the_embedding_is_refused(tiny_model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.resize_token_embeddings(50)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has ids up to 104, but the model's embedding has 50 rows"):
        make(tmp_path)


def test_weights_that_are_not_finite_are_named(tiny_model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"1 weights such as model.layers.0.mlp.up_proj.weight hold NaN"):
        make(tmp_path)


def test_a_moving_reference_and_an_adapter_exclude_each_other(tiny_model_dir):
    with pytest.raises(ValueError, match=r"model.reference.update_every=0"):
        make(tiny_model_dir, "model.lora={r: 4}", "model.reference.update_every=2")


def test_adapters_on_the_output_head_are_refused(tiny_model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    for tied in (False, True):
        folder = tmp_path / str(tied)
        config = copy.deepcopy(model.config)
        config.tie_word_embeddings = tied
        type(model)(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
        with pytest.raises(ValueError, match=r"adapts lm_head.*leave out the output head"):
            make(folder, "model.lora={r: 4, target_modules: [q_proj, lm_head]}")
        embeddings = "model.lora={r: 4, target_modules: [q_proj, embed_tokens]}"
        if tied:
            with pytest.raises(ValueError, match=r"adapts model.embed_tokens"):
                make(folder, embeddings)
        else:
            make(folder, embeddings)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            "[q_proj, v_porj]",
            r"no module is called v_porj; did you mean v_proj or \w+\? there are embed_tokens, q_",
        ),
        ("[q_proj, layers.0.mlp.upproj]", "no module is called layers.0.mlp.upproj; did you mean up_proj"),
        ("[q_proj, layers.7.mlp.up_proj]", "no module is called layers.7.mlp.up_proj; did you mean up_proj"),
        ("[attn_out, ff_proj]", "no module is called attn_out or ff_proj; did you mean"),
        ("[]", "no module is called nothing"),
        (
            "q_proj",
            r"called q_proj; a text must fit whole names, items of a list such as \[q_proj, v_proj\]",
        ),
        ("'(q_proj'", "is not a pattern"),
    ],
)
def test_every_target_of_an_adapter_must_fit_a_module(tiny_model_dir, targets, message):
    with pytest.raises(ValueError, match=message):
        make(tiny_model_dir, f"model.lora={{target_modules: {targets}}}")


@pytest.mark.parametrize("targets", ["[layers.1.mlp.up_proj, q_proj]", '".*q_proj"', "all-linear"])
def test_targets_of_an_adapter_may_be_ends_of_names_or_a_pattern(tiny_model_dir, targets):
    policy, _ = make(tiny_model_dir, f"model.lora={{target_modules: {targets}}}")
    adapted = {n.split(".lora_")[0].removeprefix("model.") for n, _ in policy.trainable()}
    queries = {"layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"}
    wanted = {"[": queries | {"layers.1.mlp.up_proj"}, '"': queries}.get(targets[0])
    assert adapted == wanted if wanted else len(adapted) == 14


def test_an_adapter_names_its_base_from_the_root_and_with_its_revision(tiny_model_dir, tmp_path, monkeypatch):
    """A folder has no revisions, so any is taken."""
    monkeypatch.chdir(tiny_model_dir.parent)
    policy, _ = make(tiny_model_dir.name, "model.lora={r: 2}", "model.revision=v1.0")
    policy.write_model(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == (str(tiny_model_dir), "v1.0")


def test_other_ids_can_be_asked_for_at_every_loss_token(tiny_model_dir):
    """Against the model's own log-softmax, values and gradients."""
    policy, _ = make(tiny_model_dir, "model.attention=rows")
    drawn = prepared(policy, probe_batch(policy.model))
    generator = torch.Generator().manual_seed(3)
    ids_LK = torch.randint(0, 105, (len(drawn.batch.columns_L), 4), generator=generator)
    found = policy.score(drawn, ids_LK=ids_LK).logprobs_LK
    slopes = torch.randn(ids_LK.shape, generator=generator)
    (found * slopes).sum().backward()
    ours = {name: p.grad.clone() for name, p in policy.trainable() if p.grad is not None}
    policy.scorer.zero_grad()
    rows = []
    for row in drawn.batch.rows:
        ids = torch.tensor([[*row.prompt.token_ids, *row.completion.token_ids]])
        logits = policy.model(input_ids=ids, use_cache=False).logits[0, len(row.prompt.token_ids) - 1 : -1]
        rows.append(logits[torch.tensor(row.completion.loss_mask)])
    expected = torch.cat(rows).log_softmax(-1).gather(-1, ids_LK)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    (expected * slopes).sum().backward()
    for name, p in policy.trainable():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-3, atol=1e-5)
