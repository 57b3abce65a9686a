"""Tokenizer, model and adapters from a `ModelConfig`, with the checks that belong to them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from rl.config import ModelConfig
from rl.config.sections import TrainedModelConfig
from rl.model.adapter_folder import find_adapter, merge
from rl.model.exactness import backbone
from rl.model.linear import add_gradients_in_products


def base_of(config: ModelConfig) -> ModelConfig:
    """The config with an adapter's name replaced by that of its base model; else the config itself."""
    if (adapter := find_adapter(config.name, config.revision)) is None:
        return config
    return base_of(config.model_copy(update={"name": adapter.base, "revision": adapter.revision}))


def storage_dtype(config: TrainedModelConfig) -> torch.dtype:
    """The dtype of the model's own weights. Under LoRA they are frozen: bf16 loses nothing that bf16 compute
    would see, and the adapters stay fp32.
    """
    if config.dtype == "bf16" or (config.dtype == "bf16-mixed" and config.lora is not None):
        return torch.bfloat16
    return torch.float32


def load_tokenizer(config: ModelConfig, *, reader: Any = AutoTokenizer) -> PreTrainedTokenizerBase:
    """The model's tokenizer with the configured chat template; without a pad token it pads by end-of-text.
    An adapter's own tokenizer is used if it has one, else that of its base.

    Args:
        reader: a tokenizer class of transformers; default: the one that its files ask for.

    Raises:
        ValueError: no tokenizer can be read, or it has neither a pad nor an end-of-text token.
    """
    try:
        if not get_tokenizer_config(config.name, revision=config.revision):
            config = base_of(config)
        tokenizer = reader.from_pretrained(config.name, revision=config.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        refuse_custom_code(config.name, error)
        raise ValueError(
            f"model.name={config.name!r} gives no tokenizer: {first_line(error)} It must be a folder that "
            "holds a model and its tokenizer, or the name of such a model on a hub that can be reached"
        ) from error
    if config.chat_template is not None:
        if not Path(config.chat_template).is_file():
            raise ValueError(
                f"model.chat_template={config.chat_template!r} is not a file; give a Jinja template's path"
            )
        tokenizer.chat_template = Path(config.chat_template).read_text()
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer of {config.name} has neither a pad nor an end-of-text token, so no "
                "completion can end; add eos_token to its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def refuse_custom_code(name: str, error: Exception) -> None:
    """Raises ValueError if transformers failed because a model brings its own Python code.

    transformers would ask on the terminal, and a `y` would run that code in the trainer, with all its rights.
    """
    if "trust_remote_code" in str(error):
        raise ValueError(
            f"model.name={name!r} needs Python code that comes with it (auto_map in its config files), but "
            "cohort runs no code of a model folder; use a model whose architecture this transformers knows, "
            "or convert it to one and leave auto_map out"
        ) from error


def load_model(config: ModelConfig) -> PreTrainedModel:
    """The model in its storage dtype. An adapter is merged into its base, or with `lora` left to the caller,
    who trains it further.

    Raises:
        ValueError: its files cannot be read, or transformers does not know its architecture; or an adapter
            does not fit its base.
    """
    if (adapter := find_adapter(config.name, config.revision)) is not None:
        dtype = "bf16" if storage_dtype(config) == torch.bfloat16 else "fp32"
        base = {"name": adapter.base, "revision": adapter.revision, "dtype": dtype, "lora": None}
        model = load_model(config.model_copy(update=base))
        if config.lora is None:
            merge(model, adapter)
        return model
    return read_model(config)


def read_model(config: ModelConfig, /, **options: Any) -> PreTrainedModel:
    """transformers' model of the files at `model.name`, with its refusals in our words (`load_model`)."""
    options |= {"revision": config.revision, "dtype": storage_dtype(config), "trust_remote_code": False}
    try:
        return cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(config.name, **options))
    except (OSError, ValueError, SafetensorError) as error:
        refuse_custom_code(config.name, error)
        raise ValueError(
            f"model.name={config.name!r}: the model cannot be loaded: {first_line(error)} It must be whole, "
            "and of an architecture that this transformers knows as a causal language model"
        ) from error


def use_fused_layers(model: PreTrainedModel, config: ModelConfig, *, is_checked: bool = False) -> None:
    """Prepares a model on a CUDA device for bf16 compute: a bf16 residual stream under autocast, gradients of
    linear layers that are added up in fp32, and Liger's Triton norms, rotary embedding and gated MLP. The
    latter need `liger-kernel` and a family that it knows; mixtures of experts are left out.

    Args:
        is_checked: another model of the same family was compared with its own layers.

    Raises:
        ValueError: the fused layers do not reproduce the model's own hidden states.
    """
    if config.dtype == "fp32":
        return
    embedding = cast(Any, model.get_input_embeddings())
    embedding.register_forward_hook(narrow_under_autocast)
    if config.fused_layers and config.lora is None:
        add_gradients_in_products(model)
    # Liger's kernel of stacked experts ignores autocast, and its norms alone change a mixture's routes.
    has_experts = any(p.ndim == 3 for p in model.parameters())
    if not config.fused_layers or has_experts or importlib.util.find_spec("liger_kernel") is None:
        return
    if is_checked:
        _fuse(model)
        return
    stored = storage_dtype(config)
    ids = torch.arange(64, device=model.device)[None] % model.config.get_text_config().vocab_size

    def hidden(narrow: bool) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=narrow):
            return backbone(model)(input_ids=ids, use_cache=False).last_hidden_state.float()

    exact = hidden(False) if stored == torch.float32 else _in_fp32(model, lambda: hidden(False))
    plain = hidden(True)
    _fuse(model)
    rounded, gap = (((x - exact).norm() / exact.norm()).item() for x in (plain, hidden(True)))
    if not gap < 1.5 * rounded + 0.01:
        raise ValueError(
            f"Liger's layers change the hidden states of {type(model).__name__} by {gap:.2g}, where bf16 "
            f"alone rounds by {rounded:.2g}; use model.fused_layers=false"
        )


def _fuse(model: PreTrainedModel) -> None:
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    with _for_one_instance(sys.modules[type(model).__module__]):
        _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)


@contextmanager
def _for_one_instance(family: ModuleType, rotary: str = "apply_rotary_pos_emb") -> Iterator[None]:
    """Undoes what Liger replaces in the module of a whole family, whose kernels would fail for an engine's
    copy on a CPU. The patched instance keeps its own methods. Only the rotary embedding is looked up in the
    module: there CUDA tensors get the fused one.
    """
    before = dict(vars(family))
    try:
        yield
        fused: Any = getattr(family, rotary, None)
    finally:
        for name, value in before.items():
            setattr(family, name, value)
    found = before.get(rotary)
    if found is None or fused is found:
        return
    plain: Any = getattr(found, "plain", found)

    def dispatch(q: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (fused if q.is_cuda else plain)(q, *args, **kwargs)

    dispatch.plain = plain  # type: ignore[attr-defined]
    setattr(family, rotary, dispatch)


def _in_fp32(model: PreTrainedModel, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What a bf16 model computes in fp32. Its weights are restored exactly, since fp32 holds every bf16.
    Buffers, such as rotary frequencies, are wider and not touched.
    """
    narrow = [p for p in model.parameters() if p.dtype == torch.bfloat16]
    for p in narrow:
        p.data = p.data.float()
    try:
        return compute()
    finally:
        for p in narrow:
            p.data = p.data.bfloat16()


def narrow_under_autocast(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
    """Narrows embeddings: autocast leaves them in fp32, and so every residual sum and norm of the model."""
    if not torch.is_autocast_enabled(output.device.type):
        return output
    return output.to(torch.get_autocast_dtype(output.device.type))


def check_config(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, longest: int) -> None:
    """Checks what the model's config alone can tell, before its weights are read.

    Args:
        longest: tokens of the longest prompt and the completion that may follow it.

    Raises:
        ValueError: `read_config` refuses it, or its vocabulary or number of positions is too small.
    """
    found = read_config(config).get_text_config()
    positions = context_length(found)
    if positions is not None and longest > positions:
        raise ValueError(
            f"the longest prompt and its completion may have {longest} tokens, but {config.name} has "
            f"{positions} positions; lower sampling.max_completion_length (or that of evaluation.sampling), "
            "lower data.max_prompt_length, shorten demonstrations, or take another model"
        )
    if (num_ids := getattr(found, "vocab_size", None)) is not None:
        check_vocabulary(num_ids, tokenizer)


def read_config(config: ModelConfig) -> PreTrainedConfig:
    """The model's transformers config; raises ValueError if it cannot be read, or weights are quantised."""
    try:
        base = base_of(config)
        whole = AutoConfig.from_pretrained(base.name, revision=base.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        refuse_custom_code(config.name, error)
        named = f"model.name={config.name!r}"
        if Path(config.name, "adapter_config.json").is_file():
            named += ", an adapter: its base (base_model_name_or_path in adapter_config.json)"
        raise ValueError(
            f"{named}: its config cannot be read: {first_line(error)} Check the spelling, or name a folder "
            "that holds a model; a private or gated model needs `hf auth login`"
        ) from error
    for part in (whole, whole.get_text_config()):
        check_not_quantised(getattr(part, "quantization_config", None), config.name)
    return whole


def check_not_quantised(quantisation: Any, name: str) -> None:
    """Raises ValueError for the `quantization_config` of a model: integers have no gradient."""
    if not quantisation:
        return
    fields = quantisation if isinstance(quantisation, Mapping) else vars(quantisation)
    method = str(fields.get("quant_method", "unknown"))
    raise ValueError(
        f"model.name={name!r} holds quantised weights (quantization_config in its config.json, quant_method="
        f"{method.rpartition('.')[2].lower()}), which cannot be trained; use the model that it "
        "was quantised from, or save a dequantised bfloat16 copy (transformers: "
        "model.dequantize().save_pretrained(FOLDER)) and set model.name to its folder"
    )


def context_length(config: PreTrainedConfig) -> int | None:
    """The number of a model's positions; None: its config names no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def num_ids(model: PreTrainedModel) -> int:
    """Ids that a model can both read and answer with. Inkling 2 has more rows of embedding than logits."""
    ends = cast(Any, model.get_input_embeddings()), cast(Any, model.get_output_embeddings())
    return min(len(end.weight) for end in ends if end is not None)


def check_vocabulary(num_ids: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError if the tokenizer can produce an id for which the embedding has no row."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= num_ids:
        raise ValueError(
            f"the tokenizer has ids up to {largest}, but the model's embedding has {num_ids} rows; they do "
            "not belong together: set model.name to a folder that holds the matching tokenizer, or resize "
            "the embedding and save the model first"
        )


def nonfinite_parameters(model: PreTrainedModel) -> list[str]:
    """Names of the parameters that hold NaN or infinity."""
    return [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]


def first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" .:")
    return f"{line}."
