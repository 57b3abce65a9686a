"""RL of a diffusion model on a GPU: its sampler is proved to hold the policy's weights, and both agree."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from recipes.diffusion_rl import make_masked_engine
from rl.batch import pack
from rl.config.read import load_config
from rl.diffusion.rl_policy import MaskedPolicy
from rl.types import Prompt, Reward, SamplingParams, ScoredGroup
from rl.update import pack_rules
from rollout.weight_sync import publish
from tests.bench.workload import Workload, write_model
from tests.calling import call
from tests.scoring import logprobs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("lora", ["model.lora=null", "model.lora={r: 8, alpha: 16}"])
def test_the_sampler_holds_what_the_policy_learns_and_scores_alike(tmp_path, lora):
    name = str(write_model(tmp_path, Workload(shape="tiny")))
    settings = ["model.dtype=bf16-mixed", "diffusion.mask_token=<t500>", "diffusion.block_length=8", lora]
    settings += ["diffusion.estimator.name=trace", "sampling.max_completion_length=16", "loss.kl_coef=0"]
    config = load_config(None, [f"model.name={name}", *settings, "loss.sampler_correction={}"])
    policy = MaskedPolicy(config, Accelerator(), name=name)
    engine = make_masked_engine(config, config.model, policy, dtype=torch.bfloat16)  # type: ignore[arg-type]
    generator = torch.Generator(policy.device).manual_seed(0)
    for version in range(3):
        with torch.no_grad():
            for _, p in policy.trainable():
                p.add_(1e-2 * torch.randn(p.shape, generator=generator, device=p.device))
        publish(engine, policy.weights(), version=version, tolerance=config.canary_tolerance)
        assert not any(held.sampled for held in engine.tensors.values())

    prompts = [Prompt(f"p{n}", "", tuple(range(1000, 1000 + n))) for n in (5, 17, 9)]
    sampling = SamplingParams(16, stop_token_ids=tuple(range(100)))
    groups = engine.generate(
        call(prompts, num_completions=4, sampling=sampling, seeds=[1, 2, 3], with_logprobs=True)
    )
    scored = [ScoredGroup(g, [Reward(float(i)) for i in range(4)]) for g in groups]
    batches = pack(scored, [[1.0, -1.0, 1.0, -1.0]] * 3, pack_rules(config))
    for micro_batch in batches[0].micro_batches:
        with torch.no_grad():
            ours = logprobs(policy, micro_batch).cpu()
        gaps = ours - micro_batch.behavior_logprobs_L
        assert gaps.abs().mean() < 0.02 and gaps.abs().max() < 0.5
