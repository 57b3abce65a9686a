"""Models whose weights are read after they were split, so that no process ever holds all of them.

A hollow model has every module, buffer and adapter, but each of its own weights is a single number seen in
the weight's shape. Checks that need real weights use a short model of the same files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils import logging as transformers_logging

from rl.config import ModelConfig
from rl.model.adapters import adapter_parameters, original_name
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
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # no warning of the other layers, which the files have
    try:
        return read_model(config, config=found)
    finally:
        transformers_logging.set_verbosity(verbosity)


def weight_files(config: ModelConfig) -> list[Path]:
    """The safetensors files that transformers reads, of a folder or a cached model of a hub; [] if none."""
    options: Any = {"revision": config.revision, "_raise_exceptions_for_missing_entries": False}
    find, names = partial(cached_file, config.name, **options), [SAFE_WEIGHTS_NAME]
    if find(SAFE_WEIGHTS_NAME) is None and (index := find(SAFE_WEIGHTS_INDEX_NAME)) is not None:
        names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    found = [Path(path) for name in names if (path := find(name)) is not None]
    return found if len(found) == len(names) else []


def in_files(model: PreTrainedModel, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under their names in files. Stacked experts are taken apart into views of their matrices:
    of a sharded stack, those that this process holds.

    How transformers takes a tensor apart when it saves it is read off from a small one of numbered rows.

    Raises:
        ValueError: a file holds anything but a whole tensor or consecutive rows of an expert.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in named.items():
        shape = [1] * (tensor.ndim - 2) + [12, 2] if tensor.ndim > 1 else [1] * tensor.ndim
        numbers = torch.arange(math.prod(shape)).view(shape)
        for key, part in revert_weight_conversion(model, {name: numbers}).items():
            if torch.equal(part, numbers):
                found[key] = tensor
                continue
            before, is_expert, after = key.rpartition(".experts.0.")
            first = int(part.flatten()[0]) // 2
            if not is_expert or not torch.equal(part, numbers[0, first : first + len(part)]):
                raise ValueError(f"{name} is {key} in them, in another form")
            rows = slice(*(tensor.shape[1] * end // 12 for end in (first, first + len(part))))
            experts, begin = (tensor, 0) if not isinstance(tensor, DTensor) else own_slice(tensor)
            found |= {f"{before}.experts.{begin + i}.{after}": x[rows] for i, x in enumerate(experts)}
    return found


def own_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors that a model's files hold, by their names there."""
    adapters, kept = adapter_parameters(model), model.state_dict().keys()
    tensors = {n: p for n, p in model.named_parameters() if id(p) not in adapters}
    tensors |= {n: b for n, b in model.named_buffers() if n in kept}
    return {original_name(name): tensor for name, tensor in tensors.items()}


def can_take_apart(model: PreTrainedModel, named: Mapping[str, Tensor]) -> bool:
    """Whether `in_files` gives the tensors that transformers would save."""
    meta = {name: torch.empty_like(p, device="meta") for name, p in named.items()}
    try:
        return in_files(model, meta).keys() == revert_weight_conversion(model, meta).keys()
    except ValueError:
        return False


def own_slice(tensor: DTensor) -> tuple[Tensor, int]:
    """What this process holds of a tensor, and its first row in the whole."""
    place = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1]
    return tensor.to_local(), place[0]


def digest_of(file: Path) -> str:
    """Size and hash, to tell apart two models of the same shapes; of the bytes at equal odd distances."""
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
