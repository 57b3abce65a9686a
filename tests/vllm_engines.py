"""What tests of vLLM share: whether it is here, an engine in one call, and configs that its kernels have."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rollout.vllm.engine import VllmEngine
from rollout.vllm.local import start_core
from rollout.vllm.settings import CoreSettings
from rollout.vllm.start import vllm_available
from tests.rl.families import tiny_config

REASON = vllm_available()
needs_vllm = pytest.mark.skipif(REASON is not None, reason=str(REASON))

OF_ENGINE = ("seed_requests", "sample_while_training")


def start_vllm(model: Any, tokenizer: Any, **options: Any) -> VllmEngine:
    own = {name: options.pop(name) for name in OF_ENGINE if name in options}
    settings = CoreSettings(model, **options)
    own |= {name: getattr(settings, name) for name in ("max_model_len", "timeout_s")}
    return VllmEngine(start_core(settings), tokenizer, **own)


# Heads and rows of 32: vLLM's kernels on a CPU have no smaller ones.
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "moe_intermediate_size": 32,
    "intermediate_size": 64,
}


def served_config(name: str, **changes: Any) -> transformers.PreTrainedConfig:
    kind = CONFIG_MAPPING[name]
    known = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    config = tiny_config(name, **{k: v for k, v in (SIZES | changes).items() if k in known})
    if name == "glm4_moe":  # its own checkpoints name it, and vLLM asks for it
        config.head_dim = 32
    return config
