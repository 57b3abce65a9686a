"""FSDP2 over two processes: the sharded model has the gradient of the whole one."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from rl.diffusion.model import DiffusionScorer, to_diffusion
from tests.diffusion import sharded
from tests.diffusion.conftest import MASK, SMALL, randomised
from tests.diffusion.processes import launch


def test_fsdp2_gradients_add_up_to_those_of_the_whole_model(tmp_path):
    config = LlamaConfig(**SMALL | {"tie_word_embeddings": True})
    model = to_diffusion(randomised(LlamaForCausalLM(config)), mask_token_id=MASK)  # type: ignore[arg-type]
    model.save_pretrained(tmp_path / "model")
    launch(Path(sharded.__file__), [str(tmp_path / "model"), str(tmp_path / "gradients")], 2)
    scorer = DiffusionScorer(model.double()).train()
    for rank in (0, 1):
        sharded.backward(scorer, rank, MASK)
    found = load_file(tmp_path / "gradients")
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-9)
