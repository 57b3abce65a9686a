"""The recipe as a user meets it: runs, restarts, and faults that are refused with a sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from recipes.llada import main
from rl.diffusion.model import DiffusionScorer, load_diffusion_model
from rl.store.tensors import TensorFiles
from tests.diffusion import killed_run

STEPS = 4


@pytest.fixture
def config_file(tiny_model_dir, tmp_path) -> Path:
    rows = [{"prompt": f"What is w{i} ?", "completion": f"w{i} w{i + 1}"} for i in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:9]))
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[9:]))
    config = {
        "model": {"name": str(tiny_model_dir), "dtype": "fp32", "mask_token": "<unk>"},
        "data": {"source": str(tmp_path / "train.jsonl"), "max_length": 32},
        "train": {"steps": STEPS, "examples_per_step": 4, "token_budget": 64},
        "optimizer": {"lr": 1e-3},
        "evaluation": {"data": {"source": str(tmp_path / "heldout.jsonl"), "max_length": 32}},
        "checkpoint": {"every": 2},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run(config_file: Path, name: str, *overrides: str) -> Path:
    folder = config_file.parent / name
    assert main([str(config_file), f"run_dir={folder}", *overrides]) == 0
    return folder


def rows(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timing = ("time/", "per_second", "memory/")
    return [{k: v for k, v in row.items() if not any(word in k for word in timing)} for row in lines]


def final_state(folder: Path) -> dict:
    last = folder / "checkpoints" / f"step-{STEPS:06d}"
    files = TensorFiles(last, "optimizer")
    weights = {name: x for file in last.glob("model*.safetensors") for name, x in load_file(file).items()}
    return weights | {name: files.read(name) for name in files.pieces}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(bool((a[k] == b[k]).all()) for k in a)


def test_a_run_leaves_everything_a_user_looks_for(config_file, capsys):
    folder = run(config_file, "run", "trackers=[tensorboard]")
    result = json.loads((folder / "result.json").read_text())
    assert (result["steps"], result["checkpoint"]) == (STEPS, f"checkpoints/step-{STEPS:06d}")
    assert result["heldout_after"]["num_tokens"] == 9
    assert result["heldout_after"]["nats_per_token"] != result["heldout_before"]["nats_per_token"]
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4]
    page = (folder / "report.html").read_text()
    assert "Bound on the training text" in page and "objective.scheme" not in page
    out = capsys.readouterr().out
    assert f"step {STEPS}/{STEPS}" in out and "held-out text after step 4: at most" in out
    checkpoint = folder / "checkpoints" / f"step-{STEPS:06d}"
    config = json.loads((checkpoint / "config.json").read_text())
    assert (config["architectures"], config["mask_token_id"]) == (["MaskedDiffusionLM"], 2)
    assert config["is_causal"] is False
    assert load_diffusion_model(str(checkpoint)).config.mask_token_id == 2
    AutoModelForCausalLM.from_pretrained(checkpoint)


def test_a_stopped_and_a_killed_run_end_bit_by_bit_like_an_undisturbed_one(config_file):
    whole = run(config_file, "whole")
    extended = run(config_file, "extended", "train.steps=2")
    run(config_file, "extended")
    killed = config_file.parent / "killed"
    command = [sys.executable, killed_run.__file__, "recipes.llada", "4", str(config_file)]
    assert subprocess.run([*command, f"run_dir={killed}"], timeout=200).returncode == -signal.SIGKILL
    assert sorted(p.name for p in (killed / "checkpoints").glob("step-*")) == ["step-000002"]
    run(config_file, "killed")
    for folder in (extended, killed):
        assert same(final_state(whole), final_state(folder))
        assert rows(folder) == rows(whole)
    assert (killed / "likelihood.jsonl").read_text() == (whole / "likelihood.jsonl").read_text()
    early = load_file(whole / "checkpoints" / "step-000002" / "model.safetensors")
    assert not same(early, load_file(whole / "checkpoints" / "step-000004" / "model.safetensors"))


def test_pretraining_and_adapters_run_and_resume(config_file):
    text = config_file.parent / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"w{i} w{i + 1} w{i + 2}"}) + "\n" for i in range(30)))
    settings = [
        f"data={{source: {text}, max_length: 16}}",
        "objective={random_length_share: 0.5, normaliser: token}",
        "evaluation.data=null",
        "model.lora={r: 2}",
    ]
    whole = run(config_file, "whole", *settings)
    run(config_file, "parts", *settings, "train.steps=2")
    parts = run(config_file, "parts", *settings)
    name = f"checkpoints/step-{STEPS:06d}/adapter_model.safetensors"
    assert same(load_file(whole / name), load_file(parts / name))
    assert rows(whole) == rows(parts)


def test_padding_may_fill_the_context_and_no_more(config_file):
    filled = run(config_file, "filled", "eos={policy: multiple, multiple: 512}", "train.steps=1")
    assert rows(filled)[0]["diffusion/packed_tokens"] > 4 * 512  # 4 examples, each with its complement


def test_a_shifted_model_trains_on_text_of_any_length_without_masking_its_first_token(
    config_file, monkeypatch
):
    """Pieces of 4 tokens cut to random lengths of 1 to 4: of each at least the second may be masked."""
    text = config_file.parent / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"w{i} w{i + 1} w{i + 2}"}) + "\n" for i in range(9)))
    scored, plain = [], DiffusionScorer.forward

    def record(self, token_ids_N, documents, columns_L, targets_L, temperature=1.0):
        scored.extend(documents.positions_N[columns_L].tolist())
        return plain(self, token_ids_N, documents, columns_L, targets_L, temperature)

    monkeypatch.setattr(DiffusionScorer, "forward", record)
    section = f"{{source: {text}, max_length: 4}}"
    objective = "objective={random_length_share: 1}"
    run(
        config_file, "shifted", "model.shift=true", f"data={section}", f"evaluation.data={section}", objective
    )
    assert set(scored) == {1, 2, 3}


def test_a_model_from_scratch_has_the_shape_asked_for_and_random_weights_of_the_seed(config_file):
    scratch = ["model.from_scratch={num_hidden_layers: 1}", "train.steps=2", "evaluation.data=null"]
    folders = [run(config_file, "a", *scratch), run(config_file, "b", *scratch)]
    folders.append(run(config_file, "c", *scratch, "train.seed=1"))
    first, again, other = (
        load_file(f / "checkpoints" / "step-000002" / "model.safetensors") for f in folders
    )
    assert same(first, again) and not same(first, other)
    config = json.loads((folders[0] / "checkpoints" / "step-000002" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["is_causal"]) == (1, False)
    pretrained = load_file(
        Path(yaml.safe_load(config_file.read_text())["model"]["name"]) / "model.safetensors"
    )
    name = "model.layers.0.mlp.up_proj.weight"
    assert pretrained[name].shape == first[name].shape
    assert (pretrained[name] - first[name]).abs().mean() > 0.01  # steps of 1e-3 do not come that far


@pytest.mark.parametrize("shard", ["false", "true"])
def test_two_processes_share_one_run(config_file, shard):
    """Over gloo, weights, moments and metrics are those of one process up to the order of sums; sharded ones
    are saved in parts and go on sharded.
    """
    alone = run(config_file, "alone")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    launch += ["--num_machines=1", "--main_process_port=0", "--mixed_precision=no", "--dynamo_backend=no"]
    both = config_file.parent / "both"
    launch += ["-m", "recipes.llada", str(config_file), f"run_dir={both}", f"train.shard={shard}"]
    for steps in (2, STEPS):
        done = subprocess.run(
            [*launch, f"train.steps={steps}"],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    idle = {"diffusion/packed_tokens", "diffusion/scored_share", "tokens/trained"}  # idle rows count
    for one, two in zip(rows(alone), rows(both), strict=True):
        for name in one.keys() - (idle if shard == "true" else set()):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
    ours, theirs = final_state(alone), final_state(both)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stepz=2"], "did you mean steps?"),
        (["model.mask_token=null"], "set model.mask_token to a special token"),
        (["model.mask_token=<mask>"], "model.mask_token='<mask>' is not in the vocabulary"),
        (["model.mask_token=w3"], "row 2 of"),
        (["model.mask_token=w3"], "contains the mask token"),
        (["data.source=nowhere.jsonl"], "nowhere.jsonl"),
        (["data.prompt_column=question"], "name yours with data.prompt_column"),
        (["data.max_length=5"], "raise it, or leave such rows out with data.too_long=drop"),
        (["data.max_length=1024"], "beyond the model's context of 512 tokens"),
        (["eos.policy=rainbow"], "list them in eos.rainbow_tokens"),
        (["eos={policy: rainbow, rainbow_tokens: [99999]}"], "99999 is not among the model's"),
        (
            ["eos={policy: multiple, multiple: 600}"],
            "examples of up to 10 tokens to 600, beyond the model's context of 512 tokens; "
            "use a multiple that divides 512, such as 64, or eos.policy=batch_max",
        ),
        (["objective.random_length_share=0.01"], "is for pre-training on rows with 'text'"),
        (["objective.random_length_share=1", "data.format=prompt_completion"], "use objective.random_length"),
        (["train.shard=true"], "there is one; launch more"),
        (["model.name=/no/such/folder"], "/no/such/folder"),
        (["model.from_scratch={hidden_sise: 64}"], "did you mean hidden_size?"),
        (["model.from_scratch={num_key_value_heads: 3}"], "is not a shape of"),
    ],
)
def test_faults_get_a_sentence_and_exit_code_one(config_file, capsys, overrides, message):
    folder = config_file.parent / "fault"
    assert main([str(config_file), f"run_dir={folder}", "evaluation.data=null", *overrides]) == 1
    error = capsys.readouterr().err
    assert error.count("cohort:") == 1 and message in error and "Traceback" not in error
