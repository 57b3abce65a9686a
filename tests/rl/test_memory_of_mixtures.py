"""Mixtures of experts in the memory prediction: published models, and what autograd really keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    JambaConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from recipes.kinds import adapt
from rl.config.read import load_config
from rl.model.loading import narrow_under_autocast, storage_dtype
from rl.moe.adapters import split_experts
from rl.plan.memory import Card, training_parts
from rl.plan.search import fit, replaced
from rl.plan.sizes import ModelSize, NoPrediction
from tests.saved_tensors import bytes_kept

GIB = 2**30
HEADS: dict[str, Any] = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
QWEN3_30B = Qwen3MoeConfig(
    **HEADS, vocab_size=151936, hidden_size=2048, num_hidden_layers=48, moe_intermediate_size=768
)
GLM_AIR = Glm4MoeConfig(
    **HEADS | {"num_attention_heads": 96, "num_key_value_heads": 8},
    attention_bias=True,
    vocab_size=151552,
    hidden_size=4096,
    num_hidden_layers=46,
)
GRANITE = GraniteMoeConfig(
    vocab_size=49155,
    hidden_size=1024,
    intermediate_size=512,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_key_value_heads=8,
    num_local_experts=32,
    num_experts_per_tok=8,
    tie_word_embeddings=True,
)


def dense(vocabulary, layers, hidden, attention, beside=0, *, tied=False):
    """Embedding, head and last norm; of each layer attention, two norms, and what else is given."""
    ends = (1 if tied else 2) * vocabulary * hidden + hidden
    return ends + layers * (attention + 2 * hidden + beside)


@pytest.mark.parametrize(
    ("config", "parameters", "in_experts"),
    [
        # As their hub pages say: Mixtral-8x7B, Qwen1.5-MoE-A2.7B, Qwen3-30B-A3B, OLMoE-1B-7B.
        (MixtralConfig(), 46_702_792_704, 32 * 8 * 3 * 4096 * 14336),
        (Qwen2MoeConfig(vocab_size=151936), 14_315_784_192, 24 * 60 * 3 * 2048 * 1408),
        (QWEN3_30B, 30_532_122_624, 48 * 128 * 3 * 2048 * 768),
        (OlmoeConfig(intermediate_size=1024), 6_919_161_856, 16 * 64 * 3 * 2048 * 1024),
        # Granite 3.0 1B-A400M by hand: attention of 16 and 8 heads of 64, a router, and the experts.
        (
            GRANITE,
            dense(49155, 24, 1024, 2 * 1024 * (1024 + 512), 32 * 1024, tied=True) + 24 * 32 * 3 * 1024 * 512,
            24 * 32 * 3 * 1024 * 512,
        ),
        # GLM-4.5-Air by hand: 96 and 8 heads of 128 with biases; one dense layer, one shared expert.
        (
            GLM_AIR,
            dense(151552, 46, 4096, 4096 * 128 * (2 * 96 + 2 * 8) + 128 * (96 + 2 * 8))
            + 45 * (128 * 4096 + 129 * 3 * 4096 * 1408)
            + 3 * 4096 * 10944,
            45 * 128 * 3 * 4096 * 1408,
        ),
    ],
)
def test_published_mixtures_are_counted_to_the_last_weight(config, parameters, in_experts):
    size = ModelSize.of(config, fused_layers=True)
    assert size.experts is not None
    assert (size.parameters, size.experts.weights) == (parameters, in_experts)


def test_a_token_meets_few_of_the_experts():
    size = ModelSize.of(QWEN3_30B, fused_layers=True)
    # Attention of each layer, 8 experts, and the head once; the card says 3.3B with the embedding.
    attention = 2048 * 128 * (2 * 32 + 2 * 4)
    assert size.active == 48 * (attention + 8 * 3 * 2048 * 768) + 151936 * 2048
    assert (size.active + 151936 * 2048) / 1e9 == pytest.approx(3.3, abs=0.06)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (DeepseekV3Config(num_hidden_layers=4), "deepseek_v3: latent attention"),
        (GptOssConfig(num_hidden_layers=2), "mixtures of experts of the kind gpt_oss"),
        (JambaConfig(num_hidden_layers=8), "jamba: layers of linear_attention"),
    ],
)
def test_mixtures_that_are_not_counted_are_refused_by_name(config, reason):
    with pytest.raises(NoPrediction, match=reason):
        ModelSize.of(config, fused_layers=True)


TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 3,
    "eos_token_id": 1,
}
MIXTURES = {
    "qwen3_moe": Qwen3MoeConfig(**TINY, head_dim=24, moe_intermediate_size=56, num_experts=8),
    "olmoe": OlmoeConfig(**TINY, intermediate_size=56, num_experts=8),
    "mixtral": MixtralConfig(**TINY, intermediate_size=56, num_local_experts=8),
    "granitemoe": GraniteMoeConfig(**TINY, intermediate_size=56, num_local_experts=8),
    "qwen2_moe": Qwen2MoeConfig(
        **TINY, moe_intermediate_size=56, shared_expert_intermediate_size=120, num_experts=8
    ),
}
FORMS: list[tuple[str, str | None]] = [(dtype, None) for dtype in ("fp32", "bf16-mixed", "bf16")]
FORMS += [
    (dtype, lora)
    for dtype in ("bf16-mixed", "bf16")
    for lora in ("{r: 3}", "{r: 3, target_modules: [q_proj]}")
]


@pytest.mark.parametrize(("dtype", "lora"), FORMS)
@pytest.mark.parametrize("family", MIXTURES)
def test_what_a_mixture_keeps_for_its_backward_pass_is_predicted_within_a_tenth(family, dtype, lora):
    """Without fused layers: transformers' norms and grouped experts, counted by autograd's hooks."""
    config = load_config(None, [f"model.dtype={dtype}", *([f"model.lora={lora}"] if lora else [])])
    form = "bf16" if lora else dtype
    size = replace(ModelSize.of(MIXTURES[family], fused_layers=False, dtype=form), adapt=adapt)
    parts = {part.name: part.bytes for part in training_parts(size, config, 128)}
    predicted = parts["activations"] + parts["weights in the compute dtype"] + parts.get("adapted experts", 0)
    trained, kept = trained_and_kept(MIXTURES[family], config.model, 128)
    assert predicted == pytest.approx(kept, rel=0.1)
    assert parts["gradients"] == trained


def trained_and_kept(shape, config, num_tokens: int) -> tuple[int, int]:
    """Bytes of what is trained, and bytes that autograd keeps of a forward pass, weights left out."""
    model = AutoModelForCausalLM.from_config(shape, dtype=storage_dtype(config))
    if config.lora:
        adapt(model, config)
    split_experts(model)
    model.get_input_embeddings().register_forward_hook(narrow_under_autocast)
    total = bytes_kept(model, config.dtype, num_tokens)
    return sum(p.nbytes for p in model.parameters() if p.requires_grad), total


def test_a_mixture_is_planned_with_all_its_experts():
    """30.5e9 weights in bf16 are 57 GiB twice, in the trainer and in the engine."""
    size = ModelSize.of(QWEN3_30B, fused_layers=True)
    lora = "model.lora={r: 16, target_modules: [q_proj, v_proj]}"
    config = load_config(None, ["data.max_prompt_length=512", "sampling.max_completion_length=512", lora])
    assert fit(size, config, Card("a GPU", 80 * GIB), 1024) is None
    values = fit(size, config, Card("a GPU", 192 * GIB), 1024)
    assert values is not None and values["train.token_budget"] >= 8192
    all_weights = replaced(config, {"model.lora": None})
    found = [fit(size, all_weights, Card("a GPU", 140 * GIB, number), 1024) for number in (4, 8)]
    assert found[0] is None and found[1] is not None and found[1]["train.sharding"] == "full"


def test_parts_of_a_split_mixture_are_those_by_hand():
    """On four processes: two layers with all experts and the head, gradients of a layer in bf16 and fp32."""
    size, config = ModelSize.of(QWEN3_30B, fused_layers=True), load_config(None, ["train.sharding=full"])
    parts = {part.name: part.bytes for part in training_parts(size, config, 1000, 4)}
    attention, experts = 2 * 2048 * 4096 + 2 * 2048 * 512 + 128 * 2048, 128 * 3 * 2048 * 768
    assert parts["weights"] == parts["gradients"] == 30_532_122_624
    gathered = 2 * (2 * (attention + experts) + 151936 * 2048)
    assert parts["gathered weights"] == pytest.approx(gathered + 30_532_122_624 // 48 * 6, rel=1e-3)
