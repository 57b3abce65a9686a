"""The diffusion sampler on a GPU: graphs change nothing, and within a block nothing waits for the device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rl.model.varlen import run_attention
from rollout.diffusion.canvas import Batch, Row
from rollout.diffusion.denoise import denoise, prompt_canvas
from rollout.diffusion.graph import GraphedDenoiser
from rollout.diffusion.model import Layout, TransformersDenoiser, denoise_attention
from rollout.diffusion.steps import DenoisingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MASK = 999
PROMPTS = [list(range(5, 5 + n)) for n in (7, 30, 12, 50, 19)]


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).cuda().eval()


@pytest.mark.parametrize(
    "extra", [{}, {"cache": "dual", "refresh_every": 4}, {"cfg_scale": 0.5}, {"threshold": 0.05}]
)
def test_a_graphed_model_samples_the_same(model, extra):
    params = DenoisingParams(32, block_length=16, temperature=1.0, stop_token_ids=(1, 2, 3), **extra)
    canvases = [prompt_canvas(p, params, MASK) for p in PROMPTS * 3]
    plain = TransformersDenoiser(model, MASK)
    graphed = GraphedDenoiser(plain)
    seeds = list(range(len(canvases)))
    expected = denoise(plain, canvases, params, seeds=seeds, max_rows=8)
    found = denoise(graphed, canvases, params, seeds=seeds, max_rows=8)
    assert graphed.reason is None and graphed.graphs
    assert [row and row.token_ids for row in found] == [row and row.token_ids for row in expected]


def test_rows_of_any_length_share_one_flash_call():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 12, 64, generator=generator)
    k, v = torch.randn(2, 1, 2, 12, 64, generator=generator).unbind()

    def attend(device: str, dtype: torch.dtype):
        layout = Layout.of([(0, 5), (0, 1), (0, 6)], [5, 1, 6], device=torch.device(device))
        inputs = (x.to(device, dtype) for x in (q, k, v))
        on_flash = run_attention if device == "cuda" else None
        keywords = {"cohort_rows": layout, "cohort_attend": on_flash}
        return denoise_attention(torch.nn.Module(), *inputs, None, **keywords)[0]

    found, wanted = attend("cuda", torch.bfloat16).float().cpu(), attend("cpu", torch.float32)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 0.03 * wanted.abs().max()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("remasking", ["low_confidence", "random", "margin", "entropy"])
def test_no_step_within_a_block_waits_for_the_device(model, temperature, remasking):
    params = DenoisingParams(32, block_length=32, temperature=temperature, remasking=remasking)
    params = replace(params, stop_token_ids=(1,), stop_last=True)
    denoiser = TransformersDenoiser(model, MASK)
    batch = Batch(denoiser, params)
    for i, prompt in enumerate(PROMPTS):
        batch.rows.append(
            Row.of(i, prompt_canvas(prompt, params, MASK), seed=i, params=params, model=denoiser)
        )
    with torch.no_grad():
        batch.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(10):
                assert batch.step() == []
        finally:
            torch.cuda.set_sync_debug_mode("default")
