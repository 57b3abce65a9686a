"""The memory prediction, by hand on a small model. What it is worth on a GPU: `tests.bench.train_phase`."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, MixtralConfig, PhiConfig

from rl.config import ModelConfig
from rl.config.read import load_config
from rl.model.adapters import add_lora
from rl.model.head import CHUNK_BYTES
from rl.model.loading import storage_dtype
from rl.plan.memory import GIB, OVERHEAD_BYTES, ModelSize, engine_bytes, plan_memory, training_bytes

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


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MambaConfig(num_hidden_layers=1), "mamba: it names no num_attention_heads"),
        (PhiConfig(num_hidden_layers=1), "phi: its MLPs have no gate"),
    ],
)
def test_a_model_without_gated_mlps_is_refused_with_the_reason(config, reason):
    with pytest.raises(ValueError, match=reason):
        ModelSize.of(config, fused_layers=True)


@pytest.mark.parametrize(
    ("overrides", "width"),
    [
        ([], 2),
        (["model.dtype=fp32"], 4),
        (["engine.dtype=float32"], 4),
        (["model.dtype=fp32", "engine.dtype=bfloat16"], 2),
    ],
)
def test_the_engine_is_as_wide_as_its_dtype(overrides, width):
    config = load_config(None, ["train.prompts_per_step=2", "train.group_size=3", *overrides])
    parts = engine_bytes(ModelSize.of(SMALL, fused_layers=True), config, 10)
    assert parts["engine weights"] == width * PARAMETERS
    assert parts["engine cache"] == width * 2 * 3 * 10 * (2 * 2 * 8)


def test_parts_of_lora_are_those_by_hand():
    config = load_config(None, ["model.dtype=bf16-mixed", "model.lora={r: 3}", "loss.kl_coef=0.1"])
    parts = training_bytes(ModelSize.of(SMALL, fused_layers=True), config, 1000)
    # Inputs and outputs of q, k and v, o, gate and up, down.
    adapters = 2 * 3 * (24 + 2 * 16 + 24 + 2 * 28 + 28)
    # Inputs of norms, queries and attention output, keys and values, gate and up; inputs of products; ranks.
    kept = (2 * 8 + 2 * 16 + 2 * 8 + 2 * 20) + (5 * 8 + 16 + 20) + 7 * 3
    assert parts == {
        "weights": 2 * PARAMETERS + 4 * adapters,
        "gradients": 4 * adapters,
        "optimizer": 8 * adapters,
        "weights in the compute dtype": 2 * adapters,
        "reference": 0,
        "activations": 1000 * 2 * 2 * kept,
        "logits": CHUNK_BYTES["cuda"],
        "overhead": OVERHEAD_BYTES,
    }


def test_lora_on_a_large_model_is_predicted_as_measured():
    """Workload W of tests/bench: 33.2 GiB on an H200 (recipes/README.md)."""
    qwen = LlamaConfig(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    config = load_config(None, ["model.lora={r: 16}", "train.token_budget=12288"])
    parts = training_bytes(ModelSize.of(qwen, fused_layers=True), config, 12288)
    assert sum(parts.values()) / GIB == pytest.approx(33.2, rel=0.05)


@pytest.mark.parametrize("dtype", ["bf16-mixed", "bf16"])
def test_an_adapter_costs_what_autograd_keeps_for_it(dtype):
    """Adapters everywhere against adapters of q_proj alone: the same model, but for the other adapters."""
    everywhere, only_q = (
        load_config(None, [f"model.dtype={dtype}", f"model.lora={{r: 3, target_modules: {targets}}}"])
        for targets in ("all-linear", "[q_proj]")
    )
    size = ModelSize.of(SMALL, fused_layers=True)
    a, b = (training_bytes(size, config, 1)["activations"] / size.layers for config in (everywhere, only_q))
    assert a - b == pytest.approx(saved_per_token(everywhere.model) - saved_per_token(only_q.model))


def saved_per_token(config: ModelConfig) -> float:
    """Bytes that autograd holds for a token and a layer, weights left out."""

    def saved(num_tokens: int) -> int:
        model = AutoModelForCausalLM.from_config(SMALL, dtype=storage_dtype(config))
        add_lora(model, config)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, torch.Tensor] = {}  # holds them, so that no address is used twice

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        is_mixed = config.dtype == "bf16-mixed"
        autocast = torch.autocast("cpu", torch.bfloat16) if is_mixed else contextlib.nullcontext()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
            output = model.base_model(input_ids=torch.arange(num_tokens)[None], use_cache=False)
        assert output.last_hidden_state.requires_grad
        return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in weights)

    return (saved(64) - saved(32)) / 32 / SMALL.num_hidden_layers
