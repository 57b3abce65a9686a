"""How much GPU memory a run needs: predicted from the config, and tried out before step 0.

The prediction counts tensors that live at the peak of a backward pass on one GPU: what the optimizer keeps,
what autograd saves for each packed token, a chunk of logits, and the engine's weights and cache. It is for
decoder-only models with gated MLPs; for others the probe alone answers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from rl.batch import PackRules, pack
from rl.config import Config
from rl.loading import storage_dtype
from rl.logprobs import CHUNK_BYTES
from rl.policy import Policy
from rl.types import Completion, Group, Prompt, Reward, ScoredGroup, VersionSpan

GIB = 2**30
OVERHEAD_BYTES = int(1.5 * GIB)
"""CUDA context, cuBLAS workspaces and the allocator's rounding."""


@dataclass(frozen=True)
class ModelSize:
    """What memory depends on, in numbers of elements.

    Attributes:
        parameters: all weights, a tied head once.
        linear: those of the layers' matrix products, the head left out.
        head: vocabulary x hidden.
        saved_per_token: elements that one layer's backward pass keeps for a token.
        cache_per_token: keys and values of all layers.
    """

    parameters: int
    linear: int
    head: int
    layers: int
    hidden: int
    saved_per_token: int
    cache_per_token: int

    @staticmethod
    def of(config: PreTrainedConfig, *, fused_layers: bool) -> ModelSize:
        """Counted on a model without storage.

        Raises:
            ValueError: a mixture of experts or a layer without a gated MLP: no prediction.
        """
        text: Any = config.get_text_config()
        if getattr(text, "num_experts", 0) or getattr(text, "num_local_experts", 0):
            raise ValueError(
                f"no memory prediction for mixtures of experts ({text.model_type}); run the probe"
            )
        if not hasattr(text, "intermediate_size"):
            raise ValueError(f"no memory prediction for {text.model_type}: it names no intermediate_size")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        head = model.get_output_embeddings()
        linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        keys = size * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
        queries = size * text.num_attention_heads
        norms, mlp = (4 * text.hidden_size, 3) if fused_layers else (14 * text.hidden_size, 4)
        return ModelSize(
            parameters=sum(p.numel() for p in model.parameters()),
            linear=linear,
            head=head.weight.numel(),
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            saved_per_token=norms + 2 * queries + 2 * keys + mlp * text.intermediate_size,
            cache_per_token=2 * text.num_hidden_layers * keys,
        )


def training_bytes(size: ModelSize, config: Config, token_budget: int) -> dict[str, int]:
    """Bytes of each part at the peak of a backward pass over a full micro-batch, of the training process."""
    stored = storage_dtype(config.model).itemsize
    master = 2 if config.model.dtype == "bf16" else 4
    compute = 4 if config.model.dtype == "fp32" else 2
    trained = _trained_parameters(size, config)
    layer = size.saved_per_token * compute
    if config.model.gradient_checkpointing:
        saved = size.layers * size.hidden * compute + layer
    else:
        saved = size.layers * layer
    copied = config.loss.kl_coef > 0 and config.model.lora is None
    head = size.head * (compute if compute != stored else 0)
    if config.model.lora is None:
        head += size.head * (4 + compute)
    return {
        "weights": size.parameters * stored,
        "gradients": trained * master,
        "optimizer": 2 * trained * master,
        "weights in the compute dtype": size.linear * compute if compute != stored else 0,
        "reference": size.parameters * stored if copied else 0,
        "activations": token_budget * saved,
        "logits": CHUNK_BYTES["cuda"] + head,
        "overhead": OVERHEAD_BYTES,
    }


def engine_bytes(size: ModelSize, config: Config, max_length: int) -> dict[str, int]:
    """Bytes of vLLM's weights and of a cache that holds every completion in flight at its longest."""
    width = 4 if config.model.dtype == "fp32" else 2
    in_flight = min(config.max_num_seqs, config.in_flight)
    return {
        "engine weights": size.parameters * width,
        "engine cache": in_flight * max_length * size.cache_per_token * width,
        "engine overhead": 2 * OVERHEAD_BYTES,
    }


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs on a GPU of `capacity` bytes, and the settings that fill it without overflowing.

    Attributes:
        parts: name -> bytes with the config as it is.
        token_budget: the largest multiple of 1024 that fits beside the engine; 0 if none does.
        engine_share: what `engine.gpu_memory_utilization` must be for the engine's parts.
    """

    parts: dict[str, int]
    capacity: int
    token_budget: int
    engine_share: float

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def plan_memory(
    model_config: PreTrainedConfig, config: Config, *, capacity: int, max_length: int, use: float = 0.92
) -> MemoryPlan:
    """The plan for one GPU that holds policy and engine; `use` is the share of it that may be filled."""
    size = ModelSize.of(model_config, fused_layers=config.model.fused_layers)
    engine = engine_bytes(size, config, max_length)
    parts = training_bytes(size, config, config.train.token_budget) | engine
    room = use * capacity - sum(engine.values())
    fixed = sum(training_bytes(size, config, 0).values())
    per_token = sum(training_bytes(size, config, 1).values()) - fixed
    budget = max(0, int((room - fixed) / per_token)) // 1024 * 1024
    return MemoryPlan(parts, capacity, min(budget, 65536), sum(engine.values()) / capacity)


def _trained_parameters(size: ModelSize, config: Config) -> int:
    if config.model.lora is None:
        return size.parameters
    # r x (rows + columns) per matrix; matrices of a layer are near squares of its mean size.
    matrices = 7 * size.layers
    return int(matrices * config.model.lora.r * 2 * (size.linear / matrices) ** 0.5)


def probe(policy: Policy, config: Config, rules: PackRules) -> float:
    """Two passes over a full micro-batch of the longest completions, the second on top of the first one's
    gradients; returns the most bytes that the process held. No weight, moment or generator is changed.

    Raises:
        ValueError: it does not fit; with the token budget to try.
    """
    device, budget = policy.device, config.train.token_budget
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    micro_batch = pack(*_longest_groups(policy, config), rules)[0].micro_batches[0].to(device)
    try:
        moments = [torch.empty_like(p) for _, p in policy.trainable() for _ in range(2)]
        if config.loss.kl_coef > 0:
            policy.reference_logprobs(micro_batch)
        for _ in range(2):
            logprobs, entropy = policy.logprobs(micro_batch)
            (logprobs.sum() + config.loss.entropy_coef * entropy.sum()).backward()
            del logprobs, entropy
        held = torch.cuda.max_memory_allocated(device)
        del moments
    except torch.OutOfMemoryError:
        raise ValueError(
            f"train.token_budget={budget} with completions of {config.sampling.max_completion_length} tokens "
            f"does not fit into {_free_gib(device):.0f} GiB; use train.token_budget={budget // 2}, "
            "model.gradient_checkpointing=true, model.lora, or a smaller engine.gpu_memory_utilization "
            "(cohort plan CONFIG shows the parts)"
        ) from None
    finally:
        for _, parameter in policy.trainable():
            parameter.grad = None
        torch.cuda.empty_cache()
    return held


def _longest_groups(policy: Policy, config: Config) -> tuple[list[ScoredGroup], Sequence[Sequence[float]]]:
    """One micro-batch of one group: the longest prompt, and as many of the longest completions as fit."""
    draw, vocabulary = random.Random(0), policy.model.config.get_text_config().vocab_size
    length, prompt_length = config.sampling.max_completion_length, config.data.max_prompt_length
    count = max(1, (config.train.token_budget - prompt_length) // length)
    ids = [draw.randrange(vocabulary) for _ in range(max(prompt_length, length))]
    answer = Completion(ids[:length], [0.0] * length, [True] * length, "stop", [VersionSpan(0, length)])
    group = Group(Prompt("probe", "", tuple(ids[:prompt_length])), [answer] * count)
    return [ScoredGroup(group, [Reward(0.0)] * count)], [[1.0] * count]


def _free_gib(device: torch.device) -> float:
    free, _ = torch.cuda.mem_get_info(device)
    return (free + torch.cuda.memory_reserved(device)) / GIB
