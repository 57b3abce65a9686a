"""Which policy a run gets, what it trains, and what it says of it."""

from __future__ import annotations

import pytest
from accelerate import Accelerator

from rl.causal import CausalPolicy
from rl.config.moe import MoeConfig
from rl.config.read import load_config
from rl.moe.policy import with_experts
from rl.moe.routers import UnknownRouter
from tests.rl.moe.tiny import load, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_dir):
    return save("qwen3_moe", tmp_path_factory.mktemp("moe"), tiny_model_dir)


def causal(folder) -> CausalPolicy:
    config = load_config(None, [f"model.name={folder}", "model.dtype=fp32"])
    return CausalPolicy(config.model, Accelerator(cpu=True), temperature=1.0)


def test_what_is_done_with_the_router_is_said(folder):
    summary, warning = load(folder, "moe.replay=none")[0].said()
    assert summary == "mixture of experts: router trained, replay off, balance off"
    assert warning.startswith("warning: the router is trained without replay")
    frozen = load(folder, "moe.replay=none", "moe.router=freeze")[0]
    assert list(frozen.said()) == [
        "mixture of experts: router frozen, replay off, balance off (a frozen router has none)"
    ]
    assert not [n for n, _ in frozen.trainable() if "mlp.gate." in n]
    adapted = load(folder, "model.lora={r: 2, alpha: 4}")[0]
    assert list(adapted.said()) == [
        "mixture of experts: router frozen, replay on, balance off (a frozen router has none)"
    ]
    assert not [n for n, _ in adapted.trainable() if "mlp.gate." in n]
    assert [n for n, _ in adapted.trainable() if "mlp.experts." in n]
    with pytest.raises(ValueError, match=r"moe\.router=train: neither adapters"):
        load(folder, "model.lora={r: 2, alpha: 4}", "moe.router=train")


def test_a_dense_model_keeps_its_policy_and_refuses_keys_that_would_do_nothing(tiny_model_dir):
    policy = causal(tiny_model_dir)
    assert with_experts(policy, MoeConfig(), print) is policy
    with pytest.raises(ValueError, match=r"moe: balance, z_loss_coef are set, .* has no routers"):
        with_experts(policy, MoeConfig(balance="switch", z_loss_coef=0.1), print)


def test_an_unknown_router_is_trained_as_it_is_or_refused_by_name(tiny_model_dir, tmp_path):
    policy, said = causal(save("jetmoe", tmp_path, tiny_model_dir)), []
    assert with_experts(policy, MoeConfig(), said.append) is policy
    assert len(said) == 1 and said[0].startswith("warning: jetmoe: JetMoeMo")
    for asked in ({"replay": "engine"}, {"balance": "switch"}, {"router": "freeze"}):
        with pytest.raises(UnknownRouter, match="jetmoe: JetMoeMo"):
            with_experts(policy, MoeConfig(**asked), said.append)


def test_an_engine_without_routes_is_said_or_refused(folder):
    policy, _ = load(folder)
    assert policy.can_replay(None) and policy.replays
    assert not policy.can_replay("this engine has none") and not policy.replays
    assert next(policy.said()).endswith("replay off (this engine has none), balance off")
    with pytest.raises(ValueError, match=r"moe\.replay=engine: this engine has none; use moe\.replay=none"):
        load(folder, "moe.replay=engine")[0].can_replay("this engine has none")


def test_a_router_in_fp32_needs_policy_and_engine_in_fp32():
    assert load_config(None, ["moe.router_fp32=true", "model.dtype=fp32"]).moe.router_fp32
    for coarse in ("model.dtype=bf16-mixed", "engine.dtype=bfloat16"):
        with pytest.raises(ValueError, match=r"moe\.router_fp32=true needs routers in fp32"):
            load_config(None, ["moe.router_fp32=true", "model.dtype=fp32", coarse])
