"""A vLLM engine in one call."""

from __future__ import annotations

from typing import Any

from rollout.vllm.engine import VllmEngine
from rollout.vllm.local import start_core
from rollout.vllm.settings import CoreSettings

OF_ENGINE = ("seed_requests", "sample_while_training")


def start_vllm(model: Any, tokenizer: Any, **options: Any) -> VllmEngine:
    own = {name: options.pop(name) for name in OF_ENGINE if name in options}
    settings = CoreSettings(model, **options)
    own |= {name: getattr(settings, name) for name in ("max_model_len", "timeout_s", "version")}
    return VllmEngine(start_core(settings), tokenizer, **own)
