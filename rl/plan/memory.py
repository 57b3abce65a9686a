"""How much memory of a GPU a run needs, predicted from the model's config alone, part by part.

The prediction counts tensors that live at the peak of a backward pass on one GPU: what the optimizer keeps,
what autograd saves for each packed token, a chunk of logits, and what the engine is given. It is for
decoder-only models with gated MLPs; for others the probe (`rl.plan.probe`) alone answers.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch

from rl.config import Config
from rl.model.head import CHUNK_BYTES
from rl.model.loading import storage_dtype
from rl.plan.sizes import ModelSize, adapted, lora_layer_bytes

GIB = 2**30
OVERHEAD_BYTES = int(1.5 * GIB)
"""CUDA context, cuBLAS workspaces and the allocator's rounding."""
FILLED = 0.92
"""Share of a GPU that a plan may fill."""

Phase = Literal["always", "train", "sample"]


@dataclass(frozen=True)
class Part:
    """Bytes on one GPU, and when they are held: always, by the pass that trains, or by the engine."""

    name: str
    bytes: int
    phase: Phase


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs on a GPU of `capacity` bytes.

    Attributes:
        room: bytes that may be filled.
        longest_row: tokens of the longest prompt with one completion; a micro-batch holds at least that.
        fault: why the engine cannot work with what it is given, whatever the total.
    """

    parts: tuple[Part, ...]
    capacity: int
    room: int
    longest_row: int
    fault: str | None = None

    @property
    def total(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def training(self) -> int:
        """Bytes of the training process at its peak, which a run's `memory/peak` and the probe measure."""
        return sum(part.bytes for part in self.parts if part.phase != "sample")

    @property
    def fits(self) -> bool:
        return self.total <= self.room and self.fault is None


def plan_memory(
    size: ModelSize,
    config: Config,
    *,
    capacity: int,
    max_length: int,
    processes: int = 1,
    free: int | None = None,
) -> MemoryPlan:
    """The plan of one of `processes` processes, each with a GPU for its policy and its engine.

    Args:
        max_length: tokens of the longest prompt with its completion, of training and evaluation.
        free: bytes of the GPU that nobody else holds; None: all.
    """
    row = longest_row(config)
    parts = training_parts(size, config, max(row, config.token_budget))
    room, fault = int(FILLED * min(capacity, free or capacity)), None
    weights = engine_weights(size, config)
    parts += [Part("engine weights", weights, "sample")]
    if not uses_vllm(size, config):  # what its sampler holds grows and shrinks with what it samples
        sequence = size.sampled_per_token * max_length + size.sampled_per_sequence
        cache = min(config.max_num_seqs, in_flight(config, processes)) * sequence * engine_width(config)
    else:
        parts += [Part("engine overhead", 2 * OVERHEAD_BYTES, "sample")]
        cache = int(config.engine.gpu_share * capacity) - weights - 2 * OVERHEAD_BYTES
        if cache < cache_bytes(size, config, max_length):
            least = engine_share(size, config, capacity, max_length)
            fault = (
                f"engine.gpu_memory_utilization={config.engine.gpu_share:g} leaves no cache for one sequence "
                f"of {max_length} tokens; it needs {least:.2f}"
            )
    parts += [Part("engine cache", max(cache, 0), "sample")]
    return MemoryPlan(tuple(parts), capacity, room, row, fault)


def longest_row(config: Config) -> int:
    return config.data.max_prompt_length + config.sampling.max_completion_length


def longest_sequence(config: Config) -> int:
    """Tokens of the longest prompt with the longest completion, of training and evaluation."""
    sections = [(config.data, config.sampling)]
    if config.heldout_data:
        sections.append((config.heldout_data, config.evaluation.sampling))
    return max(data.max_prompt_length + sampling.max_completion_length for data, sampling in sections)


def in_flight(config: Config, processes: int) -> int:
    """Most completions that one of the processes has in flight."""
    return max(1, -(-config.in_flight // processes))


def training_parts(size: ModelSize, config: Config, token_budget: int) -> list[Part]:
    """What the training process holds at the peak of a backward pass over a full micro-batch."""
    stored = storage_dtype(config.model).itemsize
    compute = 4 if config.model.dtype == "fp32" else 2
    lora, is_mixed = config.model.lora, config.model.dtype == "bf16-mixed"
    if lora is None:
        trained, master, adapters = size.parameters, stored, 0
        narrowed, head = size.linear, size.head * (4 + compute + (compute if is_mixed else 0))
        layer = size.saved_per_token * compute
    else:
        trained = sum(lora.r * (inputs + outputs) for inputs, outputs in adapted(size, lora))
        master, adapters = 4, trained
        narrowed, head = trained, 0
        layer = lora_layer_bytes(size, lora, config.model.dtype)
    if config.model.gradient_checkpointing is True:
        saved = size.layers * size.hidden * compute + layer
    else:
        saved = size.layers * layer
    copied = config.loss.kl_coef > 0 and lora is None
    return [
        Part("weights", size.parameters * stored + adapters * master, "always"),
        Part("optimizer", 2 * trained * master, "always"),
        Part("reference", size.parameters * stored if copied else 0, "always"),
        Part("overhead", OVERHEAD_BYTES, "always"),
        Part("gradients", trained * master, "train"),
        Part("weights in the compute dtype", narrowed * compute if is_mixed else 0, "train"),
        Part("activations", token_budget * saved, "train"),
        Part("logits", CHUNK_BYTES["cuda"] + head, "train"),
    ]


def uses_vllm(size: ModelSize, config: Config) -> bool:
    """Whether the engine takes a share of the GPU for itself."""
    return takes_share(config) and not size.has_own_sampler


def takes_share(config: Config) -> bool:
    """Whether it is vLLM. engine.name=auto is, but on a machine with a GPU where vLLM is not installed."""
    is_missing = torch.cuda.is_available() and importlib.util.find_spec("vllm") is None
    return config.engine.name == "vllm" or (config.engine.name == "auto" and not is_missing)


def engine_width(config: Config) -> int:
    """Bytes of an element of the engine's weights and cache."""
    wide = "float32" if config.model.dtype == "fp32" else "bfloat16"
    return 4 if (wide if config.engine.dtype == "auto" else config.engine.dtype) == "float32" else 2


def engine_weights(size: ModelSize, config: Config) -> int:
    return size.parameters * engine_width(config)


def cache_bytes(size: ModelSize, config: Config, tokens: int) -> int:
    """Keys and values of `tokens` tokens."""
    return tokens * size.cache_per_token * engine_width(config)


def engine_share(size: ModelSize, config: Config, capacity: int, tokens: int) -> float:
    """The `engine.gpu_memory_utilization` that covers vLLM's weights, graphs and a cache of `tokens`."""
    needed = engine_weights(size, config) + 2 * OVERHEAD_BYTES + cache_bytes(size, config, tokens)
    return -(-100 * needed // capacity) / 100
