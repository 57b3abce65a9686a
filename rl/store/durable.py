"""Files that are whole or absent, and the lock that makes one process the only writer of a run folder.

A rename publishes a file at once, but only what was fsynced before it survives a power cut. So data is synced
first, then renamed, then the folder of the name is synced (LWN 457667, "Ensuring data reaches disk").
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

# Some network and user-space file systems refuse to fsync a folder; they order names by themselves.
_FOLDER_FSYNC_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP)
_REMEDIES = {
    (errno.ENOSPC, errno.EDQUOT): "free some space and start again: a run goes on where it stopped",
    (errno.EROFS, errno.EACCES): "set run_dir to a folder that can be written",
    (errno.EEXIST, errno.ENOTDIR): "set run_dir to a folder, or to a name that is free",
}


def with_remedy(error: Exception) -> str:
    """The error as a sentence, with a remedy if it comes from the operating system."""
    number = error.errno if isinstance(error, OSError) else None
    return "; ".join([str(error), *(remedy for numbers, remedy in _REMEDIES.items() if number in numbers)])


def gone(path: Path) -> RuntimeError:
    """The error for a file or folder that disappeared after the run began to write to it."""
    return RuntimeError(
        f"{path} is gone: it, or its folder, was removed, renamed or replaced during the run; put it back "
        "and start again, and the run goes on from its newest checkpoint"
    )


class RunLockedError(ValueError):
    """Another process writes into this run folder."""


def fsync_path(path: Path) -> None:
    """Forces a file's data, or a folder's names, to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if not path.is_dir() or error.errno not in _FOLDER_FSYNC_UNSUPPORTED:
            raise
    finally:
        os.close(fd)


@contextmanager
def written_whole(path: Path, *, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A binary file that appears at `path`, whole and on disk, when the block ends; never if it raises.

    A process killed inside the block leaves `.partial-NAME`, which the next write of that name replaces.
    Links that somebody put under either name are not followed. `mode`, less the umask, says who may read
    the file.

    Raises:
        OSError: the disk is full or fails, or another process writes the same file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, fd = _create_beside(path, mode)
    ours = os.fstat(fd)
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not is_at(partial, ours):
            raise FileExistsError(errno.EEXIST, "another process writes the same file", str(path))
        os.replace(partial, path)
    except BaseException:
        if is_at(partial, ours):
            partial.unlink()
        raise
    fsync_path(path.parent)


def is_at(path: Path, status: os.stat_result, *, follow: bool = False) -> bool:
    """Whether the file of that status is at the path; with `follow`, also if a link there leads to it."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=follow), status)
    except FileNotFoundError:
        return False


def _create_beside(path: Path, mode: int) -> tuple[Path, int]:
    """Creates a new file in the same folder, never opening an existing one; its path and descriptor."""
    usual = path.with_name(f".partial-{path.name}")
    for partial in (usual, usual.with_name(f"{usual.name}-{secrets.token_hex(8)}")):
        with suppress(FileNotFoundError, IsADirectoryError, PermissionError):
            partial.unlink()
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            return partial, os.open(partial, flags, mode)
        except FileExistsError:  # a folder, or another process was quicker
            continue
    raise FileExistsError(errno.EEXIST, "no free name beside the file", str(path))


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Takes the sole right to write into `run_dir` for the block: at once or not at all.

    The kernel holds the lock, so a killed process leaves none behind; `run.lock.json` only names the holder.
    The lock is advisory: it stops only processes that take it too.

    Raises:
        RunLockedError: someone holds it; the message says who.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    lock, holder_file = FileLock(run_dir / "run.lock", timeout=0), run_dir / "run.lock.json"
    try:
        lock.acquire()
    except Timeout:
        raise RunLockedError(
            f"run_dir={run_dir} is being written by {_holder(holder_file)}; two writers would mix their "
            "records. Wait for it to end, stop it, or use another run_dir"
        ) from None
    started = datetime.now(UTC).isoformat(timespec="seconds")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
    try:
        with written_whole(holder_file) as file:
            file.write(json.dumps(holder).encode())
        yield
    finally:
        holder_file.unlink(missing_ok=True)
        lock.release()


def _holder(file: Path) -> str:
    try:
        holder = json.loads(file.read_bytes())
        return f"process {holder['pid']} on {holder['host']}, started {holder['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process (it has not written run.lock.json yet)"
