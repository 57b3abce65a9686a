"""On a GPU: the fused paths are on, and a step's gradient is the plain path's within what bf16 rounds.

python -m pytest tests/gpu
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rl.causal import CausalPolicy
from rl.config import ModelConfig
from rl.config.read import load_config
from rl.diffusion.model import DiffusionScorer, to_diffusion, use_fused_diffusion_layers
from rl.model.bidirectional import Documents, bidirectional_attention
from rl.model.head import kernels_work, token_logprobs
from rl.model.linear import add_gradients_in_products, adding, wide_products_work
from rl.model.varlen import flash_works, joined_flash_works, windowed_flash_works

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _settings(folder, dtype: str, *overrides: str):
    base = [f"model.name={folder}", f"model.dtype={dtype}", "sampling.max_completion_length=20"]
    return load_config(None, [*base, "loss.clip_high=4.0", *overrides])


def _alone_on(device: str) -> SimpleNamespace:
    """What a policy needs of an Accelerator; a real one has one device in a process."""
    return SimpleNamespace(
        device=torch.device(device), num_processes=1, process_index=0, is_main_process=True
    )


@pytest.fixture(scope="module", params=["fp32", "bf16-mixed"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def plain(tiny_model_dir):
    config = _settings(tiny_model_dir, "fp32", "model.fused_layers=false")
    policy = CausalPolicy(config.model, _alone_on("cuda:0"), temperature=0.9)
    policy.set_packed(False)
    return policy


@pytest.fixture(scope="module")
def ours(tiny_model_dir, dtype):
    config = _settings(tiny_model_dir, dtype)
    policy = CausalPolicy(config.model, _alone_on("cuda:0"), temperature=0.9)
    assert policy.settle_attention() is None
    return policy


def relative_error(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    difference = sum((a[n].cpu() - b[n].cpu()).double().square().sum() for n in a) ** 0.5
    size = sum(b[n].cpu().double().square().sum() for n in b) ** 0.5
    assert size > 1e-3
    return (difference / size).item()


def test_the_fused_kernels_agree_with_plain_torch():
    assert kernels_work()
    assert flash_works()
    assert joined_flash_works()
    assert windowed_flash_works()


def test_kept_logits_change_no_bit():
    generator = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (
        torch.randn(n, 64, device="cuda", generator=generator).bfloat16().requires_grad_() for n in (70, 5001)
    )
    targets = torch.randint(0, 5001, (70,), device="cuda", generator=generator)

    def passes(keep: bool) -> list[torch.Tensor]:
        found = token_logprobs(hidden, targets, weight_VD=weight, temperature=0.7, keep=keep)
        return [*found, *torch.autograd.grad((found[0] + 0.1 * found[1]).sum(), (hidden, weight))]

    for found, expected in zip(passes(True), passes(False), strict=True):
        assert torch.equal(found, expected) and found.isfinite().all()


def test_weights_gradients_are_added_up_in_fp32_and_all_else_is_autocasts():
    """Five micro-batches, against double precision of the same rounded numbers."""
    assert wide_products_work()
    generator = torch.Generator("cuda").manual_seed(0)
    plain = torch.nn.Linear(512, 256, device="cuda")
    ours = copy.deepcopy(plain)
    add_gradients_in_products(ours)
    exact = torch.zeros(256, 512, device="cuda", dtype=torch.float64)
    for _ in range(5):
        x, slope = (torch.randn(1, 300, n, device="cuda", generator=generator).bfloat16() for n in (512, 256))
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        with torch.autocast("cuda", torch.bfloat16):
            outputs = [layer(one) for layer, one in zip((plain, ours), inputs, strict=True)]
        with adding():
            for y in outputs:
                y.backward(slope)
        assert torch.equal(*outputs) and torch.equal(inputs[0].grad, inputs[1].grad)
        exact += slope[0].double().T @ x[0].double()
    autocasts, found = (((y.weight.grad - exact).norm() / exact.norm()).item() for y in (plain, ours))
    assert found <= 1e-5 < 1e-4 < autocasts < 0.01


def test_bidirectional_attention_is_that_of_plain_torch_in_fp32():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 10, 64, generator=generator)
    k, v = torch.randn(2, 1, 2, 10, 64, generator=generator).unbind()

    def attend(device: str, dtype: torch.dtype):
        inputs = [x.detach().to(device, dtype).requires_grad_() for x in (q, k, v)]
        documents = Documents.of([3, 1, 6], device)
        out, _ = bidirectional_attention(torch.nn.Module(), *inputs, None, cohort_documents=documents)
        return out, *torch.autograd.grad(out.float().square().sum(), inputs)

    for found, wanted in zip(attend("cuda", torch.bfloat16), attend("cpu", torch.float32), strict=True):
        assert (found.float().cpu() - wanted).abs().max() <= 0.03 * wanted.abs().max()


@pytest.mark.parametrize("loss", ["grpo", "gspo", "cispo"])
@pytest.mark.parametrize("budget", [40, 100000])
def test_gradient_is_that_of_one_fp32_sequence_at_a_time(
    plain, ours, dtype, tiny_model_dir, ragged_groups, gradients, loss, budget
):
    groups, advantages = ragged_groups()
    overrides = (f"loss.name={loss}", "loss.kl_coef=0", f"train.token_budget={budget}")
    expected = gradients(plain, _settings(tiny_model_dir, "fp32", *overrides), groups, advantages)
    found = gradients(ours, _settings(tiny_model_dir, dtype, *overrides), groups, advantages)
    assert relative_error(found, expected) <= (1e-4 if dtype == "fp32" else 0.04)


def test_a_diffusion_models_gradient_is_that_of_plain_fp32():
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    lengths, generator = [9, 1, 30], torch.Generator().manual_seed(0)
    ids, targets = torch.randint(1, 999, (2, 40), generator=generator)
    columns = torch.arange(0, 40, 3)

    def gradient(device: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = to_diffusion(LlamaForCausalLM(config).to(device), mask_token_id=999)
        if device == "cuda":
            use_fused_diffusion_layers(model, ModelConfig(dtype="bf16-mixed"))
        inputs = (x.to(device) for x in (columns, targets[columns]))
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logprobs, _ = DiffusionScorer(model)(ids.to(device), Documents.of(lengths, device), *inputs)
        logprobs.sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    found = gradient("cuda")
    # A model that is made on a CPU afterwards, such as an engine's copy while it loads, is not Liger's.
    assert relative_error(found, gradient("cpu")) <= 0.04
