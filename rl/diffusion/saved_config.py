"""Config and tokenizer of a checkpoint, read without its weights and without code of its folder."""

from __future__ import annotations

from typing import Any, cast

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config, tokenizer_class_from_name
from transformers.utils import cached_file

from rl.config import ModelConfig
from rl.diffusion.adapters import recorded
from rl.diffusion.layouts import native_config
from rl.model.adapter_folder import find_adapter
from rl.model.loading import load_tokenizer

SAME_FILES: dict[str, Any] = {"DreamTokenizer": Qwen2Tokenizer}
"""Tokenizer class of a checkpoint's own code -> a class of transformers that reads the same files."""


def raw_config(name: str, revision: str | None) -> dict[str, Any]:
    """config.json; for an adapter that of its base, with the record beside the adapter.

    Raises:
        ValueError: it is missing, or the base of an adapter is not where the adapter says.
    """
    if (adapter := find_adapter(name, revision)) is not None:
        try:
            return raw_config(adapter.base, adapter.revision) | recorded(adapter)
        except ValueError as error:
            raise ValueError(
                f"{name} holds an adapter, but its base cannot be read: {error}; base_model_name_or_path in "
                "its adapter_config.json says where the base is"
            ) from None
    try:
        return PreTrainedConfig.get_config_dict(name, revision=revision)[0]
    except OSError as error:
        raise ValueError(
            f"model.name={name!r} is neither a folder with a model nor a name on a hub that can be reached: "
            f"{str(error).splitlines()[0]}"
        ) from None


def model_config(name: str, revision: str | None) -> PreTrainedConfig:
    """The transformers config of a checkpoint (for an adapter that of its base), with `mask_token_id` and
    `diffusion_shift` if the checkpoint names them.

    Raises:
        ValueError: it cannot be read, or only by code of its folder.
    """
    raw = raw_config(name, revision)
    if (adapter := find_adapter(name, revision)) is not None:
        config = model_config(adapter.base, adapter.revision)
        for key, value in recorded(adapter).items():
            setattr(config, key, value)
        return config
    if (native := native_config(raw, name)) is not None:
        config, shift = native
        cast(Any, config).diffusion_shift = shift
        return config
    refuse_code(raw, name)
    return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)


def refuse_code(raw: dict[str, Any], name: str) -> None:
    """Raises ValueError if transformers does not know the model and its folder brings code for it."""
    kind = raw.get("model_type")
    if raw.get("auto_map") and kind not in CONFIG_MAPPING:
        raise ValueError(
            f"model.name={name!r}: its model_type {kind!r} is code of its own folder, which is never run; "
            "use a LLaDA-8B, iLLaDA or Dream checkpoint, or a causal model that transformers knows"
        )


def refuse_masked(name: str, revision: str | None) -> None:
    """Raises ValueError if a model that will be trained as a causal one is a masked diffusion model."""
    try:
        raw = raw_config(name, revision)
    except ValueError:
        return  # loading it will say what is wrong
    if "diffusion_shift" in raw or native_config(raw, name) is not None:
        raise ValueError(
            f"model.name={name!r}: this is a masked diffusion model; add a `diffusion:` section to the "
            "config, such as diffusion={block_length: 32}, or use recipes.llada to train it without rewards"
        )


def load_diffusion_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """`rl.model.loading.load_tokenizer` for a LLaDA, Dream or causal checkpoint; an adapter's own tokenizer,
    or else its base's.

    Raises:
        ValueError: there is none, or only code of its folder reads it.
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
    """The class that reads the tokenizer's files: AutoTokenizer, unless that would run code of the folder."""
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
