"""Exports a checkpoint as a clean Hugging Face folder: proved, whole, without optimizer or local paths."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from huggingface_hub import HfApi, get_token

from recipes.exports.card import ABSOLUTE, is_local, write_card
from recipes.exports.merging import DTYPES, write_proved
from rl.config.bounded_yaml import read_yaml
from rl.model.adapter_folder import find_adapter, read_settings
from rl.model.loading import first_line
from rl.store.durable import fsync_path
from rl.store.inputs import MODEL_FILES, fingerprints
from rl.store.manifest import digest_of, files_below, hash_file, read_manifest

MASKED = {"diffusion", "objective"}  # sections of the configs of diffusion models


def export(
    source: Path,
    *,
    to: Path | None = None,
    checkpoint: int | None = None,
    merge: bool = False,
    dtype: str | None = None,
    push: str | None = None,
) -> Path:
    """Exports a run or RUN/checkpoints/step-N, pushes the export if asked to, and returns its folder.

    Raises:
        ValueError: a checkpoint is damaged, a proof fails, or the target exists; nothing is left there.
    """
    if push and get_token() is None:
        raise ValueError("--push needs a token that may write: `hf auth login`, or set HF_TOKEN")
    run = source.expanduser().resolve()
    if run.parent.name == "checkpoints" and (digits := run.name.removeprefix("step-")).isdecimal():
        run, checkpoint = run.parents[1], int(digits)
    if not (run / "checkpoints").is_dir():
        raise ValueError(f"{source} holds no checkpoint; give the folder of a run that has saved one")
    target = to.expanduser().absolute() if to else run / "export" / "run"
    with _staging(target.parent / f".exporting-{target.name}") as scratch:
        copy, stage = scratch / "source", scratch / "stage"
        manifest = copy_checkpoint(run, checkpoint, copy)
        words = [f"step-{manifest['step']:06d}", "merged" if merge else None, dtype]
        target = target if to else target.with_name("-".join(filter(None, words)))
        if os.path.lexists(target):
            raise ValueError(f"{target} exists; remove it, or use another --to")
        config = read_yaml(run / "config.yaml")
        facts = {"manifest": manifest, "config": config, "masked": bool(config.keys() & MASKED)}
        facts |= _write(copy, stage, run, masked=facts["masked"], merge=merge, dtype=dtype)
        write_card(stage, run, facts, name=push or target.name)
        local = {str(run), str(scratch), *ABSOLUTE.findall(json.dumps(config, ensure_ascii=False))}
        check_clean(stage, local)
        _publish(stage, target)
    gap = f", log-probs within {facts['gap']:.2g} nats" if "gap" in facts else ""
    print(f"exported step {manifest['step']} ({facts['form']}{gap}): {target}")
    if push:
        try:
            address = HfApi().create_repo(push, private=True)
            HfApi().upload_folder(repo_id=push, folder_path=target, commit_message="Export from cohort")
        except Exception as error:  # errors of the hub, or of its library's HTTP client
            raise ValueError(
                f"--push {push}, a new repository, failed: {first_line(error)} The export is complete; "
                f"`hf upload --private {push} {target}` sends it later, also to an existing repository"
            ) from error
        print(f"pushed: {address}")
    return target


def copy_checkpoint(run: Path, step: int | None, folder: Path) -> dict[str, Any]:
    """Copies the newest checkpoint, or that of `step`, without the trainer's state, and returns its manifest.
    Raises ValueError if there is none, or if a copy does not have its hash.
    """
    for _ in range(3):  # a live run may remove it meanwhile
        there = sorted(path.name for path in run.glob("checkpoints/step-*"))
        name = f"step-{step:06d}" if step is not None else there[-1] if there else "step-N"
        if name not in there:
            raise ValueError(f"{run} holds no checkpoint {name}; there are: {', '.join(there) or 'none'}")
        shutil.rmtree(folder, ignore_errors=True)
        found = run / "checkpoints" / name
        try:
            shutil.copytree(found, folder, ignore=shutil.ignore_patterns("trainer"))
            manifest = read_manifest(folder)
            for file, entry in manifest["files"].items():
                if not file.startswith("trainer/") and hash_file(folder / file) != entry["xxh3_128"]:
                    raise ValueError(f"{file} has changed since it was written (its hash differs)")
            (folder / "manifest.json").unlink()
            return manifest
        except (OSError, ValueError) as error:
            if found.is_dir():
                raise ValueError(f"{name}: {error}; copy it back, or use --checkpoint N") from error
    raise ValueError(f"{run} removes its checkpoints faster than they are copied; raise checkpoint.keep")


def _write(
    source: Path, stage: Path, run: Path, *, masked: bool, merge: bool, dtype: str | None
) -> dict[str, Any]:
    """Writes all except the card; returns the form, the base, a digest of the weights and what was proved.

    An adapter without --merge and a diffusion model are exported as they are: their hashes are the proof.
    """
    adapter, inputs = find_adapter(str(source), None), read_settings(run / "inputs.json")
    own = below = fingerprints(str(source), None, {})["model"]
    began = (adapter and inputs.get("base model")) or inputs.get("model") or {}
    facts: dict[str, Any] = {"form": "adapter" if adapter else "model", "revision": began.get("commit")}
    if adapter:
        revision = (None if is_local(adapter.base) else facts["revision"]) or adapter.revision
        below = fingerprints(adapter.base, None, {}, revision=revision).get("model")
        if "base model" not in inputs and below and began and below != began:
            raise ValueError(f"the base {adapter.base} is not what the run began with; restore that")
        adapter = replace(adapter, settings=adapter.settings | {"revision": revision})
        (source / "adapter_config.json").write_text(json.dumps(adapter.settings, indent=2) + "\n")
        facts |= {"base": adapter.base, "revision": revision}
    facts["digest"] = digest_of([own, below])  # as cohort eval
    as_it_is = masked or (adapter is not None and not merge)
    if (merge and (as_it_is or not adapter)) or (dtype and as_it_is):
        raise ValueError(
            "--merge needs the LoRA adapter of a causal model, --dtype a merged or whole causal model, and "
            f"this is {'a diffusion model' if masked else 'an adapter' if adapter else 'a whole model'}"
        )
    if as_it_is and adapter and is_local(adapter.base):
        raise ValueError(
            f"this adapter belongs to a local folder ({Path(adapter.base).name}), which only you have; "
            "write the whole model with --merge"
        )
    if as_it_is:
        os.rename(source, stage)
        return facts
    facts |= write_proved(stage, source, adapter, DTYPES.get(dtype or ""))
    for path in files_below(source):
        if not MODEL_FILES.fullmatch(path.name):
            shutil.copyfile(path, stage / path.name)
    return facts


def check_clean(stage: Path, local: set[str]) -> None:
    """Raises ValueError if a file holds a local path; of safetensors files only the header is read."""
    for path in files_below(stage):
        with path.open("rb") as file:
            is_tensors = path.suffix == ".safetensors"
            text = file.read(int.from_bytes(file.read(8), "little")) if is_tensors else file.read()
        if hits := [name for name in local if name.encode() in text]:
            raise ValueError(f"{path.name} contains the local path {hits[0]}; remove it from this file")


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """An empty folder for this process alone; what a killed export left there is removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{folder}.lock", timeout=0):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except Timeout:
        raise ValueError(f"another process exports to {folder.parent}; wait, or use another --to") from None


def _publish(stage: Path, target: Path) -> None:
    for path in files_below(stage):
        path.chmod((stage / "README.md").stat().st_mode)  # safetensors makes files for their owner only
        fsync_path(path)
    fsync_path(stage)
    os.rename(stage, target)
    fsync_path(target.parent)
