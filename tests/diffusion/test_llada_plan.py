"""What the planner says of a training run without rewards, against what a real step holds."""

from __future__ import annotations

import json
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from recipes.fit import fit_to
from recipes.kinds import size_of
from rl.config.diffusion import DiffusionConfig
from rl.config.read import replaced
from rl.diffusion.train import train_step
from rl.model.head import CHUNK_BYTES
from rl.model.loading import narrow_under_autocast
from rl.plan.memory import GIB, Card, training_parts
from tests.diffusion.training import make_run

VOCABULARY = 2048
SHAPE = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=4,
    eos_token_id=1,
    bos_token_id=None,
)


@pytest.fixture
def folder(tiny_model_dir, tmp_path):
    """A Llama without shared key heads, which flash attention on a CPU would copy, and the tiny tokenizer."""
    LlamaForCausalLM(SHAPE).save_pretrained(tmp_path)
    for file in {*tiny_model_dir.iterdir()} - {
        *tiny_model_dir.glob("config.json"),
        *tiny_model_dir.glob("model*"),
    }:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    rows = [{"prompt": f"What is w{i} ?", "completion": f"w{i} " * (20 + i)} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


class Live:
    """Bytes of tensors that are alive together: now, and at most. It holds none of them."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.seen: set[int] = set()

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return tensor

    def free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


class Watch(TorchDispatchMode):
    """Adds each tensor that is made, and those with a side as long as the vocabulary once more."""

    def __init__(self, all_made: Live, logits: Live) -> None:
        super().__init__()
        self.all_made, self.logits = all_made, logits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.all_made.add(tensor)
                if VOCABULARY in tensor.shape:
                    self.logits.add(tensor)
        return result


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.dtype=fp32"],
        ["model.dtype=bf16-mixed"],
        ["model.dtype=bf16-mixed", "model.lora={r: 4}"],
        ["model.dtype=bf16-mixed", "model.gradient_checkpointing=true"],
    ],
    ids=lambda overrides: ",".join(overrides),
)
def test_a_real_step_holds_what_is_predicted_within_a_tenth(folder, monkeypatch, overrides):
    chunk = 1 << 18
    monkeypatch.setattr("rl.model.head.CHUNK_BYTES", {"cpu": chunk})
    monkeypatch.setitem(CHUNK_BYTES, "cuda", chunk)
    words = ["model.fused_layers=false", "train.examples_per_step=10", "train.token_budget=400", *overrides]
    run = make_run(str(folder), str(folder / "rows.jsonl"), str(folder / "run"), *words)
    run.policy.model.get_input_embeddings().register_forward_hook(narrow_under_autocast)  # as on a GPU
    optimizer, parameters = run.optimizer, list(run.policy.model.parameters())
    held: dict[str, int] = {}

    def gradients(*_):
        held["gradients"] = sum(g.nbytes for _, p in run.policy.trainable() if (g := p.grad) is not None)

    optimizer.register_step_pre_hook(gradients)
    train_step(run, 0)  # now there are moments
    moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    held |= {"weights": sum(p.nbytes for p in parameters), "optimizer": sum(t.nbytes for t in moments)}
    saved, logits, made = Live(), Live(), Live()
    for live in (saved, logits, made):
        live.seen |= {t.untyped_storage()._cdata for t in (*parameters, *moments)}
    lengths: list[int] = []
    run.policy.scorer.register_forward_pre_hook(lambda _, inputs: lengths.append(len(inputs[0])))
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor)
    with hooks, Watch(made, logits):
        train_step(run, 1)
    assert len(lengths) > 1  # so that one pass finds the gradients of another
    plan = {
        p.name: p.bytes for p in training_parts(size_of(run.config, plain(run)), run.config, max(lengths))
    }
    plan["saved"] = plan["activations"] + plan["weights in the compute dtype"]
    if "checkpointing" not in overrides[-1]:  # what is computed again is saved behind the hooks' back
        held["saved"] = saved.most
    if overrides == ["model.dtype=fp32"]:  # a CPU has no kernel for 16-bit logits
        held["logits"] = logits.most - 2 * VOCABULARY * 96 * 4  # gradients of embedding and head
    for name, measured in held.items():
        assert plan[name] == pytest.approx(measured, rel=0.1), name
    total = sum(plan[name] for name in ("weights", "optimizer", "gradients", "saved", "logits"))
    assert total == pytest.approx(made.most + held["weights"] + held["optimizer"], rel=0.1)


def plain(run):
    return run.config.model.plain(run.config.model.name)


SETTINGS = {
    "data": {"source": "rows.jsonl", "max_length": 2048},
    "eos": {"policy": "multiple", "multiple": 48},
}


def config_of(folder, **model):
    given = SETTINGS | {"model": {"name": str(folder)} | model, "train": {"examples_per_step": 64}}
    return DiffusionConfig.model_validate(given | {"run_dir": folder / "run"})


def test_what_is_open_is_chosen_for_a_gpu_and_said(folder):
    fitted = fit_to(config_of(folder), Card("a GPU", 80 * GIB))
    assert fitted.chosen == {"model.gradient_checkpointing": False, "train.token_budget": 32768}
    assert fitted.notes[0].startswith("planned for a GPU of 80 GiB: ") and "engine" not in fitted.notes[0]
    assert fitted.config.longest_row == 2064  # the next multiple of 48


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        # 8e9 weights need 16 bytes each with Adam in fp32.
        ({}, "it does with: model.lora='{r: 16}'"),
        ({"lora": {"r": 16}, "dtype": "fp32"}, "and neither do adapters and short completions"),
    ],
)
def test_what_fits_no_gpu_is_refused_with_what_does(folder, changes, advice):
    llada: dict[str, Any] = {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    shape = LlamaConfig(**llada, num_key_value_heads=32, vocab_size=126464)
    shape.save_pretrained(folder)
    with pytest.raises(ValueError, match="does not fit a GPU of 32 GiB") as error:
        fit_to(config_of(folder, **changes), Card("a GPU", 32 * GIB))
    assert advice in str(error.value)


def test_split_weights_are_not_planned(folder):
    fitted = fit_to(replaced(config_of(folder), {"train.shard": True}), Card("a GPU", 80 * GIB))
    assert "train.shard splits the weights" in fitted.notes[0]
    assert (fitted.config.token_budget, fitted.config.train.token_budget) == (8192, 8192)
