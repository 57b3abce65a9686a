"""How much GPU memory a run needs: predicted from the config, and tried out before step 0.

The prediction counts tensors that live at the peak of a backward pass on one GPU: what the optimizer keeps,
what autograd saves for each packed token, a chunk of logits, and the engine's weights and cache. It is for
decoder-only models with gated MLPs; for others the probe alone answers.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from rl.batch import PackRules, pack
from rl.causal import CausalPolicy
from rl.config import Config, LoraConfig
from rl.model.head import CHUNK_BYTES
from rl.model.loading import storage_dtype
from rl.policy import Reference
from rl.types import Completion, Group, Prompt, Reward, ScoredGroup, VersionSpan

GIB = 2**30
OVERHEAD_BYTES = int(1.5 * GIB)
"""CUDA context, cuBLAS workspaces and the allocator's rounding."""


@dataclass(frozen=True)
class ModelSize:
    """What memory depends on, in numbers of elements.

    Attributes:
        parameters: all weights, a tied head once.
        matrices: name, inputs and outputs of the layers' matrix products, the head left out.
        head: vocabulary x hidden.
        saved_per_token: elements that one layer's backward pass keeps for a token.
        kept_for_weights: those of them that only the gradients of the layer's own weights need.
        cache_per_token: keys and values of all layers.
    """

    parameters: int
    matrices: tuple[tuple[str, int, int], ...]
    head: int
    layers: int
    hidden: int
    saved_per_token: int
    kept_for_weights: int
    cache_per_token: int

    @property
    def linear(self) -> int:
        """Weights of the matrix products."""
        return sum(inputs * outputs for _, inputs, outputs in self.matrices)

    @staticmethod
    def of(config: PreTrainedConfig, *, fused_layers: bool) -> ModelSize:
        """Counted on a model without storage.

        Raises:
            ValueError: a mixture of experts or a layer without attention and a gated MLP: no prediction.
        """
        text: Any = config.get_text_config()
        if any(getattr(text, f"{name}_experts", 0) for name in ("num", "num_local", "n_routed")):
            raise ValueError(
                f"no memory prediction for mixtures of experts ({text.model_type}); run the probe"
            )
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if not isinstance(getattr(text, name, None), int):
                raise ValueError(f"no memory prediction for {text.model_type}: it names no {name}")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        head = model.get_output_embeddings()
        matrices = tuple(
            (name, m.in_features, m.out_features)
            for name, m in model.named_modules()
            if isinstance(m, nn.Linear) and m is not head
        )
        hidden, wide, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
        opened = sum(n for _, inputs, n in matrices if inputs == hidden and n in (wide, 2 * wide))
        if opened < 2 * wide * layers:
            raise ValueError(f"no memory prediction for {text.model_type}: its MLPs have no gate")
        size = getattr(text, "head_dim", None) or hidden // text.num_attention_heads
        keys = size * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
        queries = size * text.num_attention_heads
        norms, mlp, unneeded = (4, 3, 2) if fused_layers else (14, 4, 4)
        return ModelSize(
            parameters=sum(p.numel() for p in model.parameters()),
            matrices=matrices,
            head=head.weight.numel(),
            layers=layers,
            hidden=hidden,
            saved_per_token=norms * hidden + 2 * queries + 2 * keys + mlp * wide,
            kept_for_weights=unneeded * hidden + wide,
            cache_per_token=2 * layers * keys,
        )


def training_bytes(size: ModelSize, config: Config, token_budget: int) -> dict[str, int]:
    """Bytes of each part at the peak of a backward pass over a full micro-batch, of the training process."""
    stored = storage_dtype(config.model).itemsize
    compute = 4 if config.model.dtype == "fp32" else 2
    lora, is_mixed = config.model.lora, config.model.dtype == "bf16-mixed"
    if lora is None:
        trained, master, adapters = size.parameters, stored, 0
        narrowed, head = size.linear, size.head * (4 + compute + (compute if is_mixed else 0))
        layer = size.saved_per_token * compute
    else:
        trained = sum(lora.r * (inputs + outputs) for inputs, outputs in _adapted(size, lora))
        master, adapters = 4, trained
        narrowed, head = trained, 0
        layer = _lora_layer_bytes(size, lora, config.model.dtype)
    if config.model.gradient_checkpointing:
        saved = size.layers * size.hidden * compute + layer
    else:
        saved = size.layers * layer
    copied = config.loss.kl_coef > 0 and lora is None
    return {
        "weights": size.parameters * stored + adapters * master,
        "gradients": trained * master,
        "optimizer": 2 * trained * master,
        "weights in the compute dtype": narrowed * compute if is_mixed else 0,
        "reference": size.parameters * stored if copied else 0,
        "activations": token_budget * saved,
        "logits": CHUNK_BYTES["cuda"] + head,
        "overhead": OVERHEAD_BYTES,
    }


def _adapted(size: ModelSize, lora: LoraConfig) -> list[tuple[int, int]]:
    """Inputs and outputs of the matrices that get an adapter, by peft's rule for names."""
    targets = lora.target_modules

    def is_target(name: str) -> bool:
        if isinstance(targets, str):
            return targets == "all-linear" or re.fullmatch(targets, name) is not None
        return any(f".{name}".endswith(f".{target}") for target in targets)

    return [(inputs, outputs) for name, inputs, outputs in size.matrices if is_target(name)]


def _lora_layer_bytes(size: ModelSize, lora: LoraConfig, dtype: str) -> int:
    """What a layer keeps for a token. The frozen weights need no inputs; each adapter keeps its own copy of
    them, which peft widens to the adapter's fp32 and autocast narrows again, and its `r` numbers in between.
    With dropout it keeps a byte of mask for each input too.
    """
    adapted = _adapted(size, lora)
    inputs, ranks = sum(n for n, _ in adapted) // size.layers, lora.r * len(adapted) // size.layers
    if dtype == "fp32":
        kept = size.saved_per_token * 4
        copy = 4 if lora.dropout else 0  # without dropout the input is kept as it is, once for all adapters
    else:
        kept = (size.saved_per_token - size.kept_for_weights) * 2
        copy = 2 if dtype == "bf16-mixed" else 4
    width = 2 if dtype == "bf16-mixed" else 4
    return kept + inputs * (copy + (1 if lora.dropout else 0)) + ranks * width


def engine_bytes(size: ModelSize, config: Config, max_length: int) -> dict[str, int]:
    """Bytes of the engine's weights and of a cache that holds every completion in flight at its longest."""
    wide = "float32" if config.model.dtype == "fp32" else "bfloat16"
    width = 4 if (wide if config.engine.dtype == "auto" else config.engine.dtype) == "float32" else 2
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
        parts: name -> bytes with the config as it is; "engine reserve" is what vLLM takes beyond its parts.
        room: bytes that may be filled.
        longest_row: tokens of the longest prompt with one completion; a micro-batch holds at least that.
        token_budget: the largest multiple of 1024 (or the longest row) that fits beside the engine; 0 if not
            even the longest row does.
        engine_share: the `engine.gpu_memory_utilization` that covers the engine's parts; 0 without vLLM.
    """

    parts: dict[str, int]
    capacity: int
    room: int
    longest_row: int
    token_budget: int
    engine_share: float

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.room


def plan_memory(
    model_config: PreTrainedConfig, config: Config, *, capacity: int, max_length: int, use: float = 0.92
) -> MemoryPlan:
    """The plan for one GPU that holds policy and engine; `use` is the share of it that may be filled.

    vLLM takes its share of the GPU whatever its parts need; engine=auto counts as vLLM.
    """
    size = ModelSize.of(model_config, fused_layers=config.model.fused_layers)
    engine = engine_bytes(size, config, max_length)
    needed, room = sum(engine.values()), int(use * capacity)
    least, is_vllm = needed, config.engine.name != "transformers"
    share = math.ceil(100 * needed / capacity) / 100 if is_vllm else 0.0
    if is_vllm:
        engine["engine reserve"] = max(0, int(config.engine.gpu_memory_utilization * capacity) - needed)
        least = max(needed, int(share * capacity))
    row = config.data.max_prompt_length + config.sampling.max_completion_length
    fixed = sum(training_bytes(size, config, 0).values())
    per_token = sum(training_bytes(size, config, 1).values()) - fixed
    most = (room - least - fixed) // per_token
    budget = max(row, min(most // 1024 * 1024, 65536)) if most >= row else 0
    parts = training_bytes(size, config, max(row, config.train.token_budget)) | engine
    return MemoryPlan(parts, capacity, room, row, budget, share)


def probe(policy: CausalPolicy, config: Config, rules: PackRules, reference: Reference | None) -> float:
    """Two passes over a full micro-batch of the longest completions, the second on top of the first one's
    gradients; returns the most bytes that the process held. No weight, moment or generator is changed.

    Raises:
        ValueError: it does not fit; with the token budget to try.
    """
    device, budget = policy.device, config.train.token_budget
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    (prepared,) = policy.prepare(pack(*_longest_groups(policy, config, rules), rules)[0], draw=0)
    try:
        moments = [torch.empty_like(p) for _, p in policy.trainable() for _ in range(2)]
        if reference is not None:
            reference.logprobs(prepared)
        for _ in range(2):
            scores = policy.score(prepared)
            loss = scores.logprobs_L.sum() + config.loss.entropy_coef * scores.entropy_L.sum()
            policy.backward(loss, last=True)
            del scores, loss
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


def _longest_groups(
    policy: CausalPolicy, config: Config, rules: PackRules
) -> tuple[list[ScoredGroup], Sequence[Sequence[float]]]:
    """One micro-batch of one group: the longest prompt, and as many of the longest completions as fit."""
    draw, vocabulary = random.Random(0), policy.model.config.get_text_config().vocab_size
    length, prompt_length = config.sampling.max_completion_length, config.data.max_prompt_length
    shared, copied = (prompt_length, 0) if rules.share_prompts else (0, prompt_length)
    count = max(1, (rules.token_budget - shared) // (copied + length))
    ids = [draw.randrange(vocabulary) for _ in range(max(prompt_length, length))]
    answer = Completion(ids[:length], [0.0] * length, [True] * length, "stop", [VersionSpan(0, length)])
    group = Group(Prompt("probe", "", tuple(ids[:prompt_length])), [answer] * count)
    return [ScoredGroup(group, [Reward(0.0)] * count)], [[1.0] * count]


def _free_gib(device: torch.device) -> float:
    free, _ = torch.cuda.mem_get_info(device)
    return (free + torch.cuda.memory_reserved(device)) / GIB
