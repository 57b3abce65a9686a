"""A checkpoint as a clean folder: proved, without local paths, whole or absent, and then on the hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from peft.tuners.lora import layer as peft_layers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import recipes.export
import recipes.exports.merging
from recipes.cli import main as cohort
from recipes.export import copy_checkpoint, export
from recipes.grpo import run as start
from rl.store.manifest import write_manifest
from rl.store.rows import read_rows
from tests.recipes.exported import COMMIT, HUB_NAME, LORA, put_into_cache, train
from tests.recipes.hub_server import hub_server

IDS = torch.arange(5, 45)[None]
KILLED = """
import os, pathlib, sys
import recipes.export
recipes.export._publish = lambda *_: os._exit(9)
recipes.export.export(pathlib.Path(sys.argv[1]), to=pathlib.Path(sys.argv[2]))
"""
TOKEN = "hf_" + "x" * 30


@pytest.fixture(scope="module")
def lora_run(patched, tiny_model_dir, tmp_path_factory) -> Path:
    hub = put_into_cache(tiny_model_dir, HUB_NAME)
    return train(tmp_path_factory.mktemp("lora"), {"name": hub, "lora": LORA})


@pytest.fixture(scope="module")
def full_run(patched, tiny_model_dir, tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("full"), {"name": str(tiny_model_dir)})


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # evaluations are looked for in the working directory, too


def edited(run: Path, to: Path) -> tuple[Path, Path]:
    """A copy of a run, and its checkpoint, whose manifest `sealed` makes anew."""
    shutil.copytree(run, to)
    return to, to / "checkpoints" / "step-000002"


def sealed(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, 2)


@torch.no_grad()
def logprobs(model) -> torch.Tensor:
    return model.eval().float()(input_ids=IDS).logits.log_softmax(-1)


def assert_clean(folder: Path, *paths: Path) -> None:
    """Nothing of a trainer, and in no file, binary or not, a path of these."""
    names = [path.name for path in folder.rglob("*")]
    assert not [n for n in names if "trainer" in n or "optimizer" in n or "ledger" in n or "manifest" in n]
    for path in folder.rglob("*"):
        data = path.read_bytes()
        for local in (*paths, "/tmp/", folder.parent):
            assert str(local).encode() not in data, (path.name, local)
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask}


def test_a_merged_model_is_the_adapter_beside_its_base_and_nothing_else(lora_run, tmp_path, capsys):
    to = export(lora_run, to=tmp_path / "merged", merge=True)
    checkpoint = lora_run / "checkpoints" / "step-000002"
    theirs = logprobs(AutoPeftModelForCausalLM.from_pretrained(checkpoint))
    plain = logprobs(AutoModelForCausalLM.from_pretrained(HUB_NAME))
    ours = AutoModelForCausalLM.from_pretrained(to)
    torch.testing.assert_close(logprobs(ours), theirs, atol=2e-5, rtol=0)
    assert (theirs - plain).abs().max() > 0.05  # the adapter does something
    assert ours.lm_head.weight.data_ptr() == ours.model.embed_tokens.weight.data_ptr()
    assert ours.generation_config.eos_token_id == 1
    names = load_file(to / "model.safetensors").keys()
    assert "lm_head.weight" not in names and not [n for n in names if "lora" in n or "base_layer" in n]
    assert AutoTokenizer.from_pretrained(to).chat_template is not None
    assert sorted(p.name for p in to.iterdir()) == [
        *("README.md", "chat_template.jinja", "config.json", "generation_config.json"),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    ]
    gap = float(capsys.readouterr().out.split("log-probs within ")[1].split(" nats")[0])
    assert 0 <= gap < 2e-5
    assert_clean(to, lora_run)


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "full"])
def test_a_cast_is_that_of_the_exact_tensors_and_the_config_says_so(lora_run, full_run, tmp_path, merge):
    source = lora_run if merge else full_run
    kinds = {d: export(source, to=tmp_path / d, merge=merge, dtype=d) for d in ("fp32", "bf16")}
    exact, cast = (load_file(kinds[dtype] / "model.safetensors") for dtype in ("fp32", "bf16"))
    assert exact.keys() == cast.keys() and all(torch.equal(exact[n].bfloat16(), cast[n]) for n in exact)
    assert {tensor.dtype for tensor in cast.values()} == {torch.bfloat16}
    assert json.loads((kinds["bf16"] / "config.json").read_text())["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(kinds["bf16"], dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert_clean(kinds["bf16"], source)


@pytest.mark.rotation
def test_a_model_that_computed_in_bf16_is_exported_as_it_is_stored(patched, tiny_model_dir, tmp_path):
    """Its checkpoint holds fp32 and names bfloat16, by which others would load it; an export names fp32."""
    run = train(tmp_path, {"name": str(tiny_model_dir), "dtype": "bf16-mixed"}, checkpoint={"every": 0})
    assert json.loads((run / "checkpoints/step-000002/config.json").read_text())["dtype"] == "bfloat16"
    to = export(run)
    assert to == run / "export" / "step-000002"
    assert json.loads((to / "config.json").read_text())["dtype"] == "float32"
    assert {t.dtype for t in load_file(to / "model.safetensors").values()} == {torch.float32}


def wrong_scale(layer, adapter):
    return 2 * RIGHT_DELTA(layer, adapter)


def skipped(layer, adapter):
    delta = RIGHT_DELTA(layer, adapter)
    return delta * 0 if layer.in_features == 48 else delta  # down_proj


def transposed(layer, adapter):
    delta = RIGHT_DELTA(layer, adapter)
    return delta.T.reshape(delta.shape)


RIGHT_DELTA = peft_layers.Linear.get_delta_weight


@pytest.mark.parametrize(
    ("broken", "named", "dtype"),
    [
        (wrong_scale, "self_attn.q_proj.weight", "fp32"),
        (skipped, "mlp.down_proj.weight", "bf16"),
        (transposed, "self_attn.q_proj.weight", "bf16"),
    ],
)
def test_a_broken_merge_is_refused_by_name_and_leaves_nothing(
    lora_run, tmp_path, monkeypatch, capsys, broken, named, dtype
):
    """However small the adapter is: here its deltas are below the rounding of bf16."""
    source, checkpoint = edited(lora_run, tmp_path / "run")
    file = checkpoint / "adapter_model.safetensors"
    tensors = {n: t * (1e-4 if "lora_B" in n else 1) for n, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    sealed(checkpoint)
    monkeypatch.setattr(peft_layers.Linear, "get_delta_weight", broken)
    words = ["export", str(source), "--merge", "--dtype", dtype, "--to", str(tmp_path / "out" / "merged")]
    assert cohort(words) == 1
    error = capsys.readouterr().err
    assert "the merge is broken: model.layers." in error and f"{named} differs from W + 4 B A" in error
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix != ".lock"]


def test_a_folder_that_is_damaged_on_its_way_to_disk_is_refused(lora_run, tmp_path, monkeypatch):
    def flipped(target, model, folder):
        real(target, model, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"][3] *= -1
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    def misread(target, model, folder):
        real(target, model, folder)
        config = json.loads((folder / "config.json").read_text())
        config["rms_norm_eps"] = 0.1
        (folder / "config.json").write_text(json.dumps(config))

    real = recipes.exports.merging.save_model
    for save, said in (
        (flipped, r"model\.norm\.weight on disk is not what was written"),
        (misread, r"log-probs by the folder and the model that was written differ by"),
    ):
        monkeypatch.setattr(recipes.exports.merging, "save_model", save)
        with pytest.raises(ValueError, match=said):
            export(lora_run, to=tmp_path / "merged", merge=True)
        assert not (tmp_path / "merged").exists()


def test_an_adapter_names_its_base_on_the_hub_with_its_commit(lora_run, tmp_path):
    to = export(lora_run, to=tmp_path / "adapter")
    settings = json.loads((to / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == (HUB_NAME, COMMIT)
    saved = lora_run / "checkpoints" / "step-000002"
    ours, theirs = (logprobs(AutoPeftModelForCausalLM.from_pretrained(f)) for f in (to, saved))
    assert torch.equal(ours, theirs)
    assert_clean(to, lora_run)
    assert not (saved / "README.md").exists()  # nor peft's template in the checkpoint


def test_what_cannot_be_exported_is_refused_by_name(full_run, lora_run, tiny_model_dir, tmp_path, capsys):
    out = ["--to", str(tmp_path / "out")]
    assert cohort(["export", str(full_run), *out, "--merge"]) == 1
    assert "this is a whole model" in capsys.readouterr().err
    assert cohort(["export", str(lora_run), *out, "--dtype", "bf16"]) == 1
    assert "this is an adapter" in capsys.readouterr().err
    source, checkpoint = edited(lora_run, tmp_path / "run")
    settings = json.loads((checkpoint / "adapter_config.json").read_text())
    for change, words, said in (
        ({"use_dora": True}, ["--merge"], "--merge proves plain LoRA only; this adapter has use_dora=True"),
        ({"base_model_name_or_path": str(tiny_model_dir)}, [], "a local folder (model), which only you have"),
    ):
        (checkpoint / "adapter_config.json").write_text(json.dumps(settings | change))
        sealed(checkpoint)
        (source / "inputs.json").write_text("{}")
        assert cohort(["export", str(source), *out, *words]) == 1
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_not_the_one_of_the_run_is_refused(lora_run, tiny_model_dir, tmp_path):
    """A folder whose weights changed after the run began."""
    source, checkpoint = edited(lora_run, tmp_path / "run")
    settings = json.loads((checkpoint / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tiny_model_dir)
    (checkpoint / "adapter_config.json").write_text(json.dumps(settings))
    sealed(checkpoint)
    inputs = json.loads((source / "inputs.json").read_text())
    (source / "inputs.json").write_text(json.dumps(inputs | {"model": {"config.json": "other"}}))
    with pytest.raises(ValueError, match=r"the base /.*model is not what the run began with"):
        export(source, to=tmp_path / "out", merge=True)


def test_the_card_says_what_the_run_was_and_what_it_scored(lora_run, tmp_path):
    to = export(lora_run, to=tmp_path / "step1", checkpoint=1)
    card, text = ModelCard.load(to / "README.md"), (to / "README.md").read_text()
    assert (card.data.base_model, card.data.license, card.data.library_name) == (HUB_NAME, "mit", "peft")
    rows = {row["step"]: row for row in read_rows(lora_run / "evaluation.jsonl")}
    assert f"- step 0: {100 * rows[0]['accuracy']:.1f}% right (95 % interval " in text and "n = 3)" in text
    assert "- step 1: no accuracy" in text  # the run measured steps 0 and 2
    assert f"{HUB_NAME}, revision {COMMIT}" in text and "Cohort for 1 steps" in text
    assert "- License of the base: mit\n" in text and "- Versions in training: python " in text
    assert "every file has the hash" in text and "Control arm" not in text
    fingerprint = json.loads((lora_run / "inputs.json").read_text())["data"]["rows"]
    assert f"<local>/train.jsonl, revision not given, rows and xxh3_128 {fingerprint}" in text
    recipe = yaml.safe_load(text.split("````yaml\n")[1].split("````")[0])
    assert recipe["data"]["source"] == "<local>/train.jsonl" and recipe["model"]["lora"]["alpha"] == 8
    merged = (export(lora_run, to=tmp_path / "merged", merge=True) / "README.md").read_text()
    assert f"- step 2: {100 * rows[2]['accuracy']:.1f}% right" in merged
    assert "every adapted tensor equals W + (alpha / r) B A" in merged


def test_the_card_has_the_numbers_of_cohort_eval_for_these_very_weights(lora_run, tmp_path, capsys):
    for words in (["--checkpoint=1"], [], ["--base"]):
        assert cohort(["eval", str(lora_run), *words]) == 0
    files = {json.loads(p.read_text())["step"]: p for p in Path("evals").glob("*/eval.json")}
    found = json.loads(files[2].read_text())["results"]["toy_rewards:low_words"]["avg"]
    cell = "{:.1f} ({:.1f} to {:.1f})".format(*(100 * found[end] for end in ("value", "low", "high")))
    text = (export(lora_run, to=tmp_path / "out", merge=True) / "README.md").read_text()
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"][2:]
    data = "<local>/heldout.jsonl"
    assert [row[:2] for row in rows] == [[data, "0"], [data, "2"]]
    other = json.loads(files[0].read_text()) | {"digest": "of other weights under the same name"}
    files[0].write_text(json.dumps(other))
    files[1].write_text("{")  # a damaged one stops no export
    text = (export(lora_run, to=tmp_path / "again", merge=True) / "README.md").read_text()
    assert "left out of the card" in capsys.readouterr().out
    assert "| 2 | avg@1" in text and "| 0 | avg@1" not in text
    assert rows[1][2:] == ["avg@1 by toy_rewards:low_words", cell, "3", "0", "1.0"]


def test_a_card_hides_secrets_and_says_what_nobody_knows(full_run, tmp_path):
    source, _ = edited(full_run, tmp_path / "run")
    config = yaml.safe_load((source / "config.yaml").read_text())
    config["data"]["system_prompt"] = "See /home/me/notes/x.txt, hf_abcdefghijklmnopqrstuvwx"
    config["rewards"]["control"] = "random"
    config["data"]["source"] = "https://me:hf_abcdefghijklmnopqrstuvwx@hub.invalid/rows.jsonl"
    config["evaluation"]["data"]["source"] = "file:///home/me/rows.jsonl"
    (source / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [{"step": step, "key": "optimizer.lr", "old": 1e-3, "new": 2e-3} for step in (1, 2)]
    (source / "changes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = (export(source, to=tmp_path / "out") / "README.md").read_text()
    assert "hf_abc" not in text and "/home/me" not in text and "See <local>/x.txt, ***" in text
    assert "License of the base: unknown: fill in" in text and "license: unknown" in text
    assert "a local folder called model: fill in where it comes from" in text
    assert "# after step 1: optimizer.lr 0.001 -> 0.002" in text and "after step 2" not in text
    assert "Control arm: rewards.control=random" in text


def test_a_file_that_would_carry_a_path_away_is_refused_by_name(full_run, tmp_path):
    source, checkpoint = edited(full_run, tmp_path / "run")
    path = checkpoint / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    for local in (str(source), yaml.safe_load((source / "config.yaml").read_text())["model"]["name"]):
        path.write_text(json.dumps(settings | {"note": {"from": f"{local}/x"}}))
        sealed(checkpoint)
        with pytest.raises(ValueError, match=r"tokenizer_config\.json contains the local path /"):
            export(source, to=tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_refused_by_name_and_an_older_one_can_be_asked_for(
    full_run, tmp_path, capsys
):
    source, checkpoint = edited(full_run, tmp_path / "run")
    data = bytearray((checkpoint / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(data)
    words = ["export", str(source), "--to", str(tmp_path / "out")]
    for asked in (words, [*words, "--checkpoint", "2"], ["export", str(checkpoint), *words[2:]]):
        assert cohort(asked) == 1
        assert "step-000002: model.safetensors has changed since it was written" in capsys.readouterr().err
    assert cohort([*words, "--checkpoint", "7"]) == 1
    assert "no checkpoint step-000007; there are: step-000001, step-000002" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cohort([*words, "--checkpoint", "1"]) == 0 and "exported step 1" in capsys.readouterr().out
    assert cohort([*words, "--checkpoint", "1"]) == 1
    assert "out exists; remove it, or use another --to" in capsys.readouterr().err
    assert cohort(["export", str(tmp_path / "typo")]) == 1
    assert "holds no checkpoint" in capsys.readouterr().err and not (tmp_path / "typo").exists()


def test_a_checkpoint_that_a_live_run_removes_while_it_is_copied_is_not_missed(
    full_run, tmp_path, monkeypatch
):
    """The run saves step 3 and removes step 2 behind the first copied file."""
    source, second = edited(full_run, tmp_path / "run")
    third, copytree = second.with_name("step-000003"), shutil.copytree

    def copy_and_prune(file, to):
        shutil.copy2(file, to)
        if second.exists():
            os.rename(second, third)
            (third / "manifest.json").unlink()
            write_manifest(third, 3)

    monkeypatch.setattr(
        recipes.export.shutil, "copytree", lambda *a, **b: copytree(*a, **b, copy_function=copy_and_prune)
    )
    manifest = copy_checkpoint(source, None, tmp_path / "copy")
    assert manifest["step"] == 3 and not (tmp_path / "copy" / "trainer").exists()
    assert load_file(tmp_path / "copy" / "model.safetensors").keys() >= {"model.norm.weight"}


def test_two_exports_at_once_do_not_mix_and_a_killed_one_leaves_no_half(full_run, tmp_path, monkeypatch):
    to, inside, go_on = tmp_path / "out", threading.Event(), threading.Event()
    publish = recipes.export._publish

    def slow(stage, target):
        inside.set()
        assert go_on.wait(60)
        publish(stage, target)

    monkeypatch.setattr(recipes.export, "_publish", slow)
    first = threading.Thread(target=export, args=(full_run,), kwargs={"to": to})
    first.start()
    assert inside.wait(60) and not to.exists()
    with pytest.raises(ValueError, match=f"another process exports to {tmp_path}; wait"):
        export(full_run, to=to)
    go_on.set()
    first.join(60)
    assert (to / "model.safetensors").exists()
    monkeypatch.undo()
    killed = subprocess.run([sys.executable, "-c", KILLED, full_run, tmp_path / "next"], timeout=200)
    assert killed.returncode == 9
    assert (tmp_path / ".exporting-next").is_dir() and not (tmp_path / "next").exists()
    export(full_run, to=tmp_path / "next")
    assert not (tmp_path / ".exporting-next").exists()


@pytest.mark.rotation
@pytest.mark.parametrize("kind", ["full", "merged", "adapter"])
def test_a_run_begins_with_an_export_as_with_its_checkpoint(kind, full_run, lora_run, tmp_path):
    source = full_run if kind == "full" else lora_run
    to = export(source, to=tmp_path / kind, merge=kind == "merged")
    found = []
    for name in (source / "checkpoints" / "step-000002", to):
        tree = yaml.safe_load((source / "config.yaml").read_text())
        tree["model"] |= {"name": str(name), "lora": LORA if kind == "adapter" else None}
        tree |= {"run_dir": str(tmp_path / f"run-{len(found)}")}
        start(tree, train={"steps": 1}, optimizer={"lr": 1e-9})
        rows = read_rows(Path(tree["run_dir"]) / "evaluation.jsonl")
        found.append([(row["step"], row["accuracy"]) for row in rows])
    assert found[0] == found[1] and found[0][0][0] == 0


@pytest.fixture
def push(full_run, tmp_path, monkeypatch, capsys):
    """`cohort export RUN --push` to a server: exit code, and what was said on stdout and stderr."""

    def work(server, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        code = cohort(["export", str(full_run), "--to", str(tmp_path / "out"), "--push", "me/model", *words])
        return code, *capsys.readouterr()

    return work


def test_a_push_sends_the_files_of_the_export_to_a_new_private_repository(push, tmp_path):
    with hub_server() as server:
        code, out, error = push(server)
    assert code == 0, (error, server.requests)
    assert f"pushed: {server.address}/me/model" in out
    assert server.created["visibility"] == "private"
    assert server.tokens == {f"Bearer {TOKEN}"}
    assert server.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert b'from_pretrained("me/model", dtype="auto")' in server.files["README.md"]


def test_nothing_is_sent_without_a_proof_a_token_or_a_new_name(push, full_run, tmp_path, monkeypatch, capsys):
    with hub_server() as server:
        code, _, error = push(server, "--merge")
        assert code == 1 and "this is a whole model" in error and not server.requests
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", lambda *_, **__: None)
        assert push(server)[0] == 1 and not server.requests and not (tmp_path / "out").exists()
        monkeypatch.undo()
    with hub_server(status=409) as server:
        code, _, error = push(server)
    assert code == 1 and "--push me/model, a new repository, failed: " in error and "409 Conflict" in error
    assert not [path for path in server.requests if "/commit/" in path]
    assert f"`hf upload --private me/model {tmp_path / 'out'}` sends it later" in error
    assert (tmp_path / "out" / "model.safetensors").exists()
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    assert cohort(["export", str(full_run), "--to", str(tmp_path / "next"), "--push", "me/model"]) == 1
    assert "--push needs a token that may write" in capsys.readouterr().err
    assert not (tmp_path / "next").exists()
