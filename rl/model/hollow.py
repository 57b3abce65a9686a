"""Models whose weights are read after they were split, so that no process ever holds all of them.

A hollow model has every module, buffer and adapter, but each of its own weights is a single number seen in
the weight's shape. What only a model with weights can tell, a short one of the same files tells.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils import logging as transformers_logging

from rl.config import ModelConfig
from rl.model.loading import read_config, read_model, storage_dtype

MOST_LAYERS = 2
NUM_BYTES = 1 << 14


def hollow_model(config: ModelConfig) -> PreTrainedModel:
    """The model in its storage dtype, with hollow weights and all buffers."""
    found = read_config(config)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(found, dtype=storage_dtype(config), trust_remote_code=False)
    model.tie_weights()
    stand_ins: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                number = torch.zeros((), dtype=p.dtype).expand(p.shape)
                module._parameters[name] = stand_ins.setdefault(id(p), nn.Parameter(number, p.requires_grad))
    return model.eval()


def short_model(config: ModelConfig) -> PreTrainedModel:
    """The model's first layers, at least one of each kind, between its own embedding and head."""
    found = read_config(config)
    text: Any = found.get_text_config()
    number = text.num_hidden_layers
    per_layer = {k: v for k, v in vars(text).items() if isinstance(v, list) and len(v) == number}
    firsts = [kinds.index(kind) + 1 for kinds in per_layer.values() for kind in kinds]
    text.num_hidden_layers = kept = min(number, max([MOST_LAYERS, *firsts]))
    for name, kinds in per_layer.items():
        setattr(text, name, kinds[:kept])
    with _without_words_on_the_other_layers():
        return read_model(config, config=found)


@contextmanager
def _without_words_on_the_other_layers() -> Iterator[None]:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def weight_files(config: ModelConfig) -> list[Path]:
    """The safetensors files that transformers reads, of a folder or a cached model of a hub; [] if none."""
    options: Any = {"revision": config.revision, "_raise_exceptions_for_missing_entries": False}
    find, names = partial(cached_file, config.name, **options), [SAFE_WEIGHTS_NAME]
    if find(SAFE_WEIGHTS_NAME) is None and (index := find(SAFE_WEIGHTS_INDEX_NAME)) is not None:
        names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    found = [Path(path) for name in names if (path := find(name)) is not None]
    return found if len(found) == len(names) else []


def digest_of(file: Path) -> str:
    """What tells apart two models of the same shapes: the size, and bytes at equal odd distances."""
    bytes_B = np.memmap(file, np.uint8, "r")
    some = bytes_B[:: len(bytes_B) // NUM_BYTES | 1].tobytes()
    return f"{len(bytes_B)} bytes, {hashlib.blake2b(some, digest_size=8).hexdigest()}"


def is_hollow(tensor: Tensor) -> bool:
    return not isinstance(tensor, DTensor) and tensor.untyped_storage().nbytes() < tensor.nbytes


def give_memory(module: nn.Module, device: torch.device) -> None:
    """Gives hollow weights of a module memory of their own, uninitialised."""
    for p in module.parameters():
        if is_hollow(p):
            p.data = torch.empty(p.shape, dtype=p.dtype, device=device)
