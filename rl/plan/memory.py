"""How much GPU memory a run needs, predicted from the model's config alone, part by part.

The prediction counts what one GPU holds at the peak of a backward pass. That is the optimizer's state, what
autograd saves for each packed token, a chunk of logits, and the engine's share. It covers decoder-only models
with gated MLPs; others only have the probe (`rl.plan.probe`).
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Literal

import torch

from rl.config import Config
from rl.config.diffusion import DiffusionConfig
from rl.model.head import CHUNK_BYTES
from rl.model.loading import storage_dtype
from rl.model.on_host import PIECE_BYTES
from rl.plan.measured import layer_bytes
from rl.plan.sizes import Adapters, ModelSize, adapters_of, lora_layer_bytes

GIB = 2**30
OVERHEAD_BYTES = int(1.5 * GIB)
"""CUDA context, cuBLAS workspaces and the allocator's rounding."""
SCORE_BYTES = (8, 12)
"""What soft-capped attention keeps of a score for its backward pass, in fp32 and in 16 bits: tanh, softmax
and its narrow copy; and what one layer holds besides while it is computed or differentiated.
"""
FILLED = 0.92
"""Share of a GPU that a plan may fill."""

Phase = Literal["always", "learn", "train", "update", "engine", "sample"]
"""When memory is held. By the training process: always; from the first backward pass to the end of the
update; in a forward and backward pass; in the optimizer step. By the engine: always; while it is awake.
"""
Planned = Config | DiffusionConfig
"""Configs of runs that can be planned; a run without an engine only trains."""


@dataclass(frozen=True)
class Card:
    """One of the run's equal GPUs, and the number of the run's processes.

    Attributes:
        capacity: bytes of the GPU.
        free: bytes that nobody else holds; None: all.
        host: bytes of host memory that each process may pin; None: as many as it needs.
    """

    name: str
    capacity: int
    processes: int = 1
    free: int | None = None
    host: int | None = None


@dataclass(frozen=True)
class Part:
    """Bytes on one GPU, and when they are held."""

    name: str
    bytes: int
    phase: Phase


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs on a GPU of `capacity` bytes.

    Attributes:
        room: bytes that the run may fill.
        fault: why the engine cannot work with what it is given, whatever the total.
        sleeps: the engine frees its "sample" parts while the trainer computes.
    """

    parts: tuple[Part, ...]
    capacity: int
    room: int
    fault: str | None = None
    sleeps: bool = False

    def held(self, *phases: Phase) -> int:
        return sum(part.bytes for part in self.parts if part.phase in phases)

    @property
    def total(self) -> int:
        """Bytes at the run's peak: of both together, or the larger one if the engine sleeps."""
        learning, awake = self.training - self.held("always"), self.held("sample")
        most = max(learning, awake) if self.sleeps else learning + awake
        return self.held("always", "engine") + most

    @property
    def training(self) -> int:
        """Bytes of the training process at its peak, as `memory/peak` and the probe measure it."""
        return self.held("always", "learn") + max(self.held("train"), self.held("update"))

    @property
    def fits(self) -> bool:
        return self.total <= self.room and self.fault is None


def plan_memory(size: ModelSize, config: Planned, card: Card, max_length: int) -> MemoryPlan:
    """The plan of one process, which has a card for its policy and its engine.

    Args:
        max_length: tokens of the longest prompt with its completion, of training and evaluation.
    """
    capacity, processes = card.capacity, card.processes
    tokens, shares = max(config.token_budget, indivisible(config)), num_shares(config, processes)
    parts = training_parts(size, config, tokens, shares)
    room, fault = int(FILLED * min(capacity, card.free or capacity)), None
    if not isinstance(config, Config) or config.engine.name == "server":
        return MemoryPlan(tuple(parts), capacity, room)
    weights = engine_weights(size, config)
    parts += [Part("engine weights", weights, "sample")]
    if not uses_vllm(size, config):  # the memory of its own sampler follows what it samples
        sequence = size.sampled_per_token * max_length + size.sampled_per_sequence
        cache = min(config.max_num_seqs, in_flight(config, processes)) * sequence * engine_width(config)
    else:
        parts += [Part("engine overhead", 2 * OVERHEAD_BYTES, "engine")]
        cache = int(config.engine.gpu_share * capacity) - weights - 2 * OVERHEAD_BYTES
        if cache < cache_bytes(size, config, max_length):
            least = engine_share(size, config, capacity, max_length)
            fault = (
                f"engine.gpu_memory_utilization={config.engine.gpu_share:g} leaves no cache for one sequence "
                f"of {max_length} tokens; it needs {least:.2f}"
            )
    parts += [Part("engine cache", max(cache, 0), "sample")]
    is_asleep = uses_vllm(size, config) and config.memory.engine_sleeps is True
    return MemoryPlan(tuple(parts), capacity, room, fault, is_asleep)


def indivisible(config: Planned) -> int:
    """Tokens of the longest episode, prompt included; its rows share a micro-batch, whatever the budget."""
    if not isinstance(config, Config):
        return config.longest_row
    return config.longest_row + (config.rows_of_episode - 1) * config.sampling.max_completion_length


def in_flight(config: Planned, processes: int) -> int:
    """Most completions in flight of one process, or most noised copies of texts that it trains on."""
    return max(1, -(-config.in_flight // processes))


def num_shares(config: Planned, processes: int) -> int:
    """The number of parts that weights, gradients and moments are split into; 1: they are not split."""
    if not isinstance(config, Config) or config.train.sharding not in ("full", "hybrid"):
        return 1
    on_host = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    return processes if config.train.sharding == "full" else min(on_host, processes)


def training_parts(size: ModelSize, config: Planned, token_budget: int, shares: int = 1) -> list[Part]:
    """What the training process holds at the peak of a backward pass over a full micro-batch.

    Args:
        shares: processes that weights, gradients and moments are split over.
    """
    stored = storage_dtype(config.model).itemsize
    compute, chunk = 4 if config.model.dtype == "fp32" else 2, CHUNK_BYTES["cuda"]
    lora, is_mixed = config.model.lora, config.model.dtype == "bf16-mixed"
    if lora is None:
        trained, master, added = size.parameters, stored, Adapters(0, ())
        # The head's fp32 gradient takes products in place; in 16 bits a narrowed head is beside it.
        narrowed, head = size.linear, size.head * (4 if compute == 4 else 6)
        layer, experts = size.saved_per_token * compute, size.experts
        if experts:
            narrowed += experts.weights
            layer += experts.saved_per_token * compute + experts.bytes_per_token
    else:
        added = adapters_of(size, lora)
        trained, master, narrowed, head = added.weights, 4, added.weights, 0
        layer = lora_layer_bytes(size, lora, config.model.dtype)
    layer, largest = layer_bytes(size, config.model) if size.is_measured else (layer, layer)
    narrow = narrowed * compute if is_mixed else 0
    if config.model.gradient_checkpointing is True:
        saved, copies = size.layers * size.hidden * compute + largest, added.copied // size.layers
        # Autocast's copies of all layers live until the forward pass ends, then of one recomputed layer.
        makes_own = is_mixed and lora is None and config.model.fused_layers and not size.is_measured
        live = narrow - makes_own * size.linear * compute  # `AddingLinear` makes its own each time
        narrow = max(live - token_budget * layer, narrow // size.layers)
    else:
        saved, copies = size.layers * layer, added.copied
    kept = getattr(config.model, "keep_logits", False) is True
    logits = token_budget * size.head // size.hidden * compute * kept
    # Plain torch holds four copies of fp32 logits, two beside the gradient; a Triton kernel the 16-bit ones.
    chunks = max(4 * chunk, 2 * chunk + head) if compute == 4 else chunk + head
    if shares > 1:
        # Gathered: the head and two layers, since the next one is prefetched; one layer's whole gradients.
        of_layers = size.linear + (size.experts.weights if size.experts else 0)
        narrow = (2 * of_layers // size.layers + size.head) * compute + trained // size.layers * (compute + 4)
    split = lambda number: -(-number // shares)  # noqa: E731
    optimizer, when = split(2 * trained * master), "always"
    if isinstance(config, Config) and config.memory.optimizer_on_host is True:
        optimizer, when = min(optimizer, max(PIECE_BYTES, 2 * size.head * master)), "update"
    parts = [
        Part("weights", split(size.parameters * stored + added.weights * master), "always"),
        Part("optimizer", optimizer, when),
        Part("reference", reference_bytes(size, config, shares), "always"),
        Part("teacher", teacher_bytes(size, config), "always"),
        Part("overhead", OVERHEAD_BYTES, "always"),
        Part("gradients", split(trained * master), "learn"),
        Part("weights in the compute dtype" if shares == 1 else "gathered weights", narrow, "train"),
        Part("adapted experts", copies * stored, "train"),
        Part("activations", token_budget * saved, "train"),
        Part("soft-capped scores", token_budget * score_bytes(size, config), "train"),
        Part("logits", logits + chunks, "train"),
    ]
    optional = ("adapted experts", "soft-capped scores", "teacher")
    return [part for part in parts if part.bytes or part.name not in optional]


def score_bytes(size: ModelSize, config: Planned) -> int:
    """What soft-capped attention holds for a token in the longest row."""
    layers = 1 if config.model.gradient_checkpointing is True else size.layers
    return size.capped_heads * config.longest_row * (SCORE_BYTES[0] * layers + SCORE_BYTES[1])


def reference_bytes(size: ModelSize, config: Planned, shares: int = 1) -> int:
    """Bytes on one GPU; of a reference on the host only embedding, head and one layer at a time."""
    if not isinstance(config, Config) or not config.copies_weights:
        return 0
    if shares > 1:
        return -(-size.parameters * storage_dtype(config.model).itemsize // shares)
    of_layers, rest = layers_of_reference(size, config)
    return rest + (of_layers // size.layers if config.memory.reference_on_host is True else of_layers)


def layers_of_reference(size: ModelSize, config: Config) -> tuple[int, int]:
    """Bytes of a whole reference's layers, and of the rest. Matrices of one that does not move are kept as
    autocast makes them (`rl.model.on_host.narrow_matrices`).
    """
    stored, experts = storage_dtype(config.model).itemsize, size.experts.weights if size.experts else 0
    is_narrow = config.model.dtype == "bf16-mixed" and not config.model.reference.update_every
    of_layers = size.linear * (2 if is_narrow else stored) + experts * stored
    return of_layers, (size.parameters - size.linear - experts) * stored


def teacher_bytes(size: ModelSize, config: Planned) -> int:
    """Bytes of its weights, and of top-k ids (8 each) and log-probs (4) per completion token of a step."""
    if not isinstance(config, Config) or config.teacher is None:
        return 0
    t, sampled = config.teacher, config.teacher.divergence == "sampled"
    tokens = config.train.prompts_per_step * config.train.group_size * config.sampling.max_completion_length
    return size.teacher * (2 if t.dtype == "bf16" else 4) + (0 if sampled else 12 * t.top_k * tokens)


def uses_vllm(size: ModelSize, config: Planned) -> bool:
    """Whether vLLM samples, which takes a share of the GPU for itself."""
    return isinstance(config, Config) and takes_share(config) and not size.has_own_sampler


def takes_share(config: Config) -> bool:
    """Whether the engine is vLLM. engine.name=auto means vLLM, except on a GPU without vLLM installed."""
    is_missing = torch.cuda.is_available() and importlib.util.find_spec("vllm") is None
    return config.engine.name == "vllm" or (config.engine.name == "auto" and not is_missing)


def engine_width(config: Config) -> int:
    """Bytes per element of the engine's weights and cache."""
    wide = "float32" if config.model.dtype == "fp32" else "bfloat16"
    return 4 if (wide if config.engine.dtype == "auto" else config.engine.dtype) == "float32" else 2


def engine_weights(size: ModelSize, config: Config) -> int:
    return size.parameters * engine_width(config)


def cache_bytes(size: ModelSize, config: Config, tokens: int) -> int:
    """Bytes of the keys and values of `tokens` tokens."""
    return tokens * size.cache_per_token * engine_width(config)


def engine_share(size: ModelSize, config: Config, capacity: int, tokens: int) -> float:
    """The `engine.gpu_memory_utilization` that covers vLLM's weights, graphs and a cache of `tokens`."""
    needed = engine_weights(size, config) + 2 * OVERHEAD_BYTES + cache_bytes(size, config, tokens)
    return -(-100 * needed // capacity) / 100
