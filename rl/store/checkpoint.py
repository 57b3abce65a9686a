"""Checkpoints that are whole or absent: staged beside, listed in a manifest, published by one rename.

`RUN/checkpoints/step-000024/` is a plain Hugging Face folder, which `from_pretrained` and vLLM read as it is.
It also has `trainer/` (optimizer, a moving reference, random numbers, counters) and `manifest.json`, which is
written last.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from rl.store.durable import fsync_path
from rl.store.manifest import files_below, find_fault, read_manifest, version_changes, write_manifest
from rl.store.tensors import NonFiniteError, check_finite
from rl.store.trainer_state import TRAINER_FILES, TrainerState, read_trainer_state, write_trainer_state
from rl.types import Team

_PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
_DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
LEFTOVERS = ".*-step-*"  # .staging-, .removed- and .replaced-


class CheckpointWriteError(RuntimeError):
    """A checkpoint could not be written. The earlier ones are untouched: training may go on."""


class CheckpointReadError(ValueError):
    """There are checkpoints, but none of those asked for is whole."""


_FAULTS = {kind.__name__: kind for kind in (CheckpointWriteError, NonFiniteError, RuntimeError)}


@dataclass(slots=True)
class LoadedCheckpoint:
    """A verified checkpoint.

    Attributes:
        path: the folder to load the model from.
        skipped: one sentence for each newer checkpoint that is damaged.
        version_changes: one sentence for each library whose version differs: no bitwise resume then.
    """

    step: int
    path: Path
    trainer_state: TrainerState
    skipped: list[str] = field(default_factory=list)
    version_changes: list[str] = field(default_factory=list)


class CheckpointStore:
    """The checkpoints in folder `root`, such as `RUN/checkpoints`. All ranks save together; each may load.

    What a killed writer left behind is cleared here and before each save, unless a live process is saving.
    """

    def __init__(self, root: str | Path, *, keep: int = 2) -> None:
        assert keep >= 1, "all checkpoints would be deleted"
        self.root = Path(root)
        self.keep = keep
        self._damaged: set[Path] = set()
        self._lock = FileLock(self.root / ".lock", timeout=0, thread_local=False)
        if any(self.root.glob(LEFTOVERS)):
            with suppress(Timeout), self._lock:
                self._clear_leftovers()

    def path(self, step: int) -> Path:
        return self.root / f"step-{step:06d}"

    def save(
        self, step: int, *, write: Callable[[Path], None], state: TrainerState, team: Team, num_bytes: int = 0
    ) -> Path:
        """Publishes the checkpoint of `step`, replacing one of that step, and prunes to the newest `keep`.

        Collective: if processes fail, all raise the error of the lowest rank among them, and none waits for
        a failed one. KeyboardInterrupt and SystemExit propagate in their own process.

        Args:
            write: called on every process; writes its part of model and tokenizer (or adapter) and of the
                optimizer's state, as safetensors and JSON.
            num_bytes: about what all processes together will write; decides whether the first checkpoint
                has room.

        Raises:
            NonFiniteError: a tensor of model or optimizer holds NaN or infinity; nothing is published.
            CheckpointWriteError: the disk is full or fails; nothing is published.
            RuntimeError: another error of one of several processes; nothing is published.
        """
        final, staging = self.path(step), self.root / f".staging-step-{step:06d}"
        on_main = team.rank == 0
        assert state.step == step and state.rng, f"save(step={step}) got another state: {state}"
        try:
            self._together(team, step, lambda: self._begin(step, staging, num_bytes) if on_main else None)
            self._together(team, step, lambda: write(staging))
            self._together(team, step, lambda: self._end(staging, final, state) if on_main else None)
        finally:
            if self._lock.is_locked:
                with suppress(OSError):  # the next start clears them too
                    self._clear_leftovers()
                self._lock.release()
        return final

    def _together(self, team: Team, step: int, work: Callable[[], None]) -> None:
        """Does the work of this process; if that of any process failed, all raise the same error."""
        own, fault = None, None
        try:
            work()
        except BaseException as error:  # of any kind: the other processes wait to be told
            own, fault = error, self._named(error, step)
        told = team.gather(fault and [type(fault).__name__, str(fault)])
        first = next((rank for rank, one in enumerate(told) if one), None)
        if first is None:
            return
        kind, text = told[first]
        first_error = _FAULTS[kind](text if team.size == 1 else f"process {first} of {team.size}: {text}")
        if own is not None and team.size == 1 and kind == RuntimeError.__name__:
            raise own
        if own is None or isinstance(own, Exception):
            raise first_error from own
        own.add_note(str(first_error))
        raise own

    def _named(self, error: BaseException, step: int) -> Exception:
        """An error of this process as one of `_FAULTS`."""
        if isinstance(error, Timeout):
            return CheckpointWriteError(
                f"another process is saving into {self.root}; give each run its own run_dir"
            )
        if isinstance(error, OSError | SafetensorError):
            remedy = "free some space" if _is_disk_full(error) else "check the file system"
            return CheckpointWriteError(
                f"checkpoint of step {step} could not be written to {self.root}: {error}; {remedy}; "
                "the earlier checkpoints are untouched"
            )
        is_named = isinstance(error, CheckpointWriteError | NonFiniteError)
        return error if is_named else RuntimeError(f"{type(error).__name__}: {error}")

    def _begin(self, step: int, staging: Path, num_bytes: int) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self._require_space(step, num_bytes)
        self._lock.acquire()
        self._clear_leftovers()
        staging.mkdir()

    def _end(self, staging: Path, final: Path, state: TrainerState) -> None:
        """Checks what was written, adds what the main process keeps, and publishes it."""
        _check_model(staging, state.step)
        write_trainer_state(staging, state)
        # safetensors makes files that only their owner can read, whatever the umask says.
        mode = (staging / "trainer" / "state.json").stat().st_mode
        for path in files_below(staging):
            path.chmod(mode)
        write_manifest(staging, state.step)
        self._publish(staging, final)
        self._prune(final)

    def load_newest(self) -> LoadedCheckpoint | None:
        """The newest checkpoint whose files are all there and unchanged; None if there are none at all.

        Newest by the step in the manifest: file times mean nothing after a copy.

        Raises:
            CheckpointReadError: there are checkpoints, but all are damaged. It never silently starts over.
        """
        skipped: list[str] = []
        for folder in self._newest_first():
            try:
                return replace(self.load(folder), skipped=skipped)
            except CheckpointReadError as error:
                self._damaged.add(folder)
                skipped.append(str(error))
        if not skipped:
            return None
        reasons = "\n  ".join(skipped)
        raise CheckpointReadError(
            f"no checkpoint in {self.root} can be used:\n  {reasons}\n"
            "Copy a whole one back, or move the folder away to start from step 0"
        )

    def load(self, folder: str | Path) -> LoadedCheckpoint:
        """Loads the checkpoint in `folder`; other ranks call it with the path that rank 0 found.

        Raises:
            CheckpointReadError: it is damaged.
        """
        folder = Path(folder)
        if fault := find_fault(folder, TRAINER_FILES):
            raise CheckpointReadError(f"{folder.name}: {fault}")
        manifest = read_manifest(folder)
        return LoadedCheckpoint(
            step=manifest["step"],
            path=folder,
            trainer_state=read_trainer_state(folder),
            version_changes=version_changes(manifest["versions"]),
        )

    def _newest_first(self) -> list[Path]:
        steps = {folder: _step_of(folder) for folder in self.root.glob("step-*") if folder.is_dir()}
        return sorted(steps, key=lambda folder: (steps[folder], folder.name), reverse=True)

    def _publish(self, staging: Path, final: Path) -> None:
        """Publishes by one rename. One of the same step moves aside first, and comes back after a failure."""
        aside = self.root / f".replaced-{final.name}"
        if final.exists():
            os.rename(final, aside)
        os.rename(staging, final)
        fsync_path(self.root)
        self._damaged.discard(final)
        shutil.rmtree(aside, ignore_errors=True)

    def _prune(self, published: Path) -> None:
        """Removes whole checkpoints beyond the newest `keep`, `published` among them; leaves damaged ones."""
        others = [folder for folder in self._newest_first() if folder not in self._damaged | {published}]
        whole = [folder for folder in others if find_fault(folder, TRAINER_FILES, quick=True) is None]
        for folder in whole[self.keep - 1 :]:
            removed = self.root / f".removed-{folder.name}"
            with suppress(OSError):
                # Renamed first: a half-deleted folder must not look like a damaged checkpoint.
                os.rename(folder, removed)
                shutil.rmtree(removed, ignore_errors=True)

    def _clear_leftovers(self) -> None:
        for path in list(self.root.glob(LEFTOVERS)):
            final = self.root / path.name.removeprefix(".replaced-")
            if path.name.startswith(".replaced-") and not final.exists():
                os.rename(path, final)
            else:
                shutil.rmtree(path, ignore_errors=True)

    def _require_space(self, step: int, num_bytes: int) -> None:
        """Raises CheckpointWriteError unless the newest checkpoint's size, or else `num_bytes`, is free."""
        needed = num_bytes
        for folder in self._newest_first():
            with suppress(ValueError, OSError):
                needed = sum(entry["size"] for entry in read_manifest(folder)["files"].values())
                break
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise CheckpointWriteError(
                f"checkpoint of step {step} needs about {needed / 2**30:,.3f} GiB, but {self.root} has "
                f"{free / 2**30:,.3f} GiB free; free some space; the earlier checkpoints are untouched"
            )


def _check_model(staging: Path, step: int) -> None:
    """The model's files are safetensors, and finite; those of the optimizer were checked as written."""
    pickles = [path.name for path in files_below(staging) if path.suffix in _PICKLES]
    assert not pickles, f"{pickles} were written; a checkpoint holds safetensors and JSON, no pickles"
    files = list(staging.glob("*.safetensors"))
    assert files, "no safetensors file of the model was written"
    for path in files:
        with safe_open(path, framework="pt") as file:
            tensors = ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
            check_finite(tensors, f"{path.name} of step {step}")


def _step_of(folder: Path) -> int:
    """The manifest's step, or the folder name's (-1 if it has none) where the manifest is damaged."""
    try:
        return read_manifest(folder)["step"]
    except (OSError, ValueError):
        digits = folder.name.removeprefix("step-")
        return int(digits) if digits.isdecimal() else -1


def _is_disk_full(error: Exception) -> bool:
    # safetensors gives the system's error number in its text only.
    number = error.errno if isinstance(error, OSError) else re.search(r"os error (\d+)", str(error))
    return (int(number[1]) if isinstance(number, re.Match) else number) in _DISK_FULL
