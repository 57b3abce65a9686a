"""The memory prediction, by hand on a small model. What it is worth on a GPU: `tests.bench.train_phase`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, PhiConfig

from recipes.kinds import adapt
from rl.config import Config, ModelConfig
from rl.config.read import load_config, replaced
from rl.model.adapters import add_lora
from rl.model.head import CHUNK_BYTES
from rl.model.loading import storage_dtype
from rl.model.packed import PACKED, Block, Layout
from rl.plan.measured import layer_bytes, measured_size
from rl.plan.memory import (
    GIB,
    OVERHEAD_BYTES,
    Card,
    cache_bytes,
    engine_weights,
    plan_memory,
    training_parts,
)
from rl.plan.search import HOST_RATE, SLEEP_S, fit, remedy, seconds_of
from rl.plan.sizes import ModelSize, NoPrediction
from tests.rl.cpu_kernels import KERNELS
from tests.rl.families import FAMILIES, tiny_config
from tests.saved_tensors import bytes_kept

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


def bytes_by_name(model: LlamaConfig, config: Config, token_budget: int) -> dict[str, int]:
    parts = training_parts(ModelSize.of(model, fused_layers=True), config, token_budget)
    return {part.name: part.bytes for part in parts}


def test_a_small_model_is_counted_as_by_hand():
    size = ModelSize.of(SMALL, fused_layers=True)
    assert (size.parameters, size.linear, size.head) == (PARAMETERS, LINEAR, 800)
    assert (size.saved_per_token, size.cache_per_token) == (SAVED, 2 * 2 * 8)


def test_parts_of_mixed_precision_training_are_those_by_hand():
    config = load_config(None, ["loss.kl_coef=0.1", "model.dtype=bf16-mixed"])
    parts = bytes_by_name(SMALL, config, 1000)
    assert parts == {
        "weights": 4 * PARAMETERS,
        "gradients": 4 * PARAMETERS,
        "optimizer": 8 * PARAMETERS,
        "weights in the compute dtype": 2 * LINEAR,
        "reference": 4 * (PARAMETERS - LINEAR) + 2 * LINEAR,
        "activations": 1000 * 2 * 2 * SAVED,
        "logits": CHUNK_BYTES["cuda"] + 800 * (4 + 2),  # its fp32 gradient, and the head narrowed
        "overhead": OVERHEAD_BYTES,
    }
    kept = bytes_by_name(SMALL, replaced(config, {"model.keep_logits": True}), 1000)
    assert kept == parts | {"logits": parts["logits"] + 1000 * 100 * 2}  # of 100 ids each, in 16 bits
    hosted = replaced(config, {"memory.optimizer_on_host": True, "memory.reference_on_host": True})
    less = bytes_by_name(SMALL, hosted, 1000)
    assert less == parts | {"reference": 4 * (PARAMETERS - LINEAR) + LINEAR}  # one of two layers is there
    moving = bytes_by_name(SMALL, replaced(hosted, {"model.reference.update_every": 1}), 1000)
    assert moving["reference"] == 4 * (PARAMETERS - LINEAR) + 2 * LINEAR
    again = replaced(config, {"model.gradient_checkpointing": True})  # a copy of one layer is there at a time
    assert bytes_by_name(SMALL, again, 1)["weights in the compute dtype"] == LINEAR
    by_autocast = replaced(again, {"model.fused_layers": False})  # of all, until the forward pass ends
    assert LINEAR < bytes_by_name(SMALL, by_autocast, 1)["weights in the compute dtype"] < 2 * LINEAR
    large = bytes_by_name(QWEN["7b"], hosted, 1000)
    assert large["optimizer"] == 2 * 4 * 151936 * 3584  # of the head, the largest that comes at once


def qwen(hidden, wide, layers, heads, keys, *, tied=True):
    return LlamaConfig(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        tie_word_embeddings=tied,
    )


QWEN = {
    "0.5b": qwen(896, 4864, 24, 14, 2),
    "1.5b": qwen(1536, 8960, 28, 12, 2),
    "3b": qwen(2048, 11008, 36, 16, 2),
    "7b": qwen(3584, 18944, 28, 28, 4, tied=False),
}
NOTHING_SET = ["loss.kl_coef=0.001", "data.max_prompt_length=1024", "sampling.max_completion_length=1024"]


HOSTED_OFF = {"memory.optimizer_on_host": False, "memory.reference_on_host": False}


def plan_of(name: str, config: Config, gib: float, processes: int = 1):
    size = ModelSize.of(QWEN[name], fused_layers=True)
    return plan_memory(size, config, Card("a GPU", int(gib * GIB), processes), 2048)


@pytest.mark.parametrize(
    ("name", "overrides", "gib"),
    [
        ("1.5b", [], 80),
        ("7b", ["model.lora={r: 16}"], 80),
        ("1.5b", ["train.prompts_per_step=32", "train.group_size=16"], 80),
        ("0.5b", [], 24),
        ("3b", ["model.lora={r: 16}"], 24),
        ("3b", [], 140),
    ],
)
def test_a_run_with_nothing_set_but_the_model_fits(name, overrides, gib):
    config = load_config(None, NOTHING_SET + overrides)
    size, card = ModelSize.of(QWEN[name], fused_layers=True), Card("a GPU", int(gib * GIB))
    values = fit(size, config, card, 2048)
    assert values is not None and plan_of(name, replaced(config, values), gib).fits
    assert values["train.token_budget"] >= 8192


def test_the_planned_token_budget_fits_and_a_larger_one_does_not():
    config = load_config(None, [*NOTHING_SET, "train.prompts_per_step=32", "train.group_size=16"])
    size = ModelSize.of(QWEN["1.5b"], fused_layers=True)
    values = fit(size, config, Card("a GPU", 80 * GIB), 2048)
    assert values is not None and not values["model.gradient_checkpointing"]
    more = values | {"train.token_budget": values["train.token_budget"] + 1024}
    assert plan_of("1.5b", replaced(config, values), 80).fits
    assert not plan_of("1.5b", replaced(config, more), 80).fits


@pytest.mark.parametrize(
    ("name", "gib", "kept", "tokens", "without"),
    [("1.5b", 180, True, 32768, 32768), ("1.5b", 80, True, 14336, 16384), ("0.5b", 24, False, 32768, 32768)],
)
def test_logits_are_kept_where_they_cost_few_tokens(name, gib, kept, tokens, without):
    """151,936 of 2 bytes are 0.29 MiB a token: an eighth of the layers' 2.2 MiB, but more than they leave
    once recomputed.
    """
    config, size = load_config(None, NOTHING_SET), ModelSize.of(QWEN[name], fused_layers=True)
    for given, wanted in (({}, tokens), ({"model.keep_logits": False}, without)):
        values = fit(size, replaced(config, given), Card("a GPU", gib * GIB), 2048)
        assert values is not None and values["train.token_budget"] == wanted
        assert plan_of(name, replaced(config, values | given), gib).fits
        assert given or values["model.keep_logits"] is kept


def test_given_values_are_not_changed():
    given = {
        "train.token_budget": 4096,
        "engine.gpu_memory_utilization": 0.4,
        "engine.max_num_seqs": 100,
        "model.gradient_checkpointing": True,
        "model.keep_logits": False,
    }
    config = replaced(load_config(None, NOTHING_SET), given)
    size = ModelSize.of(QWEN["0.5b"], fused_layers=True)
    assert fit(size, config, Card("a GPU", 80 * GIB), 2048) == {}
    assert fit(size, config, Card("a GPU", 8 * GIB), 2048) is None


def test_what_fits_in_place_of_what_does_not_is_found():
    size, card = ModelSize.of(QWEN["7b"], fused_layers=True), Card("a GPU", 60 * GIB)
    config = load_config(None, [*NOTHING_SET, "train.token_budget=4096"])
    assert fit(size, config, card, 2048) is None
    found = remedy(size, config, card, 2048)
    assert found is not None
    # 7.6e9 weights in fp32 and their gradients are 57 GiB: only adapters fit.
    assert found[0] == {"train.token_budget": "auto", "model.lora": {"r": 16}}
    assert plan_of("7b", replaced(replaced(config, found[0]), found[1]), 60).fits


def test_more_processes_need_less_cache_each():
    config = load_config(None, [*NOTHING_SET, "train.prompts_per_step=32", "train.group_size=16"])
    size = ModelSize.of(QWEN["1.5b"], fused_layers=True)
    one, four = (fit(size, config, Card("a GPU", 140 * GIB, processes=n), 2048) for n in (1, 4))
    assert one is not None and four is not None
    share = "engine.gpu_memory_utilization"
    assert four[share] < one[share]


def test_a_share_that_holds_no_sequence_is_a_fault():
    config = load_config(None, [*NOTHING_SET, "engine.gpu_memory_utilization=0.05"])
    plan = plan_of("1.5b", config, 80)
    # Weights of 2.9 GiB and 3 of overhead are more than 4 GiB; with a sequence they are 7.4 % of 80.
    assert not plan.fits and plan.fault is not None and plan.fault.endswith("it needs 0.08")


def test_what_others_hold_of_a_gpu_is_not_planned_with():
    config = load_config(None, NOTHING_SET)
    size = ModelSize.of(QWEN["1.5b"], fused_layers=True)
    assert fit(size, config, Card("a GPU", 80 * GIB, free=20 * GIB), 2048) is None


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MambaConfig(num_hidden_layers=1), "mamba: it names no num_attention_heads"),
        (PhiConfig(num_hidden_layers=1), "phi: its MLPs have no gate"),
    ],
)
def test_a_model_without_gated_mlps_is_refused_with_the_reason(config, reason):
    with pytest.raises(NoPrediction, match=reason):
        ModelSize.of(config, fused_layers=True)


@pytest.mark.skipif("dory" not in FAMILIES, reason="transformers before 5.24 has no loops of gated layers")
def test_a_model_that_computes_layers_in_a_loop_is_refused():
    """The second of three layers is computed twice: activations are kept each time."""
    with pytest.raises(NoPrediction, match="dory: a loop of layers"):
        ModelSize.of(tiny_config("dory"), fused_layers=True)
    assert ModelSize.of(tiny_config("dory", n_recurrent_loops=1), fused_layers=True).layers == 3


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
    size = ModelSize.of(SMALL, fused_layers=True)
    assert engine_weights(size, config) == width * PARAMETERS
    assert cache_bytes(size, config, 10) == width * 10 * (2 * 2 * 8)


def test_parts_of_lora_are_those_by_hand():
    config = load_config(None, ["model.dtype=bf16-mixed", "model.lora={r: 3}", "loss.kl_coef=0.1"])
    parts = bytes_by_name(SMALL, config, 1000)
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
    """Workload W of tests/bench: 33.2 GiB on an H200 (recipes/SPEED.md)."""
    config = load_config(None, ["model.lora={r: 16}", "train.token_budget=12288"])
    parts = bytes_by_name(QWEN["1.5b"], config, 12288)
    assert sum(parts.values()) / GIB == pytest.approx(33.2, rel=0.05)


@pytest.mark.parametrize("dtype", ["bf16-mixed", "bf16"])
def test_an_adapter_costs_what_autograd_keeps_for_it(dtype):
    """Adapters everywhere against adapters of q_proj alone: the same model, except for the other adapters."""
    everywhere, only_q = (
        load_config(None, [f"model.dtype={dtype}", f"model.lora={{r: 3, target_modules: {targets}}}"])
        for targets in ("all-linear", "[q_proj]")
    )
    a, b = (bytes_by_name(SMALL, config, 1)["activations"] / 2 for config in (everywhere, only_q))
    assert a - b == pytest.approx(saved_per_token(everywhere.model) - saved_per_token(only_q.model))


def saved_per_token(config: ModelConfig) -> float:
    """Bytes that autograd holds for a token and a layer, weights left out."""

    def saved(num_tokens: int) -> int:
        model = AutoModelForCausalLM.from_config(SMALL, dtype=storage_dtype(config))
        add_lora(model, config)
        return bytes_kept(model, config.dtype, num_tokens)

    return (saved(64) - saved(32)) / 32 / SMALL.num_hidden_layers


def test_weights_are_split_only_where_whole_copies_do_not_fit():
    """Two GPUs of 80 GiB: 1.5B with a reference fits whole, 3B only if layers are computed again, and 7B not
    even in two parts, without host memory.
    """
    config = load_config(None, [*NOTHING_SET, "train.prompts_per_step=32", "train.group_size=16"])
    found = {}
    for name in ("1.5b", "3b", "7b"):
        card = Card("a GPU", 80 * GIB, 2, host=0)
        values = fit(ModelSize.of(QWEN[name], fused_layers=True), config, card, 2048)
        found[name] = values and values.get("train.sharding", "none")
    assert found == {"1.5b": "none", "3b": "full", "7b": None}
    size = ModelSize.of(QWEN["3b"], fused_layers=True)
    whole = replaced(config, {"train.sharding": "none", "memory.engine_sleeps": False, **HOSTED_OFF})
    again = fit(size, whole, Card("a GPU", 80 * GIB, 2), 2048)
    assert again is not None and again["model.gradient_checkpointing"] is True
    alone = fit(size, config, Card("a GPU", 80 * GIB, 1), 2048)
    assert alone is not None and alone["memory.engine_sleeps"]


@pytest.mark.parametrize("key", ["memory.optimizer_on_host", "memory.reference_on_host"])
def test_what_is_kept_whole_in_host_memory_is_not_split(key):
    """Two processes with 3b on 48 GiB split what is left open; a copy on the host was asked for instead."""
    config = load_config(None, [*NOTHING_SET, f"{key}=true"])
    size, cards = ModelSize.of(QWEN["3b"], fused_layers=True), Card("a GPU", 48 * GIB, 2)
    values = fit(size, config, cards, 2048)
    assert values is None or "train.sharding" not in values
    found = remedy(size, config, cards, 2048)
    assert found is not None and found[0][key] == "auto" and found[1]["train.sharding"] == "full"


def test_parts_of_split_weights_are_those_by_hand():
    """On three processes: two layers and the head in bf16, gradients of a layer in bf16 and fp32."""
    config = load_config(None, ["loss.kl_coef=0.1", "train.sharding=full"])
    parts = {p.name: p.bytes for p in training_parts(ModelSize.of(SMALL, fused_layers=True), config, 1000, 3)}
    third = -(-4 * PARAMETERS // 3)
    assert (parts["weights"], parts["gradients"], parts["reference"]) == (third, third, third)
    assert parts["optimizer"] == -(-8 * PARAMETERS // 3)
    assert parts["gathered weights"] == 2 * (LINEAR + 800) + PARAMETERS // 2 * (2 + 4)


def test_where_the_engine_sleeps_it_and_training_do_not_add_up():
    given = ["model.gradient_checkpointing=true", "engine.gpu_memory_utilization=0.3"]
    config = load_config(None, [*NOTHING_SET, *given, "train.token_budget=8192"])
    awake = plan_of("3b", config, 80)
    plan = plan_of("3b", replaced(config, {"memory.engine_sleeps": True}), 80)
    parts = {part.name: part.bytes for part in plan.parts}
    engine = parts["engine weights"] + parts["engine cache"]
    assert engine + parts["engine overhead"] == pytest.approx(0.3 * 80 * GIB)
    learning = plan.training - plan.held("always")
    assert learning > parts["gradients"] and plan.training == awake.training
    assert awake.total == plan.training + parts["engine overhead"] + engine
    assert plan.total == plan.held("always") + parts["engine overhead"] + max(learning, engine)
    large = replaced(config, {"memory.engine_sleeps": True, "engine.gpu_memory_utilization": 0.6})
    assert plan_of("3b", large, 80).total > plan.total  # more than training takes: sampling is the peak


@pytest.mark.parametrize(
    ("name", "overrides", "gib", "chosen"),
    [
        ("1.5b", [], 80, []),
        ("0.5b", [], 24, []),
        ("3b", [], 140, []),
        ("3b", [], 80, []),
        ("3b", [], 70, ["engine_sleeps"]),
        ("7b", ["model.lora={r: 16}"], 80, ["engine_sleeps"]),
        ("3b", ["train.sample_while_training=true"], 70, ["reference_on_host"]),
        ("7b", [], 140, ["engine_sleeps", "optimizer_on_host"]),
        ("3b", ["engine.name=transformers"], 60, ["optimizer_on_host"]),
        ("3b", ["loss.kl_coef=0"], 47, ["optimizer_on_host"]),
        ("3b", ["loss.kl_coef=0"], 40, ["engine_sleeps", "optimizer_on_host"]),
        ("3b", ["memory.optimizer_on_host=false"], 62, ["engine_sleeps", "reference_on_host"]),
        ("3b", [], 60, ["optimizer_on_host"]),  # moving the reference for small micro-batches costs more
        ("7b", [], 80, ["engine_sleeps", "optimizer_on_host", "reference_on_host"]),
    ],
)
def test_memory_is_saved_only_where_a_card_is_too_small_otherwise(name, overrides, gib, chosen):
    config = load_config(None, NOTHING_SET + overrides)
    size, card = ModelSize.of(QWEN[name], fused_layers=True), Card("a GPU", gib * GIB)
    values = fit(size, config, card, 2048)
    assert values is not None and plan_of(name, replaced(config, values), gib).fits
    assert [key.removeprefix("memory.") for key in values if key.startswith("memory.")] == chosen
    without = fit(size, replaced(config, HOSTED_OFF | {"memory.engine_sleeps": False}), card, 2048)
    assert not chosen or without is None or without["model.gradient_checkpointing"]


def test_what_saving_memory_costs_is_predicted_by_hand():
    """Moments of 1,928 weights go there and back, twice a step; half the tokens of 4 rows of 2,048 make two
    passes of 2,048 over 1,920 / 2 matrices in bf16.
    """
    settings = [
        "loss.kl_coef=0.1",
        "train.num_minibatches=2",
        "train.prompts_per_step=2",
        "train.group_size=2",
    ]
    memory = ["engine_sleeps", "optimizer_on_host", "reference_on_host"]
    words = [*NOTHING_SET, *settings, "train.token_budget=2048", *(f"memory.{key}=true" for key in memory)]
    found = seconds_of(ModelSize.of(SMALL, fused_layers=True), load_config(None, words), 1)
    assert found == {
        "memory.engine_sleeps": SLEEP_S,
        "memory.optimizer_on_host": 2 * 2 * 8 * PARAMETERS / HOST_RATE,
        "memory.reference_on_host": 2 * 2 * LINEAR / HOST_RATE,
    }


@pytest.mark.parametrize(
    ("name", "word", "gib", "processes", "values"),
    [
        ("1.5b", "", 80, 1, [False, 0.12, 256, None, 16384]),
        ("0.5b", "", 24, 1, [True, 0.23, 256, None, 32768]),
        ("3b", "", 140, 1, [False, 0.1, 256, None, 16384]),
        ("7b", "model.lora={r: 16}", 140, 1, [False, 0.18, 256, None, 17408]),
        ("3b", "", 80, 2, [False, 0.14, 128, "full", 8192]),
        ("1.5b", "train.max_staleness=1", 140, 4, [False, 0.06, 128, None, 32768]),
        ("1.5b", "engine.name=transformers", 80, 1, [False, None, 256, None, 17408]),
    ],
)
def test_where_memory_sufficed_before_it_could_be_saved_the_plan_is_the_same(
    name, word, gib, processes, values
):
    """As planned when there was no section memory (commit 1b994fa), and 1,024 or 2,048 tokens more where a
    reference in 16 bits leaves room.
    """
    config = load_config(None, [*NOTHING_SET, "model.keep_logits=false", *([word] if word else [])])
    card = Card("a GPU", gib * GIB, processes)
    found = fit(ModelSize.of(QWEN[name], fused_layers=True), config, card, 2048)
    keys = ["model.gradient_checkpointing", "engine.gpu_memory_utilization", "engine.max_num_seqs"]
    keys += ["train.sharding", "train.token_budget"]
    assert found == {key: value for key, value in zip(keys, values, strict=True) if value is not None}


WIDE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 1024,
}


def kept_of_a_row(config, num_tokens: int, adapters: ModelConfig | None = None) -> int:
    """Bytes that autograd keeps of one packed row in fp32, without the head."""
    model = AutoModelForCausalLM.from_config(config).eval()
    if adapters is not None:
        add_lora(model, adapters)
    model.set_attn_implementation(PACKED)
    layout = Layout((Block(0, num_tokens, ()),), torch.device("cpu"), KERNELS)
    return bytes_kept(model, "fp32", num_tokens, cohort_layout=layout)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "glm4"])
def test_norms_behind_attention_and_the_mlp_are_counted(name):
    given = load_config(None, ["model.dtype=fp32", "model.gradient_checkpointing=false"])
    config = tiny_config(name, **WIDE, head_dim=64)
    parts = training_parts(ModelSize.of(config, fused_layers=False, dtype="fp32"), given, 32)
    (planned,) = (part.bytes for part in parts if part.name == "activations")
    kept = kept_of_a_row(config, 96) - kept_of_a_row(config, 64)
    of_embedding_and_last_norm = 3 * 512 * 4 * 32
    assert (kept - of_embedding_and_last_norm) / planned == pytest.approx(1, abs=0.04)


@pytest.mark.parametrize("name", ["gemma2", "vaultgemma"])
def test_scores_with_a_soft_cap_are_planned_as_autograd_keeps_them(name):
    given = load_config(None, ["model.dtype=fp32", "model.gradient_checkpointing=false", *lengths(128, 256)])
    capped, plain = (tiny_config(name, attn_logit_softcapping=cap, vocab_size=512) for cap in (50.0, None))
    kept = kept_of_a_row(capped, 384) - kept_of_a_row(plain, 384)
    sizes = [ModelSize.of(config, fused_layers=False, dtype="fp32") for config in (capped, plain)]
    parts, without = ({p.name: p.bytes for p in training_parts(size, given, 384)} for size in sizes)
    of_one_layer = 12 * 384 * 384 * capped.num_attention_heads
    assert parts["soft-capped scores"] - of_one_layer == pytest.approx(kept, rel=0.05)
    assert "soft-capped scores" not in without


def lengths(prompt: int, completion: int) -> list[str]:
    return [f"data.max_prompt_length={prompt}", f"sampling.max_completion_length={completion}"]


@pytest.mark.parametrize("name", ["llama", "qwen3", "glm4", "mistral", "mixtral"])
def test_what_is_counted_by_hand_is_what_a_pass_without_storage_keeps(name):
    config = tiny_config(name, **WIDE)
    size = ModelSize.of(config, fused_layers=False, dtype="bf16")
    parts = training_parts(size, load_config(None, BF16), 1)
    (counted,) = (part.bytes for part in parts if part.name == "activations")
    mean, largest = layer_bytes(measured_size(config), ModelConfig(dtype="bf16"))
    assert mean == largest and size.layers * mean == pytest.approx(counted, rel=0.03)


BF16 = ["model.dtype=bf16", "model.gradient_checkpointing=false"]


@pytest.mark.parametrize("name", ["phi", "starcoder2", "gpt2", "lfm2", "arcee"])
def test_layers_that_are_not_counted_are_measured_as_a_real_pass_keeps_them(name):
    config = tiny_config(name, **WIDE, max_position_embeddings=512)
    with pytest.raises(NoPrediction):
        ModelSize.of(config, fused_layers=False)
    mean, largest = layer_bytes(measured_size(config), ModelConfig(dtype="fp32"))
    kept = (kept_of_a_row(config, 512) - kept_of_a_row(config, 256)) / 256
    of_the_last_norm = 2 * 512 * 4  # LayerNorm keeps less, RMSNorm more
    assert config.num_hidden_layers * mean == pytest.approx(kept - of_the_last_norm, rel=0.07)
    assert largest >= mean


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "qwen3_next"])
@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_mixtures_with_other_attention_or_experts_are_measured(name, lora):
    size = replace(measured_size(tiny_config(name, **WIDE)), adapt=adapt)
    mean, largest = layer_bytes(size, ModelConfig(dtype="bf16", lora=lora))
    assert 10_000 < mean <= largest < 100_000
    wide, _ = layer_bytes(size, ModelConfig(dtype="fp32"))
    assert wide == pytest.approx(2 * layer_bytes(size, ModelConfig(dtype="bf16"))[0], abs=2)


def test_the_layer_that_keeps_most_counts_where_layers_are_computed_again():
    """LFM2: one layer of attention and one of convolutions."""
    given = load_config(None, ["model.dtype=fp32", "model.gradient_checkpointing=true"])
    size = measured_size(tiny_config("lfm2", **WIDE))
    mean, largest = layer_bytes(size, ModelConfig(dtype="fp32"))
    (planned,) = (p.bytes for p in training_parts(size, given, 100) if p.name == "activations")
    assert largest > 1.02 * mean and planned == 100 * (2 * 512 * 4 + largest)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bloom", "grows faster than the tokens of a row"),
        ("hrm_text", "layers or head are not found"),
        ("gemma4_text", "'head_dim' is a per-layer attribute"),
        ("dory", "a loop of layers"),
        ("falcon_mamba", "it names no num_attention_heads"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_the_reason(name, reason):
    if name not in FAMILIES:
        pytest.skip("this transformers does not have it")
    with pytest.raises(NoPrediction, match=reason):
        layer_bytes(measured_size(tiny_config(name)), ModelConfig(dtype="fp32"))


def test_adapters_on_layers_behind_the_first_keep_their_input():
    """Embeddings have no gradient there, so the first layer alone does not keep the input of its norm."""
    config = tiny_config("llama", **WIDE, num_hidden_layers=4)
    given = ModelConfig(dtype="fp32", lora={"r": 4})  # type: ignore[arg-type]
    mean, _ = layer_bytes(replace(measured_size(config), adapt=adapt), given)
    kept = (kept_of_a_row(config, 128, given) - kept_of_a_row(config, 64, given)) / 64
    assert 0.99 <= 4 * mean / (kept - 512 * 4) <= 1.03  # the last norm keeps its input


def test_convolutions_are_not_experts():
    """Of 4 experts a token takes 2. A convolution has as many channels as keys, queries and values."""
    size = measured_size(config := tiny_config("qwen3_next", **WIDE))
    assert size.experts is not None and (size.experts.number, size.experts.top_k) == (4, 2)
    of_a_layer = 4 * (2 * 16 * 512 + 16 * 512)
    assert size.experts.weights == config.num_hidden_layers * of_a_layer


def test_a_measured_config_is_left_as_it_was():
    config = tiny_config("phi")
    config._attn_implementation = "sdpa"
    layer_bytes(measured_size(config), ModelConfig(dtype="fp32"))
    assert config._attn_implementation == "sdpa"


def test_adapters_are_no_remedy_for_a_family_that_cannot_have_them():
    """PEFT refuses adapters of Falcon H1; CUDA's context alone does not fit 1 GiB."""
    config = load_config(None, ["model.dtype=bf16", "engine.name=transformers", *lengths(64, 512)])
    size = measured_size(tiny_config("falcon_h1"))
    assert remedy(size, config, Card("a GPU", GIB), 576) is None
