"""Tokenizer, model and adapters from a `ModelConfig`, with the checks that belong to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rl.config import ModelConfig

STORAGE_DTYPE = {"bf16-mixed": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer with the configured chat template; a missing pad token becomes the end-of-text
    token.

    Raises:
        ValueError: there is none that can be read, or it has neither a pad nor an end-of-text token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.name, revision=config.revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.name={config.name!r} gives no tokenizer: {_first_line(error)} It must be a folder that "
            "holds a model and its tokenizer, or such a name on a hub that can be reached"
        ) from error
    if config.chat_template is not None:
        if not Path(config.chat_template).is_file():
            raise ValueError(
                f"model.chat_template={config.chat_template!r} is no file; give the path of a Jinja template"
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


def load_model(config: ModelConfig) -> PreTrainedModel:
    """The model in its storage dtype.

    Raises:
        ValueError: its files cannot be read, or transformers does not know its architecture.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            config.name, revision=config.revision, dtype=STORAGE_DTYPE[config.dtype]
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"model.name={config.name!r}: the model cannot be loaded: {_first_line(error)} It must be whole, "
            "and of an architecture that this transformers knows as a causal language model"
        ) from error
    return cast(PreTrainedModel, model)


def check_config(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, longest: int) -> None:
    """Checks what the model's config alone tells, before its weights are read.

    Args:
        longest: tokens of the longest prompt and the completion that may follow it.

    Raises:
        ValueError: there is no config of a model, its vocabulary is smaller than the tokenizer's, or it has
            fewer positions than `longest`.
    """
    try:
        found = AutoConfig.from_pretrained(config.name, revision=config.revision).get_text_config()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.name={config.name!r}: its config cannot be read: {_first_line(error)}"
        ) from error
    positions = getattr(found, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise ValueError(
            f"the longest prompt and its completion may have {longest} tokens, and {config.name} has "
            f"{positions} positions; lower sampling.max_completion_length (or that of evaluation.sampling), "
            "leave out long prompts, or take another model"
        )
    if (num_ids := getattr(found, "vocab_size", None)) is not None:
        check_vocabulary(num_ids, tokenizer)


def check_vocabulary(num_ids: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError if the tokenizer can produce an id that the embedding has no row for."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= num_ids:
        raise ValueError(
            f"the tokenizer has ids up to {largest}, the model's embedding {num_ids} rows; they do not "
            "belong together: set model.name to a folder that holds the matching tokenizer, or resize the "
            "embedding and save the model first"
        )


def nonfinite_parameters(model: PreTrainedModel) -> list[str]:
    """Names of the parameters that hold NaN or infinity."""
    return [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" .:")
    return f"{line}."


def add_lora(model: PreTrainedModel, config: ModelConfig) -> Any:
    """Adapters added to `model` in place. Embeddings and head stay frozen."""
    from peft import LoraConfig, get_peft_model

    lora = config.lora
    assert lora is not None
    if config.reference.update_every:
        raise ValueError(
            "model.reference.update_every moves a copy of the weights, and with model.lora the reference is "
            "the base model "
            "without a copy; use model.reference.update_every=0"
        )
    peft_config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, peft_config)
    except ValueError as error:
        raise ValueError(f"model.lora.target_modules={lora.target_modules!r}: {error}") from error
