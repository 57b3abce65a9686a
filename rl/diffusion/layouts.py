"""Checkpoint layouts of masked diffusion models, read and written without remote code.

LLaDA-8B (arXiv:2502.09992) is a Llama with bidirectional attention under other names; iLLaDA and Dream use
the names of Llama and Qwen 2. The mixtures of experts (LLaDA-MoE, LLaDA 2) are recognised and refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

_BLOCK = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
_TOP = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
_FROM_BLOCK, _FROM_TOP = ({theirs: ours for ours, theirs in names.items()} for names in (_BLOCK, _TOP))

# What a LLaDA config must say for its blocks to be Llama's.
_LLADA_RULES: dict[str, tuple[Any, ...]] = {
    "block_type": ("llama",),
    "layer_norm_type": ("rms",),
    "activation_type": ("silu",),
    "rope": (True,),
    "alibi": (False, None),
    "include_bias": (False, None),
    "include_qkv_bias": (False, None),
    "attention_layer_norm": (False, None),
    "input_emb_norm": (False, None),
    "scale_logits": (False, None),
    "multi_query_attention": (False, None),
}
_REFUSED = {
    "LLaDAMoE": "LLaDA-MoE (64 experts) is a mixture of experts with query and key norms",
    "LLaDA2": "LLaDA 2 is a mixture of experts with block-causal attention",
}
"""Beginning of an architecture's name -> why it is refused."""


def llama_key(llada_key: str) -> str:
    """`model.transformer.blocks.3.ff_proj.weight` -> `model.layers.3.mlp.gate_proj.weight`.

    `ff_out` is the down projection inside a block and the output head at the top.

    Raises:
        ValueError: LLaDA has no such weight.
    """
    if found := re.fullmatch(r"model\.transformer\.blocks\.(\d+)\.(\w+)\.weight", llada_key):
        if found[2] in _BLOCK:
            return f"model.layers.{found[1]}.{_BLOCK[found[2]]}.weight"
    elif (found := re.fullmatch(r"model\.transformer\.(\w+)\.weight", llada_key)) and found[1] in _TOP:
        return f"{_TOP[found[1]]}.weight"
    raise ValueError(f"the checkpoint has a weight {llada_key!r}, which no LLaDA-8B model has")


def llada_key(llama_key: str) -> str:
    """The inverse of `llama_key`."""
    if found := re.fullmatch(r"model\.layers\.(\d+)\.([\w.]+)\.weight", llama_key):
        return f"model.transformer.blocks.{found[1]}.{_FROM_BLOCK[found[2]]}.weight"
    return f"model.transformer.{_FROM_TOP[llama_key.removesuffix('.weight')]}.weight"


def native_config(raw: Mapping[str, Any], name: str) -> tuple[PreTrainedConfig, bool] | None:
    """The transformers config of a diffusion checkpoint's blocks, and whether its logits are shifted (Dream).
    It is None if the layout is not a known one.

    Raises:
        ValueError: the layout is known but not supported, or a LLaDA has blocks other than Llama's.
    """
    architecture = (raw.get("architectures") or [""])[0]
    refused = [why for begin, why in _REFUSED.items() if architecture.startswith(begin)]
    if refused or (raw.get("model_type") == "llada" and raw.get("num_experts")):
        what = refused[0] if refused else _REFUSED["LLaDAMoE"]
        raise ValueError(f"{name}: {what}; not supported: use a dense LLaDA-8B, iLLaDA or Dream checkpoint")
    if architecture == "LLaDAModelLM":
        return _llada_config(raw, name), bool(raw.get("diffusion_shift", False))
    if architecture == "ILLaDAForCausalLM":
        if raw.get("layer_norm_eps") is not None:
            raise ValueError(
                f"{name}: an iLLaDA with LayerNorm (layer_norm_eps) is not supported, only RMSNorm"
            )
        return LlamaConfig(**_without_code(raw)), bool(raw.get("diffusion_shift", False))
    if architecture == "DreamModel" or raw.get("model_type") == "Dream":
        return Qwen2Config(**_without_code(raw)), bool(raw.get("diffusion_shift", True))
    return None


def read_llada_tensors(folder: Path, raw: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """All weights of a LLaDA checkpoint under Llama's names, in their stored dtype.

    Raises:
        ValueError: a weight is missing or unknown, or there are no safetensors files.
    """
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                tensors[llama_key(key)] = file.get_tensor(key)
    wanted = {f"{ours}.weight" for ours in _TOP.values() if ours != "lm_head" or not raw.get("weight_tying")}
    wanted |= {
        f"model.layers.{layer}.{ours}.weight" for layer in range(raw["n_layers"]) for ours in _BLOCK.values()
    }
    if wanted != tensors.keys():
        missing, extra = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
        raise ValueError(
            f"{name} is not a whole LLaDA checkpoint: {len(missing)} weights are missing"
            + (f" such as {llada_key(missing[0])}" if missing else "")
            + (f", {len(extra)} are unexpected such as {llada_key(extra[0])}" if extra else "")
            + "; download it again, with every *.safetensors file"
        )
    return tensors


def export_llada(model: PreTrainedModel, folder: Path, *, max_shard_size: str | int = "5GB") -> None:
    """Writes a model that was loaded from a LLaDA checkpoint back in LLaDA's layout: config.json, keys and
    dtype. So the hub's remote code, or anybody's conversion, can read it.

    An untouched model comes back byte for byte, even if it was held in fp32 meanwhile.

    Raises:
        ValueError: the model does not come from a LLaDA checkpoint, or holds adapters (merge them first).
    """
    raw = getattr(model.config, "llada", None)
    if raw is None:
        raise ValueError(
            f"{model.config.name_or_path or type(model).__name__} was not loaded from a LLaDA checkpoint, so "
            "it has no LLaDA layout to go back to; save it with save_pretrained"
        )
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("the model holds LoRA adapters; merge them first (peft: merge_and_unload)")
    saved_as = str(raw.get("torch_dtype") or raw.get("dtype") or "bfloat16")
    dtype = getattr(torch, saved_as.removeprefix("torch."))
    tied = bool(raw.get("weight_tying"))
    tensors = {
        llada_key(key): value.detach().to("cpu", dtype).contiguous()
        for key, value in model.state_dict().items()
        if not (tied and key == "lm_head.weight")
    }
    folder.mkdir(parents=True, exist_ok=True)
    plan = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    for file, keys in plan.filename_to_tensors.items():
        save_file({key: tensors[key] for key in keys}, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text)
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")


def _llada_config(raw: Mapping[str, Any], name: str) -> LlamaConfig:
    for key, allowed in _LLADA_RULES.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise ValueError(
                f"{name}: config.json says {key}={raw[key]!r}, but a LLaDA is read as Llama blocks only with "
                f"{key}={allowed[0]!r}"
            )
    heads = raw["n_heads"]
    ours: dict[str, Any] = {"mask_token_id": raw.get("mask_token_id"), "llada": dict(raw)}
    return LlamaConfig(
        vocab_size=raw.get("embedding_size") or raw["vocab_size"],
        hidden_size=raw["d_model"],
        intermediate_size=raw["mlp_hidden_size"],
        num_hidden_layers=raw["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=raw.get("n_kv_heads") or heads,
        head_dim=raw["d_model"] // heads,
        max_position_embeddings=raw["max_sequence_length"],
        rms_norm_eps=raw.get("rms_norm_eps", 1e-5),
        rope_parameters={"rope_type": "default", "rope_theta": raw.get("rope_theta", 10000.0)},
        tie_word_embeddings=bool(raw.get("weight_tying")),
        bos_token_id=None,
        eos_token_id=raw.get("eos_token_id"),
        pad_token_id=raw.get("pad_token_id"),
        **ours,
    )


def _without_code(raw: Mapping[str, Any]) -> dict[str, Any]:
    names = ("auto_map", "architectures", "model_type", "transformers_version")
    return {key: value for key, value in raw.items() if key not in names}
