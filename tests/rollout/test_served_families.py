"""Mixtures of experts on real vLLM: after two syncs log-probs are transformers', or the family is refused."""

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from recipes.engines import unserved_by_vllm
from rl.causal import CausalPolicy
from rl.config.read import load_config
from rollout.vllm.families import REFUSED, REFUSED_ON_CPU, SERVED
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
