"""Checkpoints: what is loaded is what was saved, and a damaged one is never loaded."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from rl.store.checkpoint import (
    CheckpointReadError,
    CheckpointStore,
    CheckpointWriteError,
    NonFiniteError,
    TrainerState,
)
from rl.store.manifest import version_changes, write_manifest
from rl.store.optimizer_state import load_optimizer, optimizer_writer
from rl.store.trainer_state import capture_rng
from rl.types import ALONE

FILES = [
    "config.json",
    "model.safetensors",
    "trainer/optimizer.json",
    "trainer/optimizer.safetensors",
    "trainer/rng.json",
    "trainer/rng.safetensors",
    "trainer/state.json",
]


def model_of(step: int, value: float | None = None, moment: float | None = None):
    parameter = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = torch.optim.AdamW([parameter], lr=1e-6)
    moments = torch.full((4, 4), step / 3)
    moments[1, 2] = step / 3 if moment is None else moment
    optimizer.state[parameter] = {"exp_avg": moments, "step": torch.tensor(float(step))}

    def write(folder: Path) -> None:
        save_file({"w": torch.full((4, 4), step if value is None else value)}, folder / "model.safetensors")
        (folder / "config.json").write_text('{"model_type": "llama"}')
        optimizer_writer(optimizer, [("w", parameter)])(folder)

    return write


def state_of(step: int, **counters) -> TrainerState:
    return TrainerState(
        step=step,
        rng={"rank0": capture_rng(), "rank1": {"torch": torch.arange(5, dtype=torch.uint8)}},
        counters={"cursor": 8 * step, "policy_version": step, **counters},
    )


def save(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.save(step, write=model_of(step), state=state_of(step), team=ALONE)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name != ".lock")


def newest(root: Path):
    loaded = CheckpointStore(root).load_newest()
    assert loaded is not None
    return loaded


def test_a_checkpoint_loads_back_as_it_was_saved(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    path = CheckpointStore(root).save(24, write=model_of(24), state=state_of(24, bad_steps=1), team=ALONE)
    assert path == root / "step-000024"
    found = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    assert found == sorted([*FILES, "manifest.json"])

    loaded = newest(root)
    assert (loaded.step, loaded.path, loaded.skipped, loaded.version_changes) == (24, path, [], [])
    state = loaded.trainer_state
    assert state.step == 24
    assert state.counters == {"cursor": 192, "policy_version": 24, "bad_steps": 1}
    parameter = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = torch.optim.AdamW([parameter], lr=1.0, betas=(0.1, 0.2))
    load_optimizer(path, optimizer, [("w", parameter)])
    assert torch.equal(optimizer.state[parameter]["exp_avg"], torch.full((4, 4), 8.0))
    assert torch.equal(optimizer.state[parameter]["step"], torch.tensor(24.0))
    # JSON has no tuples, and the betas are one again.
    assert [optimizer.param_groups[0][key] for key in ("lr", "betas")] == [1e-6, (0.9, 0.999)]
    assert torch.equal(state.rng["rank1"]["torch"], torch.arange(5, dtype=torch.uint8))


def test_transformers_and_peft_read_the_folder_as_it_is(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    store = CheckpointStore(tmp_path)
    full = store.save(1, write=model.save_pretrained, state=state_of(1), team=ALONE)
    ids = torch.tensor([[3, 1, 4]])
    expected = model(ids).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(full)(ids).logits, expected)

    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapter = store.save(2, write=tuned.save_pretrained, state=state_of(2), team=ALONE)
    expected = tuned(ids).logits
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(full), adapter)
    assert torch.equal(again(ids).logits, expected)


def test_all_files_have_the_mode_that_the_umask_gives(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    save(CheckpointStore(tmp_path), 1)
    modes = {file.stat().st_mode for file in (tmp_path / "step-000001").rglob("*") if file.is_file()}
    assert modes == {plain.stat().st_mode}


def test_no_checkpoints_is_none_and_leaves_no_folder(tmp_path):
    assert CheckpointStore(tmp_path / "checkpoints").load_newest() is None
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_file_means_the_checkpoint_before(tmp_path, name, damage):
    save(CheckpointStore(tmp_path), 1, 2)
    path = tmp_path / "step-000002" / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[:-1])
    else:
        path.unlink()

    loaded = newest(tmp_path)
    assert loaded.step == 1
    assert torch.equal(load_file(loaded.path / "model.safetensors")["w"], torch.full((4, 4), 1.0))
    [reason] = loaded.skipped
    assert reason.startswith(f"step-000002: {name}")
    if damage == "delete":
        assert reason.endswith("is missing")


def test_flipped_bits_all_over_the_manifest_are_noticed(tmp_path):
    save(CheckpointStore(tmp_path), 1)
    path = tmp_path / "step-000001" / "manifest.json"
    whole = path.read_bytes()
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(CheckpointReadError, match=r"manifest\.json"):
            CheckpointStore(tmp_path).load_newest()
    path.write_bytes(whole)
    assert newest(tmp_path).step == 1


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("optimizer.safetensors", "optimizer state"),
        ("rng.safetensors", "random number state"),
    ],
)
def test_missing_trainer_state_is_named_and_never_started_without(tmp_path, name, meaning):
    save(CheckpointStore(tmp_path), 1)
    (tmp_path / "step-000001" / "trainer" / name).unlink()
    with pytest.raises(CheckpointReadError, match=rf"step-000001: trainer/{name} \({meaning}\) is missing"):
        CheckpointStore(tmp_path).load_newest()
    # A manifest that never listed it is not an excuse.
    write_manifest(tmp_path / "step-000001", 1)
    with pytest.raises(CheckpointReadError, match=rf"lists no trainer/{name} \({meaning}\)"):
        CheckpointStore(tmp_path).load_newest()


def test_when_all_are_damaged_the_error_lists_each_with_its_reason(tmp_path):
    save(CheckpointStore(tmp_path), 1, 2)
    (tmp_path / "step-000001" / "model.safetensors").unlink()
    (tmp_path / "step-000002" / "manifest.json").write_text("{")
    (tmp_path / "step-000003").mkdir()
    with pytest.raises(CheckpointReadError) as error:
        CheckpointStore(tmp_path).load_newest()
    lines = str(error.value).splitlines()
    assert lines[1].strip() == "step-000003: manifest.json is missing"
    assert lines[2].strip().startswith("step-000002: manifest.json is damaged (JSONDecodeError")
    assert lines[3].strip() == "step-000001: model.safetensors is missing"
    assert lines[4] == "Copy a whole one back, or move the folder away to start from step 0"


def test_newest_is_the_manifests_step_whatever_times_and_names_say(tmp_path):
    save(CheckpointStore(tmp_path, keep=4), 2, 9, 10, 999_999)
    os.rename(tmp_path / "step-999999", tmp_path / "step-000001-copy")
    for folder in tmp_path.glob("step-*"):
        when = random.Random(folder.name).randrange(1_000_000_000)
        for path in (*folder.rglob("*"), folder):
            os.utime(path, (when, when))
    assert newest(tmp_path).step == 999_999
    shutil.rmtree(tmp_path / "step-000001-copy")
    assert newest(tmp_path).step == 10


def test_a_manifest_of_a_newer_schema_is_refused_and_not_deleted(tmp_path):
    save(CheckpointStore(tmp_path), 1)
    path = tmp_path / "step-000001" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 2}))
    store = CheckpointStore(tmp_path, keep=1)
    with pytest.raises(CheckpointReadError, match="schema 2, this version of cohort reads 1"):
        store.load_newest()
    save(store, 2, 3)
    assert names(tmp_path) == ["step-000001", "step-000003"]


def test_a_changed_library_version_is_reported():
    saved = {"torch": "1.0", "python": "2.7", "unknown": "3"}
    changes = version_changes(saved)
    assert f"torch was 1.0 and is {torch.__version__}" in changes
    assert "unknown was 3 and is absent" in changes


def test_pruning_keeps_the_newest_two(tmp_path):
    save(CheckpointStore(tmp_path), 1, 2, 3)
    assert names(tmp_path) == ["step-000002", "step-000003"]


def test_pruning_keeps_two_whole_ones_when_a_newer_is_damaged(tmp_path):
    save(CheckpointStore(tmp_path), 1, 2)
    (tmp_path / "step-000002" / "model.safetensors").write_bytes(b"")
    save(CheckpointStore(tmp_path), 3)
    assert names(tmp_path) == ["step-000001", "step-000002", "step-000003"]
    shutil.rmtree(tmp_path / "step-000003")
    assert newest(tmp_path).step == 1


def test_pruning_never_removes_the_only_whole_one(tmp_path):
    # A flipped bit keeps the size, so only `load_newest` can know that steps 20 and 30 are damaged.
    save(CheckpointStore(tmp_path, keep=3), 10, 20, 30)
    for step in (20, 30):
        path = tmp_path / f"step-{step:06d}" / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    store = CheckpointStore(tmp_path, keep=1)
    loaded = store.load_newest()
    assert loaded is not None and loaded.step == 10
    save(store, 11)
    assert newest(tmp_path).step == 11
    assert names(tmp_path) == ["step-000011", "step-000020", "step-000030"]


def test_a_step_saved_again_replaces_what_was_there(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, write=model_of(1), state=state_of(1, take=1), team=ALONE)
    store.save(1, write=model_of(1), state=state_of(1, take=2), team=ALONE)
    assert newest(tmp_path).trainer_state.counters["take"] == 2
    assert names(tmp_path) == ["step-000001"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nothing_non_finite_is_saved(tmp_path, value):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    with pytest.raises(
        NonFiniteError, match=r"model\.safetensors of step 2: NaN or infinity in w \(16 of 16"
    ):
        store.save(2, write=model_of(2, value), state=state_of(2), team=ALONE)
    with pytest.raises(NonFiniteError, match=r"optimizer state: .* optimizer/state/w/exp_avg \(1 of 16"):
        store.save(2, write=model_of(2, moment=value), state=state_of(2), team=ALONE)
    with pytest.raises(NonFiniteError, match="counters/loss is"):
        store.save(2, write=model_of(2), state=state_of(2, loss=value), team=ALONE)
    assert names(tmp_path) == ["step-000001"]


def test_pickles_and_empty_models_are_refused(tmp_path):
    store = CheckpointStore(tmp_path)
    with pytest.raises(
        AssertionError, match=r"\['weights\.bin'\] were written; a checkpoint holds safetensors and JSON"
    ):
        store.save(1, write=lambda f: (f / "weights.bin").touch(), state=state_of(1), team=ALONE)
    with pytest.raises(AssertionError, match="no safetensors file of the model"):
        store.save(1, write=lambda f: None, state=state_of(1), team=ALONE)
    assert names(tmp_path) == []


def test_a_state_of_another_step_or_without_random_numbers_is_refused(tmp_path):
    with pytest.raises(AssertionError, match=r"save\(step=2\) got another state: TrainerState\(step=1"):
        CheckpointStore(tmp_path).save(2, write=model_of(2), state=state_of(1), team=ALONE)
    state = state_of(2)
    state.rng = {}
    with pytest.raises(AssertionError, match=r"rng=\{\}"):
        CheckpointStore(tmp_path).save(2, write=model_of(2), state=state, team=ALONE)


def test_too_little_free_space_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    size = sum(
        f.stat().st_size
        for f in (tmp_path / "step-000001").rglob("*")
        if f.name != "manifest.json" and f.is_file()
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, size - 1))
    with pytest.raises(CheckpointWriteError, match=r"needs about .* GiB free; free some space"):
        store.save(2, write=lambda folder: pytest.fail("wrote"), state=state_of(2), team=ALONE)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, size))
    save(store, 2)


def test_leftovers_are_cleared_at_start_unless_a_live_process_is_saving(tmp_path):
    save(CheckpointStore(tmp_path), 1)
    for kind in ("staging", "removed", "replaced"):
        shutil.copytree(tmp_path / "step-000001", tmp_path / f".{kind}-step-000001")
    with FileLock(tmp_path / ".lock"):
        store = CheckpointStore(tmp_path)
        assert len(names(tmp_path)) == 4
        with pytest.raises(CheckpointWriteError, match="another process is saving"):
            save(store, 2)
    assert newest(tmp_path).step == 1
    assert names(tmp_path) == ["step-000001"]


def test_every_file_and_folder_is_on_disk_before_the_rename_and_the_parent_after(tmp_path, monkeypatch):
    calls: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(fd: int) -> None:
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    def recorded_rename(source, target) -> None:
        calls.append(("rename", str(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    save(CheckpointStore(tmp_path), 1)
    staging = tmp_path / ".staging-step-000001"
    before = [path for kind, path in calls[: calls.index(("rename", str(tmp_path / "step-000001")))]]
    assert sorted(before[: len(FILES)]) == sorted(str(staging / name) for name in FILES)
    assert before[len(FILES) :] == [str(staging / "manifest.json"), str(staging / "trainer"), str(staging)]
    assert calls[-1] == ("fsync", str(tmp_path))
