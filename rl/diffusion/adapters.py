"""Folders of adapters: which base they belong to, and the mask token and shift that they were trained with.

A base that is a causal model knows neither, so they are written beside the adapter (`diffusion.json`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from rl.diffusion.layouts import checkpoint_folder

RECORD = "diffusion.json"


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder.

    Attributes:
        recorded: `mask_token_id` and `diffusion_shift`, in the words of a model's config.json; empty in a
            folder that others wrote.
    """

    folder: Path
    settings: dict[str, Any]
    recorded: dict[str, Any]

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
            f"{self.folder} holds an adapter, and its adapter_config.json names no base model "
            f"(base_model_name_or_path is {name!r}); write there the folder or hub name of the model that "
            "was adapted"
        )

    @property
    def revision(self) -> str | None:
        """Of the base."""
        return self.settings.get("revision")


def find_adapter(name: str, revision: str | None) -> Adapter | None:
    """The adapter that a folder or hub repository holds; None: it holds no adapter."""
    try:
        file = find_adapter_config_file(name, revision=revision)
    except OSError:  # no folder and no name of a repository: whoever loads it says so
        file = None
    if file is None:
        return None
    folder = checkpoint_folder(name, revision)
    record = folder / RECORD
    return Adapter(folder, _read(Path(file)), _read(record) if record.exists() else {})


def write_record(folder: Path, *, mask_token_id: int, shift: bool) -> None:
    """Beside an adapter: what `find_adapter` reads back."""
    record = {"mask_token_id": mask_token_id, "diffusion_shift": shift}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def merge(model: PreTrainedModel, adapter: Adapter) -> None:
    """Adds the adapter to the base model's weights, in place.

    Raises:
        ValueError: it holds tensors for other modules than this base has, or lacks some.
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
    adapted.merge_and_unload()


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy the checkpoint again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold keys and values, not {found!r:.60}; copy the checkpoint again")
    return found
