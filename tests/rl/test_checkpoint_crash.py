"""Checkpoints under kill -9 at every point, and on a full disk.

This file is also the program that is killed: it imports torch once and forks a child for each point of death.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rl.store.checkpoint import CheckpointStore, CheckpointWriteError, TrainerState
from rl.store.manifest import find_fault
from rl.store.optimizer_state import optimizer_writer
from rl.store.tensors import TensorFiles
from rl.store.trainer_state import capture_rng
from rl.types import ALONE


def save(store: CheckpointStore, step: int, *, take: int = 1) -> None:
    parameter = torch.nn.Parameter(torch.zeros(20, 20))
    optimizer = torch.optim.SGD([parameter])
    optimizer.state[parameter] = {"exp_avg": torch.full((20, 20), float(take))}

    def write(folder: Path) -> None:
        save_file({"w": torch.full((8, 8), float(step))}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        optimizer_writer(optimizer, [("w", parameter)])(folder)

    state = TrainerState(step, rng={"rank0": capture_rng()}, counters={"take": take})
    store.save(step, write=write, state=state, team=ALONE)


def die_before_call(number: int) -> None:
    """Kills this process before its `number`-th call (from 0) that opens, names, removes or fsyncs."""
    left = [number]

    def count(event: str, _arguments: object = None) -> None:
        if event in {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.fsync"}:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1

    fsync = os.fsync
    os.fsync = lambda fd: (count("os.fsync"), fsync(fd))[1]
    sys.addaudithook(count)


def die_after_bytes(number: int, name: str) -> None:
    """From the opening of file `name`, the kernel kills at the first file that outgrows `number` bytes."""

    def limit(event: str, arguments: tuple) -> None:
        if event == "open" and str(arguments[0]).endswith(name) and arguments[1] in ("w", "wb"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (number, resource.RLIM_INFINITY))

    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if name:
        sys.addaudithook(limit)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (number, resource.RLIM_INFINITY))


def in_child(action: Callable[[], None]) -> int:
    """Runs `action` in a fork; returns the signal that ended it, 0 if it came to its end, -1 if it raised."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def folders(root: Path) -> list[str]:
    """Names of what is in a store, with the fault of a checkpoint that is damaged."""
    paths = sorted(path for path in root.iterdir() if path.name != ".lock")
    return [f"{path.name} {find_fault(path, {}) or ''}".strip() for path in paths]


def outcome(base: Path, work: Path, step: int, prepare: Callable[[], None]) -> list:
    """[signal, step loaded afterwards, take loaded, names in the folder] of one death."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(base, work)

    def action() -> None:
        store = CheckpointStore(work, keep=1)
        prepare()
        save(store, step, take=2)

    ended = in_child(action)
    store = CheckpointStore(work, keep=1)
    loaded = store.load_newest()
    names = folders(work)
    if loaded is None:
        return [ended, None, None, names]
    state = loaded.trainer_state
    moments = TensorFiles(loaded.path, "optimizer").read("optimizer/state/w/exp_avg")
    whole = bool((moments == state.counters["take"]).all())
    return [ended, loaded.step, state.counters["take"] if whole else None, names]


def full_disk(base: Path, work: Path, step: int, number: int) -> list:
    """[error, names after it, names after the next save] when no file can grow beyond `number` bytes."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(base, work)
    store = CheckpointStore(work, keep=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, resource.RLIM_INFINITY))
    try:
        save(store, step, take=2)
        error = ""
    except CheckpointWriteError as raised:
        error = str(raised)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    after = folders(work)
    save(store, step, take=3)
    return [error, after, folders(work)]


def main(folder: Path) -> None:
    base, work = folder / "base", folder / "work"
    torch.set_num_threads(1)
    save(CheckpointStore(base, keep=1), 1)
    results: dict[str, list] = {}
    for name, step in (("publish", 2), ("replace", 1)):
        deaths = results[name] = []
        while not deaths or deaths[-1][0] != 0:
            deaths.append(outcome(base, work, step, partial(die_before_call, len(deaths))))
    # The largest file, rng.safetensors, has about 15 KB; manifest.json about 2.
    points = [(n, "") for n in range(0, 20_000, 800)] + [(n, "manifest.json") for n in range(0, 2_000, 100)]
    results["bytes"] = [outcome(base, work, 2, partial(die_after_bytes, *point)) for point in points]
    results["full"] = [full_disk(base, work, 2, number) for number in range(0, 20_000, 2_000)]
    print(json.dumps(results))


@pytest.fixture(scope="module")
def results() -> dict[str, list]:
    # A kill does not need a real disk, and thousands of fsyncs are slow on one.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        command = [sys.executable, __file__, folder]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_killed_at_any_call_the_checkpoint_before_or_the_new_one_loads(results):
    *killed, finished = results["publish"]
    assert finished == [0, 2, 2, ["step-000002"]]
    # 9 files, 2 folders and the root are each fsynced at least, and the old checkpoint's files are removed.
    assert len(killed) > 30
    assert {ended for ended, *_ in killed} == {signal.SIGKILL}
    before = [["step-000001"]] * [step for _, step, *_ in killed].index(2)
    after = [names for *_, names in killed[len(before) :]]
    assert [result[1:] for result in killed[: len(before)]] == [[1, 1, names] for names in before]
    assert [result[1:3] for result in killed[len(before) :]] == [[2, 2]] * len(after)
    # Between publishing the new and removing the old there are two; never a staging folder, never none.
    assert all(names in (["step-000001", "step-000002"], ["step-000002"]) for names in after)
    assert ["step-000001", "step-000002"] in after and len(before) > 20


def test_killed_while_a_step_is_saved_again_one_of_the_two_loads(results):
    *killed, finished = results["replace"]
    assert finished == [0, 1, 2, ["step-000001"]]
    takes = [take for _, _, take, _ in killed]
    assert set(takes) == {1, 2} and takes == sorted(takes)
    assert all(result[1] == 1 and result[3] == ["step-000001"] for result in killed)


def test_killed_in_the_middle_of_a_file_the_checkpoint_before_loads(results):
    killed = [result for result in results["bytes"] if result[0] == signal.SIGXFSZ]
    survived = [result for result in results["bytes"] if result[0] != signal.SIGXFSZ]
    assert all(result[1:] == [1, 1, ["step-000001"]] for result in killed)
    # A limit beyond the largest file kills nothing.
    assert len(killed) > 30 and survived
    assert all(result == [0, 2, 2, ["step-000002"]] for result in survived)
    # The 20 points within the manifest are the last.
    assert results["bytes"][-20][0] == signal.SIGXFSZ


def test_a_full_disk_is_a_named_error_that_leaves_the_checkpoint_before(results):
    failed = [result for result in results["full"] if result[0]]
    assert 5 < len(failed) < len(results["full"])
    for error, after, later in failed:
        assert error.startswith("checkpoint of step 2 could not be written to ")
        assert error.endswith("free some space; the earlier checkpoints are untouched")
        assert (after, later) == (["step-000001"], ["step-000002"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
