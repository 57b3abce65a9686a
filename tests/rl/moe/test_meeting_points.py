"""Where adapters, routes, balance and references meet, on the path that a run takes."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoTokenizer

from recipes.kinds import causal_policy
from rl.batch import pack
from rl.config.read import load_config, read_config
from rl.config.sft import SftConfig
from rl.moe.balance import bias_of
from rl.references import make_reference
from rl.update import pack_rules
from tests.rl.moe.tiny import load, random_routes, save
from tests.scoring import relative_error

LORA = "model.lora={r: 4, alpha: 8, target_modules: all-linear}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_dir):
    return save("qwen3_moe", tmp_path_factory.mktemp("moe"), tiny_model_dir)


def policy_of(folder, *overrides):
    """As a run makes it, with adapters that change something."""
    settings = [f"model.name={folder}", f"run_dir={folder / 'run'}", "model.dtype=fp32", "loss.kl_coef=0"]
    config = load_config(None, [*settings, "loss.clip_high=4.0", *overrides])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(3)
    policy = causal_policy(config, config.model, Accelerator(cpu=True), tokenizer, 40, lambda said: None)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return policy, config


def with_routes(policy, groups):
    found = copy.deepcopy(groups)
    for number, completion in enumerate(completion for group in found for completion in group.completions):
        completion.routes = random_routes(policy, len(completion.token_ids), number)
    return found


def prepared(policy, config, groups, advantages):
    return policy.prepare(pack(groups, advantages, pack_rules(config))[0], draw=0)


CUTS = [["train.token_budget=60"], ["model.attention=rows"]]
CUTS += [["train.token_budget=60", "model.gradient_checkpointing=true"]]


@pytest.mark.rotation
@pytest.mark.parametrize("cut", CUTS)
def test_no_cut_changes_the_gradient_of_adapted_experts_with_routes_and_balance(
    folder, ragged_groups, gradients, cut
):
    groups, advantages = ragged_groups(num_groups=4)
    found = []
    for setting in (["train.token_budget=100000"], cut):
        policy, config = policy_of(folder, LORA, "moe.balance=switch", "moe.balance_coef=1.0", *setting)
        found.append(gradients(policy, config, with_routes(policy, groups), advantages))
    assert any("experts" in name for name in found[0])
    assert relative_error(found[1], found[0]) < 1e-5


def test_the_reference_below_split_experts_is_the_base_model_without_routes(folder, ragged_groups):
    groups, advantages = ragged_groups(num_groups=2)
    (policy, config), (base, _) = policy_of(folder, LORA), policy_of(folder, "moe.replay=none")
    (given,) = prepared(policy, config, with_routes(policy, groups), advantages)
    found = make_reference(policy, moves=False).logprobs(given)
    with torch.no_grad():
        (plain,) = prepared(base, config, groups, advantages)
        torch.testing.assert_close(found, base.score(plain).logprobs_L)
        assert (policy.score(given).logprobs_L - found).abs().max() > 0.1


def test_a_pass_before_the_first_step_is_no_part_of_its_load(folder, ragged_groups, gradients):
    """As the probe of memory on a GPU makes two."""
    groups, advantages = ragged_groups(num_groups=2)
    found = []
    for probes in (False, True):
        policy, config = load(folder)
        if probes:
            for each in prepared(policy, config, groups, advantages):
                policy.backward(policy.score(each).logprobs_L.sum(), last=True)
        gradients(policy, config, groups, advantages)
        found.append(policy.health._latest)
    assert torch.equal(*found)


def test_a_reference_that_follows_selects_experts_as_the_policy_does(tiny_model_dir, tmp_path):
    policy, _ = load(save("deepseek_v3", tmp_path, tiny_model_dir), "moe.bias_rate=0.01")
    reference = make_reference(policy, moves=True)
    bias = bias_of(policy.sites[0])
    bias += 1.0
    reference.follow(policy, 1.0)
    theirs = dict(reference.scorer.model.named_buffers())[f"{policy.sites[0].name}.e_score_correction_bias"]
    assert torch.equal(theirs, bias)


def test_biases_that_transformers_loads_as_trainable_are_not_trained(tmp_path, tiny_model_dir):
    policy, _ = load(save("laguna", tmp_path, tiny_model_dir))
    biases = [bias_of(site) for site in policy.sites]
    assert biases and all(isinstance(bias, torch.nn.Parameter) for bias in biases)
    assert not {id(bias) for bias in biases} & {id(p) for _, p in policy.trainable()}


def test_biases_that_no_checkpoint_of_adapters_would_hold_are_refused(folder):
    for read in (load_config, lambda _, given: read_config(SftConfig, None, ["data.source=x.jsonl", *given])):
        with pytest.raises(ValueError, match=r"moe\.bias_rate=0\.01 moves biases of the base"):
            read(None, [LORA, "moe.bias_rate=0.01"])


def test_the_way_to_compute_experts_holds_beside_adapters_or_is_refused(folder):
    attention = "model.lora={r: 4, alpha: 8, target_modules: [q_proj]}"
    policy, _ = policy_of(folder, attention, "moe.experts_implementation=eager")
    assert policy.model.config._experts_implementation == "eager"
    with pytest.raises(ValueError, match=r"moe\.experts_implementation=eager: experts with adapters"):
        policy_of(folder, LORA, "moe.experts_implementation=eager")


def test_the_measured_way_to_compute_experts_is_kept_where_a_run_goes_on(folder, tmp_path):
    first, _ = policy_of(folder, f"run_dir={tmp_path}")
    file = tmp_path / "experts_implementation.txt"
    assert file.read_text() == f"{first.model.config._experts_implementation}\n"
    for way in ("eager", "batched_mm"):
        file.write_text(way)
        assert policy_of(folder, f"run_dir={tmp_path}")[0].model.config._experts_implementation == way


def test_completions_without_routes_count_as_tokens_that_are_not_replayed(folder, ragged_groups):
    groups, advantages = ragged_groups(num_groups=1)
    policy, config = load(folder)
    (given,) = prepared(policy, config, groups, advantages)
    replayed, total = policy.score(given).metrics["moe/replayed"]
    tokens = sum(len(c.token_ids) for group in groups for c in group.completions)
    assert (replayed, total) == (0, 4 * tokens)
