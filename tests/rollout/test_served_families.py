"""Mixtures of experts on real vLLM: after two syncs log-probs are transformers', or the family is refused."""

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from recipes.engines import unserved_by_vllm
from rl.causal import CausalPolicy
from rl.config.read import load_config
from rollout.vllm.families import REFUSED, REFUSED_ON_CPU, SERVED, refusal
from rollout.weight_sync import publish
from tests.conftest import make_tiny_tokenizer
from tests.rl.families import save_tiny, tiny_config
from tests.vllm_engines import needs_vllm, served_config, start_vllm

pytestmark = needs_vllm


@pytest.mark.rotation
@pytest.mark.parametrize("name", SERVED)
def test_a_served_family_has_transformers_log_probs_after_two_syncs(name, tmp_path):
    """fp32; measured 2e-7 to 6e-7 nats on average."""
    save_tiny(name, tmp_path, served_config(name))
    tokenizer = make_tiny_tokenizer(tmp_path)
    config = load_config(None, [f"model.name={tmp_path}", "model.dtype=fp32", "loss.kl_coef=0"])
    policy = CausalPolicy(config.model, Accelerator(cpu=True), temperature=1.0)
    assert unserved_by_vllm(policy.model) is None
    options = {"max_model_len": 96, "max_num_seqs": 8, "kv_cache_gib": 0.03}
    engine = start_vllm(tmp_path, tokenizer, dtype=torch.float32, **options)
    try:
        for version in (1, 2):
            with torch.no_grad():
                for _, parameter in policy.trainable():
                    parameter += 0.02 * torch.randn(
                        parameter.shape, generator=torch.Generator().manual_seed(version)
                    )
            report = publish(engine, policy.weights(), version=version, tolerance=1e-4)
            assert report.canary_max_gap < 1e-4
    finally:
        engine.close()


@pytest.mark.parametrize("name", [*REFUSED, *REFUSED_ON_CPU])
def test_an_unserved_family_is_refused_by_name_before_the_engine_starts(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(name))
    assert unserved_by_vllm(model).startswith(f"{name}: vLLM")


def test_experts_that_vllm_would_pad_are_refused_before_the_engine_starts():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(served_config("qwen3_moe", moe_intermediate_size=24))
    assert unserved_by_vllm(model) == (
        "qwen3_moe: experts have 24 rows, and vLLM on a CPU takes new weights only of multiples of 32"
    )


def test_deepseek_without_the_keys_of_its_router_is_refused_by_their_names():
    """With them vLLM's first log-prob is transformers', 5e-7; without, 0.004 off (softmax, no bias)."""
    config = tiny_config("deepseek_v3")
    assert refusal(config, None, on_cpu=False) == (
        "deepseek_v3: vLLM would route unlike transformers; add "
        '{"scoring_func": "sigmoid", "topk_method": "noaux_tc"} to config.json'
    )
    config.scoring_func, config.topk_method = "sigmoid", "noaux_tc"
    assert refusal(config, None, on_cpu=False) is None
    assert refusal(config, None, on_cpu=True).startswith("deepseek_v3: vLLM's rotary kernel")


def test_vllms_rotary_kernel_on_a_cpu_takes_heads_for_tokens():
    """The cause of DeepSeek's refusal: once this fails, vLLM has fixed it, and the family can be served.

    Three tokens of two heads. Of [tokens, heads x size] all rows are right. Of [tokens, heads, size], which
    latent attention passes, row i of the six is turned by position i of the three tokens.
    """
    from vllm import _custom_ops as ops

    size, positions = 64, torch.tensor([3, 4, 5])
    angles = torch.arange(8.0)[:, None] * 10_000 ** (-torch.arange(0, size, 2) / size)
    cache = torch.cat([angles.cos(), angles.sin()], -1)
    query = torch.randn(3, 2, size, generator=torch.Generator().manual_seed(0))

    def turned(rows, places):
        even, odd, angle = rows[:, ::2], rows[:, 1::2], angles[places]
        pairs = even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()
        return torch.stack(pairs, -1).flatten(1)

    def by_vllm(shape):
        found, key = query.clone().view(shape), torch.zeros(3, size)
        ops.rotary_embedding(positions, found, key, size, cache, False)
        return found.view(6, size)

    rows = query.view(6, size)
    torch.testing.assert_close(by_vllm((3, -1)), turned(rows, positions.repeat_interleave(2)))
    wrong = torch.cat([turned(rows[:3], positions), rows[3:]])
    torch.testing.assert_close(by_vllm((3, 2, size)), wrong)
