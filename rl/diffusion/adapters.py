"""What is written beside an adapter: the mask token and the shift that it was trained with.

A base that is a causal model knows neither.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rl.model.adapter_folder import Adapter, read_settings

RECORD = "diffusion.json"


def recorded(adapter: Adapter) -> dict[str, Any]:
    """`mask_token_id` and `diffusion_shift`, in the words of a model's config.json; empty in a folder that
    others wrote.
    """
    record = adapter.folder / RECORD
    return read_settings(record) if record.exists() else {}


def write_record(folder: Path, *, mask_token_id: int, shift: bool) -> None:
    """Beside an adapter: what `recorded` reads back."""
    record = {"mask_token_id": mask_token_id, "diffusion_shift": shift}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
