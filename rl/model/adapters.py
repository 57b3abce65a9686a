"""LoRA adapters on a model, and the checks that belong to them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from rl.config import ModelConfig
from rl.config.sections import LoraConfig
from rl.model.adapter_folder import Adapter
from rl.model.exactness import backbone
from rl.model.loading import first_line, read_config

Plan = Callable[[PreTrainedModel, LoraConfig], dict[str, Any] | None]
"""Chooses what to adapt, as settings of peft; None leaves `target_modules` to peft."""
BASE = ".base_layer."
FORMS = (
    *("use_rslora", "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "target_parameters"),
    *("layers_to_transform", "trainable_token_indices", "lora_bias", "bias"),
)
"""Settings of peft besides rank and targets: under other values the same tensors are another adapter."""


def check_targets(model: PreTrainedModel, targets: str | list[str]) -> None:
    """Raises ValueError, with near names, if a target fits no module: peft would silently leave it out.

    A name in a list fits modules that end with it; a text is "all-linear" or a regex of whole names.
    """
    if targets == "all-linear":
        return
    given = [targets] if isinstance(targets, str) else targets
    patterns = given if isinstance(targets, str) else [rf"(.*\.)?{re.escape(target)}" for target in targets]
    names = [name for name, _ in model.named_modules() if name]
    try:
        found = [any(re.fullmatch(pattern, name) for name in names) for pattern in patterns]
    except re.error as error:
        raise ValueError(f"model.lora.target_modules={targets!r} is not a pattern: {error}") from None
    if targets and all(found):
        return
    missing = [target for target, is_there in zip(given, found, strict=True) if not is_there]
    head = model.get_output_embeddings()
    weights = {name: getattr(m, "weight", None) for name, m in model.named_modules() if m is not head}
    matrices = [name for name, weight in weights.items() if getattr(weight, "ndim", 0) == 2]
    known = list(dict.fromkeys(name.split(".")[-1] for name in matrices))
    near = [n for t in missing for n in difflib.get_close_matches(t.split(".")[-1], known, n=2)]
    hint = f"; did you mean {' or '.join(dict.fromkeys(near))}?" if near else ";"
    if isinstance(targets, str):
        hint = "; a text must fit whole names, items of a list such as [q_proj, v_proj] their ends:"
    called = " or ".join(missing) or "nothing"
    raise ValueError(
        f"model.lora.target_modules={targets!r}: no module is called {called}{hint} there are "
        f"{', '.join(known)}, and all-linear takes every linear layer except the head"
    )


def peft_config_of(config: ModelConfig, model: PreTrainedModel, plan: Plan | None) -> Any:
    """peft's config of `config.lora`; raises ValueError if a target fits nothing."""
    from peft import LoraConfig as PeftConfig

    lora = config.lora
    assert lora is not None
    targets = plan(model, lora) if plan is not None else None
    if targets is None:
        check_targets(model, lora.target_modules)
    return PeftConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        task_type="CAUSAL_LM",
        **(targets or {"target_modules": lora.target_modules}),
    )


def difference(adapter: Adapter, config: ModelConfig, plan: Plan | None = None) -> str:
    """How the adapter that `model.lora` asks for differs from a folder's; "" if it does not.

    Targets are compared by the names and shapes of their tensors, on a model without weights.
    """
    from peft import get_peft_model, get_peft_model_state_dict, load_peft_weights

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(read_config(config), trust_remote_code=False)
        asked = peft_config_of(config, model, plan)
        there, ours = adapter.settings, asked.to_dict()
        for key in ("peft_type", "r", "lora_alpha", *FORMS):
            values = [sorted(v) if isinstance(v, list | set) else v for v in (there.get(key), ours.get(key))]
            if (values[0] or None) != (values[1] or None):
                return f"{key} is {there.get(key)} there and {ours.get(key)} in model.lora"
        adapted: Any = get_peft_model(model, asked)
    wanted = {name: tensor.shape for name, tensor in get_peft_model_state_dict(adapted).items()}
    saved = load_peft_weights(str(adapter.folder), device="cpu").items()
    same = wanted == {name: tensor.shape for name, tensor in saved}
    return "" if same else "it adapts other layers than model.lora"


def add_lora(model: PreTrainedModel, config: ModelConfig, plan: Plan | None = None) -> Any:
    """Adds adapters to `model` in place. The head stays frozen, and so do embeddings tied to it.

    Raises:
        ValueError: one of `target_modules` fits nothing, or the head; or the reference is to follow.
    """
    from peft import get_peft_model

    lora = config.lora
    assert lora is not None
    if config.reference.update_every:
        raise ValueError(
            "model.reference.update_every moves a copy of the weights, but with model.lora the reference is "
            "the base model without a copy; use model.reference.update_every=0"
        )
    named = f"model.lora.target_modules={lora.target_modules!r}"
    asked = peft_config_of(config, model, plan)
    name = str(Path(config.name).absolute()) if Path(config.name).is_dir() else config.name
    head, embeddings = cast(Any, model.get_output_embeddings()), cast(Any, model.get_input_embeddings())
    tied = head is not None and head.weight is embeddings.weight
    frozen = [head, embeddings] if tied else [head]
    try:
        adapted = get_peft_model(model, asked, revision=config.revision)
    except ValueError as error:
        raise ValueError(f"{named}: {error}") from error
    # peft knows no name of a model made from tensors, and a relative one is lost with the working directory.
    adapted.peft_config["default"].base_model_name_or_path = name
    for part, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if base is not None and any(base is layer for layer in frozen):
            raise ValueError(
                f"{named} adapts {part}, but log-probs are computed from the head's own weights: the adapter "
                "would not be trained, or only the engine would have it; leave out the output head, and "
                "embeddings that are tied to it"
            )
    return adapted


def load_adapter(peft_model: Any, folder: Path, device: torch.device) -> None:
    """Loads the adapter saved in `folder` into peft's wrapper, bit for bit."""
    from peft import load_peft_weights, set_peft_model_state_dict

    # In a run of several processes a CPU is called cpu:0, which safetensors refuses.
    where = "cpu" if device.type == "cpu" else str(device)
    set_peft_model_state_dict(peft_model, load_peft_weights(str(folder), device=where))


def check_adapted(model: PreTrainedModel, config: ModelConfig) -> None:
    """Checks that the model computes with its adapters.

    Raises:
        ValueError: peft wrapped a layer that it cannot replace, such as a router that returns several
            tensors, or a layer whose parent reads its weight directly, past the adapter.
    """
    assert config.lora is not None
    named = f"model.lora.target_modules={config.lora.target_modules!r}"
    names = {module: name for name, module in model.named_modules()}
    called: set[nn.Module] = set()
    hooks = [m.register_forward_pre_hook(lambda module, _: called.add(module)) for m in names]
    ids = torch.zeros(1, 4, dtype=torch.long, device=model.device)
    try:
        with torch.no_grad():
            backbone(model)(input_ids=ids, use_cache=False)
    except Exception as error:  # whatever a family's layers raise when one of them is wrapped
        raise ValueError(
            f"{named}: {type(model).__name__} cannot compute with these adapters: {first_line(error)} Name "
            "the layers to adapt, such as [q_proj, v_proj]"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    for module, name in names.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        # A module whose parent was not called either may be an expert that got no token.
        if hasattr(module, "base_layer") and module not in called and parent in called:
            raise ValueError(
                f"{named} adapts {name}, whose weight {type(parent).__name__} reads past the adapter: it "
                "would be sent but not computed with; name the layers to adapt without it, such as "
                "[q_proj, v_proj]"
            )


def original_name(name: str) -> str:
    """The name of an adapted tensor without its adapters; those of several tensors of a module are nested."""
    while BASE in name:
        name = name.replace(BASE, ".", 1)
    return name


def adapter_parameters(model: PreTrainedModel) -> set[int]:
    """Ids of the adapters' own parameters, which are not streamed themselves."""
    layers = (module for module in model.modules() if hasattr(module, "base_layer"))
    return {id(p) for layer in layers for part, p in layer.named_parameters() if "base_layer." not in part}


def unsent(model: PreTrainedModel) -> list[str]:
    """Trainable tensors whose change would not reach the engine. They are not streamed themselves, nor part
    of an adapter whose delta has the shape of a streamed tensor.
    """
    own, covered = adapter_parameters(model), set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for layer in adapters_of(model, name):
                if all(layer.get_delta_weight(a).shape == parameter.shape for a in layer.active_adapters):
                    parts = (p for part, p in layer.named_parameters() if "base_layer." not in part)
                    covered |= set(map(id, parts))
    named = model.named_parameters()
    return [n for n, p in named if p.requires_grad and id(p) in own and id(p) not in covered]


def adapters_of(model: PreTrainedModel, name: str) -> Iterator[Any]:
    """The adapters of one tensor: they wrap its module in a chain, and each adapts one of its tensors."""
    if BASE not in name:
        return
    path, leaf = name.split(BASE)[0], name.rsplit(BASE, 1)[1]
    layer = cast(Any, model.get_submodule(path))
    while hasattr(layer, "base_layer"):
        if getattr(layer, "parameter_name", "weight") == leaf and hasattr(layer, "get_delta_weight"):
            yield layer
        layer = layer.base_layer
