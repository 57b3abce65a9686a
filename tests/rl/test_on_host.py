"""Moments and references in host memory change no bit. On a CPU host and device are one; the moves happen."""

from __future__ import annotations

import contextlib
import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from rl.config import OptimizerConfig
from rl.config.read import load_config
from rl.model.on_host import decoder_layers, host_like, narrow_matrices
from rl.optimizer import HostedAdamW, make_optimizer
from rl.plan.measured import measured_size
from rl.plan.memory import reference_bytes
from rl.plan.sizes import ModelSize, NoPrediction
from rl.policy import Scores
from rl.references import Copy, make_reference
from rl.store.optimizer_state import load_optimizer, optimizer_writer
from tests.rl.families import FAMILIES, tiny_config

RATES = OptimizerConfig(lr=0.01, weight_decay=0.1)


def small_model(seed: int = 0) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Some parameters have no gradient in some steps."""
    for step in steps:
        torch.manual_seed(step)
        for n, parameter in enumerate(model.parameters()):
            parameter.grad = None if (n + step) % 5 == 0 else torch.randn_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("piece", [1, 20_000, 1 << 30])
def test_moments_in_host_memory_give_the_same_bits_and_the_same_checkpoint(piece, monkeypatch, tmp_path):
    monkeypatch.setattr("rl.optimizer.PIECE_BYTES", piece)
    plain, hosted = small_model(), small_model()
    optimizers = [make_optimizer([*m.named_parameters()], RATES, hosted=m is hosted) for m in (plain, hosted)]
    for model, optimizer in zip((plain, hosted), optimizers, strict=True):
        trained(model, optimizer, range(4))
        folder = tmp_path / str(model is hosted)
        folder.mkdir()
        optimizer_writer(optimizer, model.named_parameters())(folder)
    for name in ("optimizer.json", "optimizer.safetensors"):
        assert (tmp_path / "True/trainer" / name).read_bytes() == (
            tmp_path / "False/trainer" / name
        ).read_bytes()
    again = copy.deepcopy(hosted)
    resumed = make_optimizer([*again.named_parameters()], RATES, hosted=True)
    load_optimizer(tmp_path / "False", resumed, again.named_parameters())
    for model, optimizer in ((plain, optimizers[0]), (hosted, optimizers[1]), (again, resumed)):
        trained(model, optimizer, range(4, 7))
    for one, two, three in zip(plain.parameters(), hosted.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
        ours, theirs = optimizers[0].state[one], optimizers[1].state[two]
        assert all(torch.equal(ours[key], theirs[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_moments_of_a_transposed_matrix_are_brought_with_its_strides():
    found = []
    for hosted in (False, True):
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(5, 7).t())
        optimizer = make_optimizer([("it", parameter)], RATES, hosted=hosted)
        for _ in range(3):
            (parameter * torch.randn(7, 5)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(parameter)
    assert torch.equal(*found)


def test_only_the_moments_of_a_piece_are_on_the_device_at_once(monkeypatch):
    """Three matrices of 400 bytes, whose moments take 800 each: 1,700 bytes hold two."""
    monkeypatch.setattr("rl.optimizer.PIECE_BYTES", 1700)
    parameters = [nn.Parameter(torch.ones(10, 10)) for _ in range(3)]
    optimizer = make_optimizer([(str(n), p) for n, p in enumerate(parameters)], RATES, hosted=True)
    seen: list[list[bool]] = []
    homes: list[int] = []
    inner = torch.optim.AdamW.step

    def spied(self: torch.optim.AdamW, closure: None = None) -> None:
        here = [p in self.state and self.state[p]["exp_avg"].data_ptr() not in homes for p in parameters]
        seen.append([p.grad is not None for p in parameters])
        assert not homes or seen[-1] == here
        inner(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", spied)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones(10, 10)
        optimizer.step()
        homes[:] = [optimizer.state[p]["exp_avg"].data_ptr() for p in parameters]
        assert all(p.grad is not None for p in parameters)
    assert seen == [[True, True, False], [False, False, True]] * 2
    assert isinstance(optimizer, HostedAdamW)


class Policy:
    """A model that scores fixed ids, as a reference needs it."""

    peft_model = None
    device = torch.device("cpu")

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.scorer, self.dtype = nn.ModuleDict({"model": small_model()}), dtype
        self.scorer.model = self.scorer["model"]

    def autocast(self):
        return torch.autocast("cpu", self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def score_by(self, scorer, prepared):
        ids = torch.arange(40).reshape(4, 10)
        with self.autocast():
            logits = scorer["model"](ids).logits
        logprobs = logits.float().log_softmax(-1).amax(-1).flatten()
        return Scores(logprobs, logprobs)


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_reference_whose_layers_stay_on_the_host_has_the_same_log_probs(dtype, moves, tmp_path):
    policy = Policy(dtype)
    plain, hosted = Copy(policy, moves=moves), make_reference(policy, moves=moves, hosted=True)
    assert isinstance(hosted, Copy)
    layers = decoder_layers(hosted.scorer["model"])
    homes = [p.data_ptr() for layer in layers for p in layer.parameters()]
    inside: list[bool] = []
    layers[1].self_attn.register_forward_hook(
        lambda module, *call: inside.append(module.q_proj.weight.data_ptr() in homes)
    )
    prepared = SimpleNamespace()
    assert torch.equal(plain.logprobs(prepared), hosted.logprobs(prepared))
    assert inside == [False]  # while it computes, a layer is elsewhere
    assert [p.data_ptr() for layer in layers for p in layer.parameters()] == homes
    is_narrow = layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert (
        is_narrow == (dtype is not None and not moves)
        and layers[0].input_layernorm.weight.dtype == torch.float32
    )
    if moves:
        with torch.no_grad():
            for parameter in policy.scorer.parameters():
                parameter.mul_(1.5)
        for reference in (plain, hosted):
            reference.follow(policy, 0.3)
        assert torch.equal(plain.logprobs(prepared), hosted.logprobs(prepared))
        writer = hosted.snapshot()
        assert writer is not None
        writer(tmp_path)
        fresh = make_reference(policy, moves=True, hosted=True)
        fresh.load(tmp_path)
        assert torch.equal(plain.logprobs(prepared), fresh.logprobs(prepared))


def planned_reference(config: PreTrainedConfig) -> int | None:
    """Bytes of a reference of the KL term; None: nothing is planned for such a model."""
    for count in (partial(ModelSize.of, fused_layers=True), measured_size):
        with contextlib.suppress(NoPrediction):
            return reference_bytes(count(config), load_config(None, ["loss.kl_coef=0.1"]))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "dbrx"])  # it fails under autocast
def test_matrices_as_autocast_makes_them_change_no_result_and_are_planned(name):
    config = tiny_config(name)
    planned = planned_reference(config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = torch.arange(24).reshape(2, 12) % config.get_text_config().vocab_size
    found = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            found.append(model(input_ids=ids, use_cache=False).logits)
            narrow_matrices(model, torch.bfloat16)
    assert torch.equal(*found)
    assert planned in (None, sum(p.nbytes for p in model.parameters()))


def test_tensors_on_the_host_have_shapes_and_dtypes_of_their_own_and_share_no_byte():
    like = [torch.zeros(3, 5), torch.zeros(7, dtype=torch.bfloat16), torch.zeros(2, 2, dtype=torch.int64)]
    found = host_like(like, pinned=False)
    for n, tensor in enumerate(found):
        tensor.fill_(n + 1)
    assert len({t.untyped_storage().data_ptr() for t in found}) == 3
    assert [(t.shape, t.dtype, t.flatten().unique().tolist()) for t in found] == [
        (t.shape, t.dtype, [n + 1]) for n, t in enumerate(like)
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["memory.engine_sleeps=true", "train.sample_while_training=true"], "samples with them"),
        (["memory.reference_on_host=true", "loss.kl_coef=0"], "no copy of the model as reference"),
        (["memory.reference_on_host=true", "model.lora={r: 8}"], "no copy of the model as reference"),
        (
            ["memory.optimizer_on_host=true", "train.sharding=full"],
            "train.sharding=full: moments and reference would be split",
        ),
    ],
)
def test_ways_that_exclude_each_other_are_refused(words, said):
    with pytest.raises(ValueError, match=said):
        load_config(None, words)
