"""One GRPO update on tiny random models of many families: packed where that is exact, else one sequence at
a time.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from accelerate import Accelerator

from rl.batch import pack
from rl.config.read import load_config
from rl.policy import Policy, _plain_logprobs
from rl.update import pack_rules, update_policy

SMALL = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
HEAD = {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama3": ("Llama", HEAD | {"rope_parameters": LLAMA3_ROPE}),
    "gemma2": ("Gemma2", HEAD | {"sliding_window": 6, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3", HEAD | {"sliding_window": 6, "query_pre_attn_scalar": 8}),
    "mistral": ("Mistral", HEAD | {"sliding_window": 6}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", HEAD),
    "phi3": ("Phi3", {}),
    "granite": ("Granite", {"logits_scaling": 4.0}),
    "cohere": ("Cohere", {"logit_scale": 0.5}),
    "deepseek_v2": ("DeepseekV2", MLA),
    "deepseek_v3": ("DeepseekV3", MLA | {"q_lora_rank": 8}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", HEAD | EXPERTS),
    "gpt_oss": ("GptOss", HEAD | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}),
    "mamba": ("Mamba", {"state_size": 4, "expand": 2, "conv_kernel": 4}),
    "falcon_mamba": ("FalconMamba", {"state_size": 4}),
}
ROWS_ONLY = {"mamba", "falcon_mamba"}
CONFIG_NAMES = {"Gemma3": "Gemma3TextConfig"}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_is_exact_on_every_family(family, ragged_groups, tiny_model_dir, tmp_path):
    name, extra = FAMILIES[family]
    config = getattr(transformers, CONFIG_NAMES.get(name, f"{name}Config"))(**(SMALL | extra))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path)
    settings = load_config(None, [f"model.name={tmp_path}", "model.dtype=fp32", "loss.kl_coef=0"])
    policy = Policy(settings.model, Accelerator(cpu=True), temperature=1.0, with_reference=False)
    reason = policy.settle_attention()
    assert (reason is None) == (family not in ROWS_ONLY), reason
    groups, advantages = ragged_groups(num_groups=3, group_size=3)
    batches = pack(groups, advantages, pack_rules(settings))
    (micro_batch,) = batches[0].micro_batches
    with torch.no_grad():
        ours = policy.logprobs(micro_batch)[0]
        policy.set_packed(False)
        plain = _plain_logprobs(policy.model.eval(), micro_batch)
        policy.scorer.train()
        policy.set_packed(reason is None)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=2e-4)
    before = {n: p.detach().clone() for n, p in policy.trainable()}
    optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=1.0)
    result = update_policy(policy, optimizer, batches, settings.loss)
    assert result.num_updates == 1 and result.metrics["policy/grad_norm"] > 0
    assert any((p != before[n]).any() for n, p in policy.trainable())
