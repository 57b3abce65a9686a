"""A record beside an adapter: the mask token and the shift that it was trained with.

They are recorded because a causal base model knows neither.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rl.model.adapter_folder import Adapter, read_settings

RECORD = "diffusion.json"


def recorded(adapter: Adapter) -> dict[str, Any]:
    """`mask_token_id` and `diffusion_shift`, as a model's config.json names them; empty for folders that
    others wrote.
    """
    record = adapter.folder / RECORD
    return read_settings(record) if record.exists() else {}


def write_record(folder: Path, *, mask_token_id: int, shift: bool) -> None:
    """Writes beside an adapter what `recorded` reads back."""
    record = {"mask_token_id": mask_token_id, "diffusion_shift": shift}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
