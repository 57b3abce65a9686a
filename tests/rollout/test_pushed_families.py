"""Pushed files on real vLLM in this process: whole, then a delta over what the model holds, by family."""

from dataclasses import asdict

import pytest
import torch
from accelerate import Accelerator

from rl.causal import CausalPolicy
from rl.config.read import load_config
from rollout.fingerprint import compared_part, fingerprints, mismatches
from rollout.vllm.weight_files import WeightFiles
from tests.conftest import make_tiny_tokenizer
from tests.rl.families import save_tiny
from tests.vllm_engines import needs_vllm, served_config, start_vllm

pytestmark = [needs_vllm, pytest.mark.rotation]

MIXTURES = ("qwen3_moe", "mixtral", "exaone_moe")  # experts by three names


def moved(policy, version, share):
    """Adds to a share of the values of every tensor."""
    generator = torch.Generator().manual_seed(version)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            chosen = torch.rand(parameter.shape, generator=generator) < share
            chosen.view(-1)[version] = True
            parameter += 0.05 * chosen


@pytest.mark.parametrize(
    ("name", "dtype"), [("qwen3", "fp32"), ("qwen3", "bf16"), *((name, "fp32") for name in MIXTURES)]
)
def test_a_delta_is_laid_over_what_the_model_holds(name, dtype, tmp_path):
    model = tmp_path / "model"
    save_tiny(name, model, served_config(name))
    tokenizer = make_tiny_tokenizer(model)
    config = load_config(None, [f"model.name={model}", f"model.dtype={dtype}", "loss.kl_coef=0"])
    policy = CausalPolicy(config.model, Accelerator(cpu=True), temperature=1.0)
    options = {"max_model_len": 96, "max_num_seqs": 8, "kv_cache_gib": 0.03}
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    engine = start_vllm(model, tokenizer, dtype=kind, **options)
    core = engine._core
    try:
        files = WeightFiles(tmp_path / "weights", engine.tensors)
        for version, share in ((1, 1.0), (2, 0.01), (3, 0.01)):
            moved(policy, version, share)
            push = files.write(policy.weights(), version=version)
            assert (push.base != "", push.changed < 0.05) == (version > 1, version > 1)
            core.pause()
            assert core.call("cohort_load", asdict(push)) == {"holds": push.content}
            files.commit()
            core.resume(version)
            own = dict(iter(policy.weights()))
            parts = ((n, compared_part(own[h.source], h, version)) for n, h in engine.tensors.items())
            assert mismatches(fingerprints(parts), engine.fingerprints()) == []
            ids, expected = policy.weights().canary()
            gaps = [abs(a - b) for a, b in zip(engine.prompt_logprobs(ids), expected, strict=True)]
            assert sum(gaps) / len(gaps) < (1e-4 if dtype == "fp32" else 0.2)
    finally:
        engine.close()
