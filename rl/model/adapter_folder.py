"""Folders of adapters (peft): which model they belong to, and how they are merged into it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from rl.model.hub import refuse_absent


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, and its adapter_config.json."""

    folder: Path
    settings: dict[str, Any]

    @property
    def base(self) -> str:
        """Folder or hub name of the model that was adapted.

        Raises:
            ValueError: the adapter names none, or itself.
        """
        name: Any = self.settings.get("base_model_name_or_path")
        is_named = isinstance(name, str) and name not in ("", "None")
        if is_named and Path(name).absolute() != self.folder.absolute():
            return name
        raise ValueError(
            f"{self.folder} holds an adapter, but its adapter_config.json names no base model "
            f"(base_model_name_or_path is {name!r}); write there the folder or hub name of the model that "
            "was adapted"
        )

    @property
    def revision(self) -> str | None:
        """Revision of the base model."""
        return self.settings.get("revision")


def find_adapter(name: str, revision: str | None) -> Adapter | None:
    """The adapter that a folder or hub repository holds; None: it holds no adapter.

    Raises:
        ValueError: there is no such folder, and `rl.model.hub` cannot find it either.
    """
    refuse_absent(name)
    try:
        file = find_adapter_config_file(name, revision=revision)
    except OSError:  # not a repository: loading it will say so
        file = None
    return None if file is None else Adapter(checkpoint_folder(name, revision), read_settings(Path(file)))


def checkpoint_folder(name: str, revision: str | None) -> Path:
    """The folder itself, or a hub repository's safetensors and JSON files in the local cache."""
    if Path(name).is_dir():
        return Path(name)
    return Path(snapshot_download(name, revision=revision, allow_patterns=["*.safetensors", "*.json"]))


def merge(model: PreTrainedModel, adapter: Adapter) -> None:
    """Adds the adapter to the base model's weights, in place; raises as `attach` does."""
    attach(model, adapter).merge_and_unload().requires_grad_(True)


def attach(model: PreTrainedModel, adapter: Adapter) -> Any:
    """Peft's wrapper of the base model with the adapter beside its weights, on the CPU.

    Raises:
        ValueError: the adapter has tensors for modules that this base lacks, or lacks some.
    """
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    folder = str(adapter.folder)
    try:
        saved = load_peft_weights(folder, device="cpu")
        adapted = PeftModel.from_pretrained(model, folder, torch_device="cpu")
    except (RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{folder} does not fit its base {adapter.base}: {said:.300}") from error
    if odd := sorted(saved.keys() ^ get_peft_model_state_dict(adapted).keys()):
        raise ValueError(
            f"{folder} does not fit its base {adapter.base}: {len(odd)} tensors such as {odd[0]} are in one "
            "of them only; adapters are read under the names of Llama's or Qwen's layers"
        )
    return adapted


def read_settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy the checkpoint again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold keys and values, not {found!r:.60}; copy the checkpoint again")
    return found
