"""The diffusion model being trained: loading, scoring, adapters, and saving."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from rl.causal import autocast, load, snapshot
from rl.config.diffusion import DiffusionModelConfig
from rl.diffusion.adapters import write_record
from rl.diffusion.model import (
    DiffusionScorer,
    find_mask_token,
    is_shifted,
    load_diffusion_model,
    random_diffusion_model,
    use_fused_diffusion_layers,
)
from rl.diffusion.saved_config import load_diffusion_tokenizer, model_config
from rl.model.adapters import add_lora, load_adapter
from rl.model.bidirectional import Documents
from rl.model.loading import check_vocabulary, context_length, storage_dtype
from rl.model.saving import save_model
from rl.together import SummedGradients

ARCHITECTURE = "MaskedDiffusionLM"


class DiffusionPolicy:
    """A masked diffusion model, its tokenizer and its adapters on the accelerator's device.

    Args:
        name: folder or hub name; `config.name` with built-in names resolved.

    Attributes:
        is_coarse: log-probs are compared with those of a model in bf16.
        unread: files that `rl.sharded` is to read weights from; none, as they are loaded already.
    """

    in_step, unread = False, ()
    autocast, snapshot, load = autocast, snapshot, load

    def __init__(self, config: DiffusionModelConfig, accelerator: Accelerator, *, name: str) -> None:
        self.config, self.accelerator = config, accelerator
        plain = config.plain(name)
        self.tokenizer = load_diffusion_tokenizer(plain)
        self.dtype = storage_dtype(plain)
        self.mask_token_id = find_mask_token(
            self.tokenizer, model_config(name, config.revision), config.mask_token
        )
        make = load_diffusion_model
        if config.from_scratch is not None:
            make = partial(random_diffusion_model, changes=config.from_scratch)
        model = make(
            name,
            revision=config.revision,
            dtype=self.dtype,
            mask_token_id=self.mask_token_id,
            shift=config.shift,
        )
        if accelerator.device.type == "cuda":
            use_fused_diffusion_layers(model.to(accelerator.device), plain)
        check_vocabulary(model.get_input_embeddings().weight.shape[0], self.tokenizer)  # type: ignore[union-attr]
        if config.gradient_checkpointing is True:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.peft_model: Any = add_lora(model, plain) if config.lora else None
        self.scorer = DiffusionScorer(model).to(accelerator.device)
        self.scorer.train()
        self.is_coarse = config.dtype != "fp32"
        if config.compile:
            for layer in model.base_model.layers:  # type: ignore[union-attr]
                layer.compile(dynamic=True)

    @property
    def model(self) -> PreTrainedModel:
        return self.scorer.model

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def context_length(self) -> int | None:
        return context_length(self.model.config)

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def finish_gradients(self, max_norm: float) -> float:
        return SummedGradients(self.trainable, self.accelerator.num_processes).finish(max_norm)

    def load_weights(self, folder: Path) -> None:
        """Loads the weights (or the adapter) that `write_model` wrote, bit for bit."""
        if self.peft_model is not None:
            load_adapter(self.peft_model, folder, self.device)
            return
        saved = load_diffusion_model(str(folder), dtype=self.dtype)
        self.model.load_state_dict(saved.state_dict())

    @torch.no_grad()
    def canary(self) -> tuple[list[int], list[float]]:
        """Ids from all over the vocabulary, and log p(ids[i] | ids[0] and masks) for i >= 1.

        If log-probs are coarse, they are the likeliest ids: rounding moves a log-prob of -20 by more than a
        lost weight would.
        """
        size = self.model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
        spread = [token for i in range(18) if (token := (i * 7919 + 13) % size) != self.mask_token_id][:16]
        ids = torch.tensor(spread, device=self.device)
        canvas = torch.full_like(ids, self.mask_token_id)
        canvas[0] = ids[0]
        columns = torch.arange(1, len(ids), device=self.device)
        documents = Documents.of([len(ids)], self.device)
        training = self.scorer.training
        self.scorer.eval()
        with self.autocast():
            if self.is_coarse:
                ids[1:] = self.scorer.likeliest(canvas, documents, columns)
            logprobs = self.scorer(canvas, documents, columns, ids[1:])[0]
        self.scorer.train(training)
        return ids.tolist(), logprobs.float().tolist()

    def write_model(self, folder: Path, save: Callable[[Path], None] | None = None) -> None:
        """Writes a Hugging Face folder that `load_diffusion_model` opens (with LoRA an adapter's folder), and
        the tokenizer. `save` replaces the writing of the weights and settings.

        Engines for causal models do not know the name of its architecture, so none serves it as causal.
        """
        (save or partial(save_model, self.peft_model or self.model, self.model))(folder)
        if self.peft_model is not None:
            write_record(folder, mask_token_id=self.mask_token_id, shift=is_shifted(self.model))
        self.tokenizer.save_pretrained(folder)
        config_file = folder / "config.json"
        if config_file.exists():
            dtype = "float32" if self.config.dtype == "fp32" else "bfloat16"
            changed = {"architectures": [ARCHITECTURE], "dtype": dtype}
            config_file.write_text(json.dumps(json.loads(config_file.read_text()) | changed, indent=2) + "\n")
