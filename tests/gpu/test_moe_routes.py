"""On one GPU: routes that vLLM returns are those of a tiny Qwen3-MoE, and replaying them narrows the gap.

python -m pytest tests/gpu/test_moe_routes.py -s
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from rl.batch import pack
from rl.causal import CausalPolicy
from rl.config.read import load_config
from rl.moe.policy import MoePolicy
from rl.moe.routers import find_routers
from rl.types import Prompt, Reward, SamplingParams, ScoredGroup
from rl.update import pack_rules
from tests.calling import call
from tests.scoring import prepared
from tests.vllm_engines import needs_vllm, start_vllm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    needs_vllm,
]
LAYERS, EXPERTS, CHOSEN, LENGTH = 4, 8, 2, 48


@pytest.fixture(scope="module")
def folder(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.save_pretrained(folder)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        norm_topk_prob=True,
        max_position_embeddings=512,
        initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def policy(folder):
    settings = [f"model.name={folder}", "model.dtype=bf16", "loss.kl_coef=0", "moe.replay=engine"]
    config = load_config(None, settings)
    device = SimpleNamespace(
        device=torch.device("cuda:0"), num_processes=1, process_index=0, is_main_process=True
    )
    inner = CausalPolicy(config.model, device, temperature=1.0)
    inner.settle_attention(LENGTH + 40)
    return MoePolicy(inner, find_routers(inner.model), config.moe)


@pytest.fixture(scope="module")
def engine(folder, policy):
    options = {"dtype": torch.bfloat16, "max_model_len": 256, "gpu_memory_utilization": 0.2}
    engine = start_vllm(folder, policy.tokenizer, routes=True, enforce_eager=True, **options)
    yield engine
    engine.close()


PROMPTS = [Prompt(str(i), "", tuple(5 + (7 * i + j) % 90 for j in range(3 + 5 * i))) for i in range(6)]
SAMPLING = SamplingParams(LENGTH, stop_token_ids=(11, 12, 13))


def measured(policy, groups) -> dict[str, float]:
    """Flip rate, share replayed, and mean and greatest gap to the engine's log-probs, in nats."""
    scored = [ScoredGroup(group, [Reward(1.0)] * len(group.completions)) for group in groups]
    rules = pack_rules(load_config(None, ["loss.kl_coef=0"]), share_prompts=policy.shares_prompts)
    (batch,) = pack(scored, [[1.0] * len(group.completions) for group in groups], rules)
    totals, gaps = {}, []
    for micro_batch in batch.micro_batches:
        ready = prepared(policy, micro_batch)
        with torch.no_grad():
            scores = policy.score(ready)
        gaps.append((scores.logprobs_L - ready.batch.behavior_logprobs_L).abs())
        for name, (total, count) in scores.metrics.items():
            before = totals.get(name, (0.0, 0.0))
            totals[name] = (before[0] + total.item(), before[1] + count.item())
    gap = torch.cat(gaps)
    return {name: total / count for name, (total, count) in totals.items()} | {
        "gap_mean": gap.mean().item(),
        "gap_max": gap.max().item(),
    }


def test_routes_of_vllm_are_those_of_the_policy_and_replay_narrows_the_gap(engine, policy):
    groups = engine.generate(call(PROMPTS, num_completions=8, sampling=SAMPLING, seeds=range(6)))
    completions = [c for group in groups for c in group.completions]
    for completion in completions:
        assert completion.routes.shape == (len(completion.token_ids), LAYERS, CHOSEN)
        assert completion.routes.dtype == np.int8 and (completion.routes[-1] == -1).all()
        rows = completion.routes[:-1]
        assert ((rows >= 0) & (rows < EXPERTS)).all() and (rows[..., 0] != rows[..., 1]).all()
    assert len({len(c.token_ids) for c in completions}) > 3
    replayed = measured(policy, groups)
    policy.replays = False
    live = measured(policy, groups)
    policy.replays = True
    for completion in completions:
        completion.routes = np.concatenate([completion.routes[-1:], completion.routes[:-1]])
    shifted = measured(policy, groups)
    print({"replayed": replayed, "live": live, "shifted": shifted})
    number = sum(len(c.token_ids) for c in completions)
    assert replayed["moe/replayed"] == pytest.approx(1 - len(completions) / number)
    assert replayed["moe/flip_rate"] < 0.1 < 0.5 < shifted["moe/flip_rate"]
    assert replayed["gap_mean"] <= 1.02 * live["gap_mean"] and replayed["gap_mean"] < 0.1
    assert "moe/flip_rate" not in live and shifted["gap_mean"] > 2 * replayed["gap_mean"]


def test_completions_that_an_update_interrupts_keep_a_route_for_each_token(engine, policy):
    """A pause in the middle, after which the same weights go on as version 1."""
    engine.submit(call(PROMPTS, num_completions=8, sampling=SamplingParams(200), seeds=range(6)))
    groups = engine.collect(timeout_s=0.3)
    engine.update_weights(iter(policy.weights()), version=1)
    while engine.in_flight:
        groups += engine.collect(timeout_s=60)
    spans = [c.version_spans for group in groups for c in group.completions]
    found = measured(policy, groups)
    print({"spans": spans[:3], **found})
    assert any(len(of_completion) == 2 for of_completion in spans)
    assert found["moe/flip_rate"] < 0.1 and found["moe/replayed"] == pytest.approx(199 / 200)
