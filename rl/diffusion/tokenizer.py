"""The tokenizer of a diffusion checkpoint, never by code that its folder brings along."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.models.auto.tokenization_auto import get_tokenizer_config, tokenizer_class_from_name
from transformers.utils import cached_file

from rl.config import ModelConfig
from rl.diffusion.adapters import find_adapter
from rl.model.loading import load_tokenizer

SAME_FILES: dict[str, Any] = {"DreamTokenizer": Qwen2Tokenizer}
"""Classes of others that read the files of one in transformers in the same way."""


def load_diffusion_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """`rl.model.loading.load_tokenizer` of a LLaDA, Dream or causal checkpoint; of an adapter its own, else
    its base's.

    Raises:
        ValueError: there is none, or nothing but code of its folder reads it.
    """
    try:
        settings = get_tokenizer_config(config.name, revision=config.revision)
    except OSError:  # `load_tokenizer` says that there is none
        settings = {}
    adapter = find_adapter(config.name, config.revision)
    if adapter is not None and not settings:
        base = {"name": adapter.base, "revision": adapter.revision}
        return load_diffusion_tokenizer(config.model_copy(update=base))
    return load_tokenizer(config, reader=_reader(config, settings))


def _reader(config: ModelConfig, settings: dict[str, Any]) -> Any:
    name = settings.get("tokenizer_class") or ""
    if not settings.get("auto_map") or tokenizer_class_from_name(name) is not None:
        return AutoTokenizer
    whole = cached_file(
        config.name,
        "tokenizer.json",
        revision=config.revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if whole is not None:
        return PreTrainedTokenizerFast
    if name in SAME_FILES:
        return SAME_FILES[name]
    raise ValueError(
        f"model.name={config.name!r}: its tokenizer {name} is code of its own folder, which is never run; "
        "put a tokenizer.json beside it, or use a checkpoint whose tokenizer transformers knows"
    )
