"""Tokenizer, model and adapters from a `ModelConfig`, with the checks that belong to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rl.config import ModelConfig

STORAGE_DTYPE = {"bf16-mixed": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer with the configured chat template; a missing pad token becomes the end-of-text
    token.

    Raises:
        ValueError: there is neither a pad nor an end-of-text token, or no fast path to load one.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.name, revision=config.revision)
    except OSError as error:
        raise ValueError(
            f"model.name={config.name!r} is neither a folder with a model nor a name on a hub that can be "
            "reached: "
            f"{str(error).splitlines()[0]}"
        ) from None
    if config.chat_template is not None:
        tokenizer.chat_template = Path(config.chat_template).read_text()
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer of {config.name} has neither a pad nor an end-of-text token, so no "
                "completion can end; "
                "add eos_token to its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(config: ModelConfig) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        config.name, revision=config.revision, dtype=STORAGE_DTYPE[config.dtype]
    )
    return cast(PreTrainedModel, model)


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError if the tokenizer can produce an id that the embedding has no row for."""
    rows = cast(Any, model.get_input_embeddings()).weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise ValueError(
            f"the tokenizer has ids up to {largest}, the model's embedding {rows} rows; they do not belong "
            "together: "
            "set model.name to a folder that holds the matching tokenizer, or resize the embedding and save "
            "the model first"
        )


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
    return get_peft_model(model, peft_config)
