"""The diffusion model being trained: loading, scoring, adapters, and saving."""

from __future__ import annotations

import contextlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

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
from rl.model.loading import check_vocabulary, context_length, storage_dtype
from rl.model.saving import save_model
from rl.optimizer import finish_gradients
from rl.policy import Writer
from rl.store.optimizer_state import load_optimizer, optimizer_writer

ARCHITECTURE = "MaskedDiffusionLM"


class DiffusionPolicy:
    """A masked diffusion model, its tokenizer and its adapters on the accelerator's device.

    Args:
        name: folder or hub name; `config.name` with built-in names resolved.
    """

    def __init__(self, config: DiffusionModelConfig, accelerator: Accelerator, *, name: str) -> None:
        self.config, self.accelerator = config, accelerator
        plain = config.plain(name)
        self.tokenizer = load_diffusion_tokenizer(plain)
        self.dtype = storage_dtype(plain)
        self.mask_token_id = find_mask_token(
            self.tokenizer, model_config(name, config.revision), config.mask_token
        )
        load = load_diffusion_model
        if config.from_scratch is not None:
            load = partial(random_diffusion_model, changes=config.from_scratch)
        model = load(
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
        self.sharded = False
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

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.dtype == "bf16-mixed":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        # FSDP averages gradients over processes, but they must add up, as weights are global shares.
        (loss * self.accelerator.num_processes if self.sharded else loss).backward()

    def finish_gradients(self, max_norm: float) -> float:
        if not self.sharded:
            number = self.accelerator.num_processes
            return finish_gradients(self.trainable(), max_norm, num_processes=number)
        norm: Any = nn.utils.clip_grad_norm_([p for _, p in self.trainable()], max_norm)
        return norm.full_tensor().item()

    def snapshot(self, optimizer: torch.optim.Optimizer) -> Writer:
        weights, write_optimizer = self.whole_weights(), optimizer_writer(optimizer, self.trainable())

        def write(folder: Path) -> None:
            if self.accelerator.is_main_process:
                self.write_model(folder, weights)
            write_optimizer(folder)

        return write

    def load(self, folder: Path, optimizer: torch.optim.Optimizer) -> None:
        self.load_weights(folder)
        load_optimizer(folder, optimizer, self.trainable())

    def load_weights(self, folder: Path) -> None:
        """Loads the weights (or the adapter) that `write_model` wrote, bit for bit."""
        if self.peft_model is not None:
            load_adapter(self.peft_model, folder, self.device)
            return
        saved = load_diffusion_model(str(folder), dtype=self.dtype)
        if not self.sharded:
            self.model.load_state_dict(saved.state_dict())
            return
        whole = dict(saved.named_parameters())
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                assert isinstance(p, DTensor)
                # Every process has read the whole tensor, so nothing has to be sent.
                share = distribute_tensor(
                    whole[name].to(self.device), p.device_mesh, p.placements, src_data_rank=None
                )
                p.copy_(share)

    def shard(self) -> None:
        """Splits the weights of every layer over the processes (FSDP2), which then averages gradients."""
        mesh = init_device_mesh(self.device.type, (self.accelerator.num_processes,))
        layers: Any = self.model.base_model.layers
        for part in (*layers, self.scorer):
            fully_shard(part, mesh=mesh)
        self.sharded = True

    def whole_weights(self) -> dict[str, Tensor] | None:
        """All weights on the CPU of the main process, gathered with the others' help; None if they are not
        split.
        """
        if not self.sharded:
            return None
        found = {}
        for name, p in self.model.named_parameters():
            assert isinstance(p, DTensor)
            whole = p.full_tensor().detach()
            if self.accelerator.is_main_process:
                found[name] = whole.cpu()
        return found

    def write_model(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Writes a Hugging Face folder that `load_diffusion_model` opens (with LoRA an adapter's folder), and
        the tokenizer.

        Engines for causal models do not know the name of its architecture, so none serves it as causal.
        """
        save_model(self.peft_model or self.model, self.model, folder, state_dict=weights)
        if self.peft_model is not None:
            write_record(folder, mask_token_id=self.mask_token_id, shift=is_shifted(self.model))
        self.tokenizer.save_pretrained(folder)
        config_file = folder / "config.json"
        if config_file.exists():
            dtype = "float32" if self.config.dtype == "fp32" else "bfloat16"
            changed = {"architectures": [ARCHITECTURE], "dtype": dtype}
            config_file.write_text(json.dumps(json.loads(config_file.read_text()) | changed, indent=2) + "\n")
