"""Tiny random mixtures of experts, policies on them, and routes for their completions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from transformers import MixtralConfig, MixtralForCausalLM

from rl.batch import pack
from rl.causal import CausalPolicy
from rl.config import Config
from rl.config.read import load_config
from rl.moe.adapters import lora_plan
from rl.moe.policy import MoePolicy
from rl.moe.routers import find_routers, observed, watching
from rl.update import pack_rules
from tests.rl.families import save_tiny, tiny_config

E, K = 8, 2
SIZES: dict[str, dict[str, Any]] = {"qwen3_moe": {"num_local_experts": 8, "norm_topk_prob": True}}


def mixtral(layers: int = 2, **fields: Any) -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 100, "num_local_experts": E, "num_experts_per_tok": K, "initializer_range": 0.3}
    return MixtralForCausalLM(MixtralConfig(num_hidden_layers=layers, **sizes, **fields)).train()


def save(name: str, folder: Path, tokenizer_folder: Path, **changes: Any) -> Path:
    """Four layers, so that a router's choice changes what later layers see."""
    of_two = tiny_config(name)
    for key in ("layer_types", "mlp_layer_types"):
        if kinds := getattr(of_two, key, None):
            changes[key] = [*kinds, *kinds]
    config = tiny_config(name, num_hidden_layers=4, **(SIZES.get(name, {}) | changes))
    save_tiny(name, folder, config)
    transformers.AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


def load(folder: Path, *overrides: str) -> tuple[MoePolicy, Config]:
    settings = [f"model.name={folder}", "model.dtype=fp32", "loss.clip_high=4.0", "loss.kl_coef=0"]
    config = load_config(None, [*settings, *overrides])
    inner = CausalPolicy(config.model, Accelerator(cpu=True), temperature=0.9, plan=lora_plan)
    inner.settle_attention(40)
    return MoePolicy(inner, find_routers(inner.model), config.moe), config


@torch.no_grad()
def live_routes(policy: Any, prompt: tuple[int, ...], ids: list[int]) -> np.ndarray:
    """[tokens, layers, K]: what transformers chooses for one sequence alone; the last row is unknown."""
    sites = find_routers(policy.model)
    num_layers, found = policy.model.config.num_hidden_layers, {}

    def see(site, output):
        found[site.layer] = observed(site, output)[2][len(prompt) :]

    with policy.in_rows(), watching(sites, see):
        policy.model(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False)
    routes = np.zeros((len(ids), num_layers, sites[0].top_k), dtype=np.int16)
    for layer, experts in found.items():
        routes[:, layer] = experts.numpy()
    routes[-1] = -1
    return routes


def random_routes(policy: Any, length: int, seed: int) -> np.ndarray:
    """Experts that no router chose, different ones for each token; a fifth of the tokens is unknown."""
    draw, site = np.random.default_rng(seed), policy.sites[0]
    shape = (length, policy.model.config.num_hidden_layers)
    experts = [draw.permutation(site.num_experts)[: site.top_k] for _ in range(shape[0] * shape[1])]
    routes = np.array(experts, dtype=np.int16).reshape(*shape, site.top_k)
    routes[draw.random(length) < 0.2] = -1
    routes[-1] = -1
    return routes


def routed(groups, make):
    """Copies of the groups whose completions carry `make(prompt, ids, number)`."""
    groups, number = copy.deepcopy(groups), 0
    for group in groups:
        for completion in group.completions:
            completion.routes = make(group.prompt.token_ids, completion.token_ids, number)
            number += 1
    return groups


def batches(policy, config, groups, advantages):
    rules = pack_rules(config, share_prompts=policy.shares_prompts)
    return pack(groups, advantages, rules)[0].micro_batches
