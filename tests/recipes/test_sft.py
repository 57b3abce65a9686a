"""SFT by TRL with our balance: every cut has the gradient of one big batch, transformers' own has not."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from recipes.sft import checkpoints_of, main, make_trainer
from rl.config.read import read_config
from rl.config.sft import SftConfig
from rl.moe.upcycling import upcycle
from tests.conftest import WORDS

COEF = 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_dir) -> Path:
    """A mixture whose routers and experts differ, and eight ragged rows."""
    folder = tmp_path_factory.mktemp("sft")
    model = upcycle(AutoModelForCausalLM.from_pretrained(tiny_model_dir), noise=0.3)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder / "moe")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tiny_model_dir / name).exists():
            (folder / "moe" / name).write_bytes((tiny_model_dir / name).read_bytes())
    draw = random.Random(0)
    text = lambda most: " ".join(draw.choices(WORDS, k=draw.randint(1, most)))  # noqa: E731
    rows = [{"prompt": text(9), "completion": text(20)} for _ in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(folder: Path, run: Path, *others: str) -> list[str]:
    given = [f"run_dir={run}", f"model.name={folder / 'moe'}", "model.dtype=fp32", "train.steps=1"]
    given += [f"data.source={folder / 'rows.jsonl'}", "data.max_length=64", "train.examples_per_step=8"]
    given += ["optimizer.max_grad_norm=1e9", f"moe.balance_coef={COEF}", "moe.z_loss_coef=0.01"]
    given += ["moe.experts_implementation=batched_mm"]  # a measured one may differ from run to run
    return [*given, *others]


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        named = [(n.removeprefix("module."), p) for n, p in model.named_parameters()]
        self.found = {n: p.grad.clone() for n, p in named if p.grad is not None}


def gradient(folder: Path, run: Path, *others: str) -> dict[str, torch.Tensor]:
    trainer, *_ = make_trainer(read_config(SftConfig, None, settings(folder, run, *others)))
    trainer.add_callback(gradients := Gradients())
    trainer.train()
    return gradients.found


def big_batch(folder: Path) -> dict[str, torch.Tensor]:
    """Plain autograd over the eight rows; the balance by transformers' function, a layer at a time."""
    trainer, *_ = make_trainer(read_config(SftConfig, None, settings(folder, folder / "none")))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    model = trainer.accelerator.unwrap_model(trainer.model)
    mask = batch["attention_mask"]
    out = type(model).forward.__get__(model)(
        input_ids=batch["input_ids"], attention_mask=mask, output_router_logits=True, use_cache=False
    )
    logits, labels = out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100)
    layers = [load_balancing_loss_func((layer,), 8, 2, mask) / 2 for layer in out.router_logits]
    z = torch.stack(
        [layer.logsumexp(-1).square()[mask.bool().flatten()].mean() for layer in out.router_logits]
    )
    loss = loss + COEF * torch.stack(layers).mean() + 0.01 * z.mean()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def error(found, expected) -> float:
    assert found.keys() == expected.keys()
    off = sum((found[n] - expected[n]).double().square().sum() for n in expected) ** 0.5
    size = sum(expected[n].double().square().sum() for n in expected) ** 0.5
    return (off / size).item()


@pytest.fixture(scope="module")
def expected(folder):
    return big_batch(folder)


CUTS = [
    ["train.micro_batch=8"],
    ["train.micro_batch=4"],
    ["train.micro_batch=1"],
    ["train.micro_batch=2", "model.gradient_checkpointing=true"],
]


@pytest.mark.parametrize("cut", CUTS, ids=["8x1", "4x2", "1x8", "2x4 recomputed"])
def test_every_cut_has_the_gradient_of_one_big_batch(folder, expected, tmp_path, cut):
    assert error(gradient(folder, tmp_path, *cut), expected) < 1e-6


def test_packed_rows_have_the_gradient_of_padded_ones(folder, expected, tmp_path):
    # all eight rows fit into three packed ones, which are one pass
    (tmp_path / "rows").mkdir()
    found = gradient(
        folder, tmp_path, "train.packing=true", "data.max_length=128", "train.examples_per_step=2",
        "train.micro_batch=1",
    )  # fmt: skip
    assert error(found, expected) < 1e-6


@pytest.mark.rotation
def test_two_processes_have_the_gradient_of_one(folder, expected, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in range(2):
        env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        env |= {"MASTER_PORT": port, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        words = [sys.executable, __file__, str(folder), str(tmp_path)]
        ranks.append(subprocess.Popen(words, env={**os.environ, **env}))
    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    for cut in ("1", "4"):
        assert error(load_file(tmp_path / f"{cut}.safetensors"), expected) < 1e-6


@pytest.mark.rotation
def test_transformers_own_trainer_multiplies_the_balance_by_the_number_of_passes(folder, tmp_path):
    """Known bad, for which ours is 1.0: gradient accumulation scales the auxiliary loss."""
    trainer, *_ = make_trainer(read_config(SftConfig, None, settings(folder, tmp_path / "ours")))
    rows = trainer.data_collator([trainer.train_dataset[0]] * 8)
    data = Dataset.from_dict({k: rows[k].tolist() for k in ("input_ids", "attention_mask", "labels")})

    def router_gradient(passes: int, coef: float) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder / "moe", output_router_logits=True)
        model.config.router_aux_loss_coef = model.router_aux_loss_coef = coef
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=8 // passes, max_grad_norm=1e9,
            gradient_accumulation_steps=passes, report_to=[], use_cpu=True, save_strategy="no",
        )  # fmt: skip
        theirs = Trainer(model, args, train_dataset=data, callbacks=[gradients := Gradients()])
        theirs.train()
        return gradients.found["model.layers.0.mlp.gate.weight"]

    parts = {n: router_gradient(n, 1.0) - router_gradient(n, 0.0) for n in (1, 8)}
    assert (parts[8].norm() / parts[1].norm()).item() == pytest.approx(8.0, rel=1e-3)


@pytest.mark.rotation
def test_adapters_go_on_from_their_checkpoint(folder, tmp_path):
    lora = ["model.lora={r: 4, target_modules: [q_proj]}", "optimizer.lr=0.01", "train.micro_batch=8"]
    file = "checkpoints/checkpoint-2/adapter_model.safetensors"
    for name, steps in (("whole", [2]), ("cut", [1, 2])):
        for number in steps:
            assert main(["recipes/configs/moe_sft_gsm8k.yaml", *rows_of(), *settings(
                folder, tmp_path / name, *lora, f"train.steps={number}", "optimizer.schedule=constant",
            )]) == 0  # fmt: skip
    whole, cut = (load_file(tmp_path / name / file) for name in ("whole", "cut"))
    assert whole and all(torch.equal(whole[name], cut[name]) for name in whole)


def rows_of() -> list[str]:
    columns = ["data.prompt_column=prompt", "data.completion_column=completion", "data.options={}"]
    return [*columns, "optimizer.warmup_steps=0"]


def test_a_run_goes_on_from_its_checkpoint_and_ends_as_an_undisturbed_one(folder, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run = lambda at, *more: main(  # noqa: E731
        ["recipes/configs/moe_sft_gsm8k.yaml", "data.options={}", "data.prompt_column=prompt",
         "data.completion_column=completion", "optimizer.warmup_steps=0", "optimizer.schedule=constant",
         "optimizer.lr=0.01",
         *settings(folder, at, "train.examples_per_step=4", "train.micro_batch=2", *more)]
    )  # fmt: skip
    assert run(whole, "train.steps=4") == 0
    assert run(cut, "train.steps=2") == 0
    assert run(cut, "train.steps=4", "moe.balance=none") == 1  # other settings are refused
    assert run(cut, "train.steps=4") == 0
    assert [at.name for at in checkpoints_of(cut)] == ["checkpoint-2", "checkpoint-4"]
    a, b = (load_file(at / "checkpoints/checkpoint-4/model.safetensors") for at in (whole, cut))
    assert all(torch.equal(a[name], b[name]) for name in a)
    logs = [
        [json.loads(line) for line in (at / "metrics.jsonl").read_text().splitlines()] for at in (whole, cut)
    ]
    names = ["sft/loss", "moe/balance", "moe/max_violation", "moe/start_overlap"]
    for one, other in zip(*logs, strict=True):
        assert [one[n] for n in names] == pytest.approx([other[n] for n in names], rel=1e-6)
    assert [row["step"] for row in logs[1]] == [1, 2, 3, 4] and logs[1][3]["moe/start_overlap"] < 1
    assert "Load of the experts" in (cut / "report.html").read_text()


def test_a_finished_run_does_no_step_more_and_mends_its_result(folder, tmp_path):
    words = [
        "recipes/configs/moe_sft_gsm8k.yaml",
        *rows_of(),
        *settings(
            folder, tmp_path / "a", "train.steps=2", "train.micro_batch=2", "train.examples_per_step=2"
        ),
    ]
    assert main(words) == 0
    weights = (tmp_path / "a/checkpoints/checkpoint-2/model.safetensors").read_bytes()
    (tmp_path / "a/result.json").unlink()
    torn = tmp_path / "a/checkpoints/checkpoint-3"  # a kill while it was being written
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_st')
    assert main(words) == 0
    assert (tmp_path / "a/checkpoints/checkpoint-2/model.safetensors").read_bytes() == weights
    result = json.loads((tmp_path / "a/result.json").read_text())
    assert result["steps"] == 2 and result["checkpoint"] == "checkpoints/checkpoint-2"
    assert len((tmp_path / "a/metrics.jsonl").read_text().splitlines()) == 2


def test_dense_models_train_and_adapters_leave_the_routers_alone(folder, tiny_model_dir, tmp_path):
    none = ["moe.balance_coef=0.001", "moe.z_loss_coef=0.0", "moe.experts_implementation=auto"]
    none += [f"model.name={tiny_model_dir}"]
    plain = gradient(folder, tmp_path / "a", *none, "train.micro_batch=8")
    cut = gradient(folder, tmp_path / "b", *none, "train.micro_batch=2")
    assert error(cut, plain) < 1e-6
    found = gradient(folder, tmp_path / "c", "model.lora={r: 4, target_modules: [q_proj, gate]}")
    assert found and all("lora" in name and "gate" not in name for name in found)


def test_a_rate_that_rounds_to_nothing_is_said(folder, tmp_path):
    given = settings(folder, tmp_path, "optimizer.lr=1e-6", "moe.router=train")
    for dtype in ("fp32", "bf16"):
        trainer, *_ = make_trainer(read_config(SftConfig, None, [*given, f"model.dtype={dtype}"]))
        told = [
            text for text in trainer.said if "too coarse in 16 bits for a step of optimizer.lr=1e-06" in text
        ]
        assert len(told) == (dtype == "bf16")


def test_examples_that_do_not_split_are_refused_with_a_number_that_works(folder, tmp_path):
    config = read_config(SftConfig, None, settings(folder, tmp_path, "train.micro_batch=3"))
    with pytest.raises(
        ValueError, match=r"examples_per_step=8 does not split over 1 processes .* multiple of 3"
    ):
        make_trainer(config)


if __name__ == "__main__":
    at, out = Path(sys.argv[1]), Path(sys.argv[2])
    for micro_batch in ("1", "4"):
        save_file(gradient(at, out, f"train.micro_batch={micro_batch}"), out / f"{micro_batch}.safetensors")


def test_a_half_written_checkpoint_is_passed_over_and_other_data_is_refused(folder, tmp_path, capsys):
    """Before there were manifests, a run went on from `model.safetensors` of a save that was killed."""
    rows, at = tmp_path / "rows.jsonl", tmp_path / "run"
    rows.write_bytes((folder / "rows.jsonl").read_bytes())
    run = lambda *more: main([  # noqa: E731
        "recipes/configs/moe_sft_gsm8k.yaml", *rows_of(), *settings(folder, at), f"data.source={rows}",
        "optimizer.schedule=constant", "checkpoint.every=1", "train.micro_batch=8", *more,
    ])  # fmt: skip
    assert run("train.steps=3") == 0
    assert [path.name for path in checkpoints_of(at)] == ["checkpoint-2", "checkpoint-3"]  # keep=2
    third, weights = at / "checkpoints" / "checkpoint-3", "model.safetensors"
    expected = {n: v.clone() for n, v in load_file(third / weights).items()}
    (third / "manifest.json").unlink()
    (third / weights).write_bytes((third / weights).read_bytes()[:-100])
    assert run("train.steps=3") == 0
    found = load_file(third / weights)
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    with rows.open("a") as file:
        file.write('{"prompt": "w1", "completion": "w2"}\n')
    assert run("train.steps=4") == 1
    assert "began with another model or other data" in capsys.readouterr().err
    for path in checkpoints_of(at):
        (path / weights).write_bytes(b"")
    assert run("train.steps=4") == 1
    assert "every checkpoint of" in capsys.readouterr().err
