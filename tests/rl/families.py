"""Tiny random models of every causal family of transformers: two layers, hidden size 32, windows of 12."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rl.causal import CausalPolicy
from rl.config import Config
from rl.config.read import load_config


def words(text: str) -> list[str]:
    return text.split()


REFUSED = dict.fromkeys(("dory", "modernbert-decoder"), "its output head does more than a linear layer")
# The default of target_modules, all-linear, is refused by name: PEFT refuses Mamba, routers return more than
# a tensor, a parent reads the weight past its adapter, or layers share their weights.
NO_LORA = set(
    words(
        "deepseek_v4 falcon_h1 falcon_mamba jamba llama4_text longcat_flash mamba mamba2 "
        "nemotron_h phimoe zamba"
    )
)
ALWAYS = set(
    words(
        "llama gemma2 gemma3_text mistral qwen2 qwen3 phi3 granite deepseek_v3 qwen3_moe gpt_oss mamba "
        "qwen3_next falcon_h1"
    )
)
WINDOW = 12  # tokens; the sequences of the tests are longer
SIZES = dict.fromkeys(
    words(
        "hidden_size d_model n_embd dim embedding_size word_embed_proj_dim lru_width attention_hidden_size"
    ),
    32,
)
SIZES |= dict.fromkeys(words("intermediate_size ffn_dim n_inner d_ff ffn_hidden_size decoder_ffn_dim"), 48)
SIZES |= dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"], 2)
SIZES |= dict.fromkeys(
    words("num_attention_heads n_head n_heads num_heads decoder_attention_heads attention_heads"), 4
)
SIZES |= dict.fromkeys(["num_key_value_heads", "num_kv_heads", "mamba_n_groups_kv"], 2)
SIZES |= dict.fromkeys(
    words(
        "head_dim attention_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim kv_lora_rank "
        "q_lora_rank query_pre_attn_scalar hidden_size_per_layer_input mamba_d_head mamba_head_dim "
        "linear_key_head_dim linear_value_head_dim mamba_chunk_size chunk_size rotary_dim"
    ),
    8,
)
SIZES |= dict.fromkeys(
    ["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"], 256
)
SIZES |= dict.fromkeys(
    words(
        "sliding_window attention_window_size attention_chunk_size window_size sliding_window_size "
        "local_attention"
    ),
    WINDOW,
)
SIZES |= dict.fromkeys(
    words(
        "num_experts num_local_experts n_routed_experts moe_num_experts state_size mamba_d_state "
        "conv_kernel mamba_d_conv mamba_dt_rank ssm_state_size linear_num_value_heads "
        "linear_conv_kernel_dim laurel_rank"
    ),
    4,
)
SIZES |= dict.fromkeys(
    words(
        "num_experts_per_tok moe_topk moe_k top_k_experts moe_top_k num_experts_per_token "
        "altup_num_inputs expand mamba_expand linear_num_key_heads"
    ),
    2,
)
SIZES |= dict.fromkeys(
    words(
        "n_shared_experts n_group topk_group first_k_dense_replace moe_layer_start_index "
        "mamba_n_groups n_groups"
    ),
    1,
)
SIZES |= dict.fromkeys(
    ["moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size", "index_head_dim"],
    16,
)
SIZES |= {
    "vocab_size": 120,
    "vocab_size_per_layer_input": 120,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "num_kv_shared_layers": 0,
    "altup_active_idx": 0,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "index_topk": WINDOW,
    "index_n_heads": 16,  # fewer give scores that are all 0 behind a ReLU, and ties are broken by length
}
ONE_KEY_PER_HEAD = {"num_key_value_heads": 4}
HALVES = {"layer_types": ["linear_attention", "full_attention"]}
CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
# More embedding rows than logits, and thresholds within the lengths of the tests.
INKLING2 = {
    "unpadded_vocab_size": 112,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "d_rel": 4,
    "rel_extent": WINDOW,
    "log_scaling_n_floor": WINDOW,
    "n_layers_per_attn_res_block": 1,
}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        words(
            "axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa "
            "longcat_flash minicpm3 sarvam_mla youtu"
        ),
        ONE_KEY_PER_HEAD,
    ),
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dory": {"num_hidden_layers": 3, "n_input_layers": 1, "n_output_layers": 1},
    "dots3_note_text": ONE_KEY_PER_HEAD
    | {"shared_experts_intermediate_size": 16, "swa_head_dim": 16}
    | dict.fromkeys(words("swa_num_attention_heads swa_num_key_value_heads"), 4)
    | dict.fromkeys(
        words("swa_q_lora_rank swa_kv_lora_rank swa_qk_nope_head_dim swa_qk_rope_head_dim swa_v_head_dim"), 8
    ),
    "falcon_h1": {"mamba_d_ssm": 64},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {
        "activation_sparsity_pattern": [0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 48},
    "granitemoeshared": {"shared_intermediate_size": 48},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "inkling2_text": INKLING2,
    "inkling2_loop_text": INKLING2
    | {
        "num_hidden_layers": 3,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
        "loop_num_passes": 2,
        "loop_gate_rank": 4,
    },
    "jetmoe": {"kv_channels": 8},
    "kimi_linear": ONE_KEY_PER_HEAD | {"linear_head_dim": 8, "linear_num_heads": 4},
    "lara_mini": {"num_hidden_layers": 3},
    "lfm2": CONVOLUTION | {"block_auto_adjust_ff_dim": False},
    "lfm2_moe": CONVOLUTION | {"num_dense_layers": 1},
    "lfm3": {"num_hidden_layers": 3},
    "llama4_text": {
        "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 1,
        "moe_layers": None,
        "no_rope_layer_interval": 2,
    },
    "longcat_flash": ONE_KEY_PER_HEAD | {"zero_expert_num": 1},
    "mamba2": {"num_heads": 8},
    "minicpm3": ONE_KEY_PER_HEAD | {"dim_model_base": 32, "scale_emb": 1, "scale_depth": 1.4},
    "minimax": {"layer_types": ["full_attention", "linear_attention"], "block_size": 4},
    "mpt": {"expansion_ratio": 2},
    "nemotron_h": {"hybrid_override_pattern": "M*"},
    "olmo3": {"num_hidden_layers": 4},
    "cohere2": {"num_hidden_layers": 4},
    "phi4_multimodal": {},
    "qwen3_5_text": HALVES,
    "qwen3_next": HALVES | {"partial_rotary_factor": 0.5},
    "qwen4_exp_text": HALVES
    | {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 4},
    "xlstm": {"num_blocks": 2, "qk_dim_factor": 0.5},
    "zamba": {
        "num_hidden_layers": 6,
        "attn_layer_period": 3,
        "attn_layer_offset": 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1},
}
# Encoders that transformers can turn into decoders, composites whose text part is listed itself, and models
# that want more than text.
NOT_MEANT = set(
    words(
        "aria_text bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small "
        "camembert cpmant data2vec-text dots3_note electra emu3 ernie fuyu gemma3 gemma3n gemma4 "
        "gemma4_assistant gemma4_unified gemma4_unified_assistant git got_ocr2 llama4 marian mbart "
        "megatron-bert mllama moshi moss_transcribe_diarize musicgen musicgen_melody mvp pegasus "
        "phi4_multimodal plbart prophetnet qwen3_5 qwen3_5_moe qwen4_exp reformer rembert roberta "
        "roberta-prelayernorm roc_bert roformer trocr whisper xlm xlm-roberta xlm-roberta-xl xlnet xmod"
    )
)
FAMILIES = tuple(sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - NOT_MEANT))


def tiny_config(name: str, **changes: Any) -> transformers.PreTrainedConfig:
    """A config of two layers, one of each kind where a family mixes kinds."""
    kind: Any = CONFIG_MAPPING[name]
    if name == "blt":
        part = SIZES | {"num_key_value_heads": 4, "num_hidden_layers": 1, "vocab_size": 260}
        part = {k: part[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads")} | {
            "num_hidden_layers": 1,
            "intermediate_size": 48,
            "head_dim": 8,
            "vocab_size": 260,
            "max_position_embeddings": 256,
        }
        return kind(
            vocab_size=260,
            patcher_config=part,
            encoder_config=part | {"hidden_size_global": 64},
            decoder_config=part | {"hidden_size_global": 64},
            global_config=part | {"hidden_size": 64, "head_dim": 16},
            encoder_hash_byte_group_size=[3],
            encoder_hash_byte_group_vocab=100,
            patch_size=4,
        )
    fields = {field.name for field in dataclasses.fields(kind)}
    known = fields | set(kind.attribute_map)
    special = SPECIAL.get(name, {})
    chosen = {k: v for k, v in SIZES.items() if k in known and k not in kind.attribute_map} | special
    defaults = kind()
    for key in ("layer_types", "mlp_layer_types"):
        found = getattr(defaults, key, None)
        is_set = kind.attribute_map.get(key, key) in fields  # elsewhere it follows from other settings
        if found and is_set and key not in special and name not in ("bamba", "falcon_h1"):
            kinds = list(dict.fromkeys(found))
            chosen[key] = [kinds[i % len(kinds)] for i in range(chosen.get("num_hidden_layers", 2))]
    return kind(**(chosen | changes))


def save_tiny(name: str, folder: Path, config: transformers.PreTrainedConfig | None = None) -> Path:
    """A folder with a random model of the family, whose matrices have a standard deviation of 0.15."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = transformers.AutoModelForCausalLM.from_config(
            config or tiny_config(name), dtype=torch.float32
        )
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return folder


def load(name: str, folder: Path, tokenizer_folder: Path, *overrides: str) -> tuple[CausalPolicy, Config]:
    save_tiny(name, folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    settings = [f"model.name={folder}", "model.dtype=fp32", "loss.kl_coef=0", "loss.sampler_correction=null"]
    config = load_config(None, [*settings, "sampling.temperature=0.8", *overrides])
    return CausalPolicy(config.model, Accelerator(cpu=True), temperature=0.8), config
