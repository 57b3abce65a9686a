"""The memory prediction, by hand on a small model. What it is worth on a GPU: `tests.bench.train_phase`."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, MixtralConfig

from rl.config_file import load_config
from rl.logprobs import CHUNK_BYTES
from rl.memory import GIB, OVERHEAD_BYTES, ModelSize, plan_memory, training_bytes

SMALL = LlamaConfig(
    vocab_size=100,
    hidden_size=8,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    tie_word_embeddings=True,
)
# q 8x16, k and v 8x8, o 16x8, gate, up and down 8x20; two norms a layer, one at the end; the embedding.
LINEAR = 2 * (128 + 64 + 64 + 128 + 3 * 160)
PARAMETERS = LINEAR + 2 * 16 + 8 + 800
# Two inputs of norms and their outputs, queries and attention output, keys and values, gate, up and product.
SAVED = 4 * 8 + 2 * 16 + 2 * 8 + 3 * 20


def test_a_small_model_is_counted_as_by_hand():
    size = ModelSize.of(SMALL, fused_layers=True)
    assert (size.parameters, size.linear, size.head) == (PARAMETERS, LINEAR, 800)
    assert (size.saved_per_token, size.cache_per_token) == (SAVED, 2 * 2 * 8)


def test_parts_of_mixed_precision_training_are_those_by_hand():
    config = load_config(None, ["loss.kl_coef=0.1", "model.dtype=bf16-mixed"])
    parts = training_bytes(ModelSize.of(SMALL, fused_layers=True), config, 1000)
    assert parts == {
        "weights": 4 * PARAMETERS,
        "gradients": 4 * PARAMETERS,
        "optimizer": 8 * PARAMETERS,
        "weights in the compute dtype": 2 * LINEAR,
        "reference": 4 * PARAMETERS,
        "activations": 1000 * 2 * 2 * SAVED,
        "logits": CHUNK_BYTES["cuda"] + 800 * (2 + 4 + 2),
        "overhead": OVERHEAD_BYTES,
    }


def test_the_planned_token_budget_fits_and_the_next_one_does_not():
    config = load_config(None, ["loss.kl_coef=0", "train.token_budget=4096"])
    model = LlamaConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8)
    capacity = 24 * GIB
    plan = plan_memory(model, config, capacity=capacity, max_length=1000)
    size = ModelSize.of(model, fused_layers=True)
    engine = plan.engine_share * capacity
    beside = [sum(training_bytes(size, config, plan.token_budget + n).values()) + engine for n in (0, 1024)]
    assert 0 < plan.token_budget < 65536
    assert beside[0] <= 0.92 * capacity < beside[1]


def test_a_mixture_of_experts_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="mixtures of experts"):
        ModelSize.of(MixtralConfig(num_hidden_layers=1), fused_layers=True)
