"""The names of a model's tensors: transformers', which a policy streams; a checkpoint's, which vLLM loads;
vLLM's own, which it computes with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from rl.model.streamed import streamed
from rollout.vllm.internals import reach_or

# A checkpoint's matrix of one expert -> vLLM's parameter of all experts of the layer; gate comes before up.
_OF_EXPERT = {"gate_proj": "w13", "w1": "w13", "down_proj": "w2", "w2": "w2"}
_FIRST_EXPERT = re.compile(rf"(.*\.experts)\.0\.({'|'.join(_OF_EXPERT)})\.weight")
# What vLLM's loaders rename by hand.
_BY_HAND = {r"\.router\.layer\.weight$": ".gate.weight"}


class Names:
    """The names in one model, from transformers' own conversions of checkpoints and vLLM's mapper.

    Args:
        config: transformers' config of the model; None: every name is the same everywhere.
        model: vLLM's model.
    """

    def __init__(self, config: Any, model: nn.Module) -> None:
        mapper = reach_or("model", "mapper", model, None)
        self.ours: Any = _without_weights(config, always=mapper is not None)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._converted: set[str] = set()
        self._of_vllm: dict[str, str] = {}
        if self.ours is None:
            return
        for name, tensor in streamed(self.ours):
            self.shapes[name] = tuple(tensor.shape)
            stored = list(revert_weight_conversion(self.ours, {name: tensor}))
            if stored != [name]:
                self._converted.add(name)
            for own in stored if mapper is None else mapper.apply_list(stored):
                self._of_vllm[_of_all_experts(own)] = name

    def transformers_name(self, own: str) -> str:
        """transformers' name of vLLM's parameter `own`."""
        return self._of_vllm.get(own, own)

    def is_transposed(self, name: str) -> bool:
        """Whether transformers keeps these experts [E, in, out], where vLLM has [E, out, in]."""
        if self.ours is None or len(self.shapes.get(name, ())) != 3:
            return False
        return bool(getattr(self.ours.get_submodule(name.rpartition(".")[0]), "is_transposed", False))

    def as_checkpoint(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What vLLM's loaders read: most tensors as they are, the experts of a layer one by one."""
        if name not in self._converted:
            yield name, tensor
            return
        yield from revert_weight_conversion(self.ours, {name: tensor}).items()


def _without_weights(config: Any, *, always: bool) -> Any:
    """A model without weights; unless `always`, None if its checkpoints have its own names."""
    if config is None:
        return None
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception:  # a config of vLLM's own, or a class that vLLM has changed for its process
        return None
    return model if always or get_model_conversion_mapping(model, add_legacy=False) else None


def _of_all_experts(name: str) -> str:
    if (found := _FIRST_EXPERT.fullmatch(name)) is not None:
        return f"{found[1]}.{_OF_EXPERT[found[2]]}_weight"
    for pattern, own in _BY_HAND.items():
        name = re.sub(pattern, own, name)
    return name
