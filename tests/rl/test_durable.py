"""One writer per run folder, and files that are whole or absent."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rl.store.durable import RunLockedError, fsync_path, run_lock, written_whole

HOLDER = """
import os, sys, time
from pathlib import Path
from rl.store.durable import run_lock
with run_lock(Path(sys.argv[1])):
    child = os.fork() if sys.argv[2] == "fork" else 0
    if sys.argv[2] != "fork":
        print(0, flush=True)
    elif not child:  # printed by the child: it runs by now, its at-fork handlers included
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def start_holder(folder: Path, kind: str) -> tuple[subprocess.Popen, int]:
    """A process that holds the lock, and the process id of its child (0 without)."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOLDER, str(folder), kind]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_a_second_process_is_refused_and_told_who_holds_the_run(tmp_path):
    process, _ = start_holder(tmp_path, "plain")
    try:
        with pytest.raises(RunLockedError) as error, run_lock(tmp_path):
            pass
    finally:
        process.kill()
        process.wait()
    text = str(error.value)
    who = f"is being written by process {process.pid} on {socket.gethostname()}, started 2"
    assert text.startswith(f"run_dir={tmp_path} {who}")
    assert text.endswith("Wait for it to end, stop it, or use another run_dir")


@pytest.mark.parametrize("kind", ["plain", "fork"])
def test_a_killed_holder_leaves_no_lock_even_if_its_forked_child_lives_on(tmp_path, kind):
    process, child = start_holder(tmp_path, kind)
    try:
        process.kill()
        process.wait()
        assert (tmp_path / "run.lock.json").exists()
        with run_lock(tmp_path):
            pass
    finally:
        if child:
            os.kill(child, signal.SIGKILL)


def test_the_lock_is_exclusive_within_a_process_and_free_after_release(tmp_path):
    run = tmp_path / "run"
    with run_lock(run):
        with pytest.raises(RunLockedError, match=f"process {os.getpid()} on"), run_lock(run):
            pass
        assert (run / "run.lock.json").exists()  # the refused one has not removed the holder's
    assert not (run / "run.lock.json").exists()
    with run_lock(run):
        pass


def test_a_file_is_absent_or_old_until_its_block_ends(tmp_path):
    path = tmp_path / "folder" / "record"
    with pytest.raises(KeyError), written_whole(path) as file:
        file.write(b"half")
        raise KeyError
    assert list(path.parent.iterdir()) == []
    with written_whole(path) as file:
        file.write(b"old")
    with written_whole(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in path.parent.iterdir()] == ["record"]


def test_a_file_is_on_disk_before_it_has_its_name_and_the_folder_after(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    where = lambda fd: Path(os.readlink(f"/proc/self/fd/{fd}")).name  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(where(fd)), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b))[1])
    with written_whole(tmp_path / "record") as file:
        file.write(b"x")
    assert calls == [".partial-record", "rename", tmp_path.name]


@pytest.mark.parametrize(("number", "raises"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_folder_that_can_not_be_fsynced_is_no_error_but_a_failing_disk_is(
    tmp_path, monkeypatch, number, raises
):
    def refuse(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        fsync_path(tmp_path / "file")
    if raises:
        with pytest.raises(OSError):
            fsync_path(tmp_path)
    else:
        fsync_path(tmp_path)


def test_the_lock_costs_no_torch():
    started = time.monotonic()
    command = [
        sys.executable,
        "-c",
        "import rl.store.durable, rl.store.ledger, sys; print('torch' in sys.modules)",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", (done.stderr, time.monotonic() - started)
