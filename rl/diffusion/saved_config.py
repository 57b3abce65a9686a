"""What a checkpoint says of itself, before anything is loaded and without code of its folder."""

from __future__ import annotations

from typing import Any, cast

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from rl.diffusion.adapters import find_adapter
from rl.diffusion.layouts import native_config


def raw_config(name: str, revision: str | None) -> dict[str, Any]:
    """config.json; of an adapter that of its base, with what was recorded beside the adapter.

    Raises:
        ValueError: there is none, or the base of an adapter is not where the adapter says.
    """
    if (adapter := find_adapter(name, revision)) is not None:
        try:
            return raw_config(adapter.base, adapter.revision) | adapter.recorded
        except ValueError as error:
            raise ValueError(
                f"{name} holds an adapter, and its base cannot be read: {error}; base_model_name_or_path in "
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
    """The transformers config of a checkpoint (of an adapter that of its base), with `mask_token_id` and
    `diffusion_shift` where the checkpoint says them.

    Raises:
        ValueError: it cannot be read, or only by code of its folder.
    """
    raw = raw_config(name, revision)
    if (adapter := find_adapter(name, revision)) is not None:
        config = model_config(adapter.base, adapter.revision)
        for key, value in adapter.recorded.items():
            setattr(config, key, value)
        return config
    if (native := native_config(raw, name)) is not None:
        config, shift = native
        cast(Any, config).diffusion_shift = shift
        return config
    refuse_code(raw, name)
    return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)


def refuse_code(raw: dict[str, Any], name: str) -> None:
    """Raises ValueError if transformers does not know the model, and its folder brings code for it."""
    kind = raw.get("model_type")
    if raw.get("auto_map") and kind not in CONFIG_MAPPING:
        raise ValueError(
            f"model.name={name!r}: its model_type {kind!r} is code of its own folder, which is never run; "
            "use a LLaDA-8B, iLLaDA or Dream checkpoint, or a causal model that transformers knows"
        )


def refuse_masked(name: str, revision: str | None) -> None:
    """Raises ValueError if what is to be trained as a causal model is a masked diffusion model."""
    try:
        raw = raw_config(name, revision)
    except ValueError:
        return  # whoever loads it says what is wrong
    if "diffusion_shift" in raw or native_config(raw, name) is not None:
        raise ValueError(
            f"model.name={name!r}: this is a masked diffusion model; add a `diffusion:` section to the "
            "config, such as diffusion={block_length: 32}, or use recipes.llada to train it without rewards"
        )
