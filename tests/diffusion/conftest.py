"""Tiny random diffusion models, and plain transcriptions to compare them with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import silu

MASK, VOCABULARY = 3, 60
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
LLADA_CONFIG = {
    "activation_type": "silu",
    "alibi": False,
    "architectures": ["LLaDAModelLM"],
    "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"},
    "block_type": "llama",
    "d_model": 32,
    "embedding_size": VOCABULARY,
    "eos_token_id": 1,
    "include_bias": False,
    "layer_norm_type": "rms",
    "mask_token_id": MASK,
    "max_sequence_length": 128,
    "mlp_hidden_size": 48,
    "mlp_ratio": 4,
    "model_type": "llada",
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 2,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": VOCABULARY,
    "weight_tying": False,
}


def randomised(model: torch.nn.Module, seed: int = 0, std: float = 0.15) -> torch.nn.Module:
    """Every matrix drawn anew, large enough that nothing is nearly zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model


def llada_tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Random weights under LLaDA's names."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: (0.2 * torch.randn(shape, generator=generator)).to(dtype)  # noqa: E731
    tensors = {
        "model.transformer.wte.weight": draw(VOCABULARY, 32),
        "model.transformer.ln_f.weight": 1 + draw(32),
        "model.transformer.ff_out.weight": draw(VOCABULARY, 32),
    }
    shapes = {
        "attn_norm": (32,),
        "ff_norm": (32,),
        "q_proj": (32, 32),
        "k_proj": (32, 32),
        "v_proj": (32, 32),
        "attn_out": (32, 32),
        "ff_proj": (48, 32),
        "up_proj": (48, 32),
        "ff_out": (32, 48),
    }
    for layer in range(2):
        for name, shape in shapes.items():
            value = draw(*shape)
            tensors[f"model.transformer.blocks.{layer}.{name}.weight"] = (
                1 + value if len(shape) == 1 else value
            )
    return tensors


def write_llada(folder: Path) -> Path:
    """A LLaDA checkpoint in two shards."""
    folder.mkdir()
    tensors = llada_tensors()
    names = sorted(tensors)
    shards = {
        "model-00001-of-00002.safetensors": names[:11],
        "model-00002-of-00002.safetensors": names[11:],
    }
    for file, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / file, metadata={"format": "pt"})
    weight_map = {key: file for file, keys in shards.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (folder / "config.json").write_text(json.dumps(LLADA_CONFIG, indent=2) + "\n")
    return folder


@pytest.fixture
def llada_dir(tmp_path: Path) -> Path:
    return write_llada(tmp_path / "llada")


def plain_llada(tensors: dict[str, torch.Tensor], ids_T: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of one sequence by LLaDA's formulas under LLaDA's own weight names, in fp64."""
    w = {name.removeprefix("model.transformer."): t.double() for name, t in tensors.items()}
    x = w["wte.weight"][ids_T]
    size = 8
    frequencies = 500000.0 ** -(torch.arange(0, size, 2).double() / size)
    angles = torch.outer(torch.arange(len(ids_T)).double(), frequencies)
    cos, sin = (f(torch.cat([angles, angles], -1)) for f in (torch.cos, torch.sin))

    def norm(x, name):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w[name]

    def rotate(x):  # [H, T, D]
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat([-right, left], -1) * sin

    for layer in range(2):
        p = f"blocks.{layer}."
        h = norm(x, p + "attn_norm.weight")
        q, k, v = (
            (h @ w[p + f"{n}_proj.weight"].T).view(-1, 4, size).transpose(0, 1) for n in ("q", "k", "v")
        )
        weights = torch.softmax(rotate(q) @ rotate(k).transpose(1, 2) / size**0.5, -1)
        x = x + (weights @ v).transpose(0, 1).flatten(1) @ w[p + "attn_out.weight"].T
        h = norm(x, p + "ff_norm.weight")
        gated = silu(h @ w[p + "ff_proj.weight"].T) * (h @ w[p + "up_proj.weight"].T)
        x = x + gated @ w[p + "ff_out.weight"].T
    return norm(x, "ln_f.weight") @ w["ff_out.weight"].T


@pytest.fixture(scope="module")
def hub_llada(tmp_path_factory) -> Path:
    """A LLaDA folder as a hub has it: with a tokenizer, and with code of its own, which leaves the file
    `trapped` where it runs.
    """
    from tests.conftest import WORDS, word_tokenizer

    folder = write_llada(tmp_path_factory.mktemp("hub") / "llada")
    special = ["<pad>", "<eos>", "<unk>", "<mask>", "<user>", "<assistant>"]
    word_tokenizer(folder, [*special, "What", "is", *WORDS[:52]])
    auto_map = {"AutoConfig": "trap.Config", "AutoModel": "trap.Model", "AutoModelForCausalLM": "trap.Model"}
    (folder / "config.json").write_text(json.dumps(LLADA_CONFIG | {"auto_map": auto_map}, indent=2) + "\n")
    set_trap(folder)
    return folder


def set_trap(folder: Path) -> None:
    (folder / "trap.py").write_text(f"open({str(folder / 'trapped')!r}, 'w').close()\nclass Config: ...\n")
