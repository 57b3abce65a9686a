"""Several processes write one checkpoint: a fault of one ends the save on all, with the same words."""

import errno
import json
import shutil
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rl.driver import Progress, save
from rl.store.checkpoint import CheckpointStore, CheckpointWriteError, NonFiniteError, TrainerState
from rl.store.optimizer_state import optimizer_writer, state_bytes
from rl.types import ALONE


@dataclass
class Meeting:
    """Where threads, in the place of processes, tell each other; none waits longer than a minute."""

    size: int
    given: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=60)


@dataclass(frozen=True)
class Member:
    meeting: Meeting
    rank: int

    @property
    def size(self) -> int:
        return self.meeting.size

    def gather(self, mine: object) -> list:
        self.meeting.given[self.rank] = json.dumps(mine)
        self.meeting.barrier.wait()
        found = [json.loads(self.meeting.given[rank]) for rank in range(self.size)]
        self.meeting.barrier.wait()
        return found


def write_model(folder: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    save_file({"w": torch.zeros(4)}, folder / "model.safetensors")
    optimizer_writer(torch.optim.SGD([parameter]), [("w", parameter)])(folder)


def save_together(root: Path, step: int, errors: dict[int, BaseException]) -> list[BaseException | None]:
    """What ended `save` on each of three ranks; those in `errors` fail while they write."""
    meeting = Meeting(3)
    ended: list[BaseException | None] = [None] * 3

    def member(rank: int) -> None:
        def write(folder: Path) -> None:
            if rank in errors:
                raise errors[rank]
            if rank == 0:
                write_model(folder)

        try:
            state = TrainerState(step, rng={"rank0": {}})
            CheckpointStore(root).save(step, write=write, state=state, team=Member(meeting, rank))
        except BaseException as error:
            ended[rank] = error

    threads = [threading.Thread(target=member, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=100)
    return ended


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name != ".lock")


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), SystemExit(3), MemoryError("no room")])
def test_an_interrupt_of_one_process_ends_the_save_of_all_in_words(tmp_path, raised):
    assert save_together(tmp_path, 1, {}) == [None] * 3
    ended = save_together(tmp_path, 2, {1: raised})
    said = f"process 1 of 3: {type(raised).__name__}: {raised}"
    for rank in (0, 2):
        assert type(ended[rank]) is RuntimeError and str(ended[rank]) == said
    if isinstance(raised, MemoryError):
        assert type(ended[1]) is RuntimeError and str(ended[1]) == said and ended[1].__cause__ is raised
    else:  # a wish to end is not turned into an error
        assert ended[1] is raised and said in raised.__notes__
    assert names(tmp_path) == ["step-000001"]
    assert save_together(tmp_path, 2, {}) == [None] * 3


DISK_FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("errors", "kind", "said"),
    [
        ({1: ValueError("one"), 2: DISK_FULL}, RuntimeError, "process 1 of 3: ValueError: one"),
        ({1: DISK_FULL, 2: ValueError("two")}, CheckpointWriteError, "process 1 of 3: checkpoint of step 2 "),
        ({0: NonFiniteError("zero"), 1: DISK_FULL}, NonFiniteError, "process 0 of 3: zero"),
        ({0: KeyboardInterrupt(), 2: DISK_FULL}, RuntimeError, "process 0 of 3: KeyboardInterrupt: "),
    ],
)
def test_all_processes_raise_the_error_of_the_first_that_failed(tmp_path, errors, kind, said):
    save_together(tmp_path, 1, {})
    ended = save_together(tmp_path, 2, errors)
    told = [error for error in ended if error is not None and not isinstance(error, KeyboardInterrupt)]
    assert len(told) == (2 if isinstance(errors.get(0), KeyboardInterrupt) else 3)
    assert {type(error) for error in told} == {kind}
    assert len({str(error) for error in told}) == 1 and str(told[0]).startswith(said)
    assert all(ended[rank] is error or ended[rank].__cause__ is error for rank, error in errors.items())
    assert names(tmp_path) == ["step-000001"]


def free_bytes(number: int) -> Callable:
    return lambda path: shutil._ntuple_diskusage(10**12, 10**12, number)


def test_too_little_space_for_the_first_checkpoint_is_noticed_before_anything_is_written(
    tmp_path, monkeypatch
):
    store, state = CheckpointStore(tmp_path), TrainerState(1, rng={"rank0": {}})
    needed = 3 << 30
    monkeypatch.setattr(shutil, "disk_usage", free_bytes(needed - 1))
    with pytest.raises(CheckpointWriteError) as error:
        store.save(1, write=lambda folder: pytest.fail("wrote"), state=state, team=ALONE, num_bytes=needed)
    assert str(error.value) == (
        f"checkpoint of step 1 needs about 3.000 GiB, but {tmp_path} has 3.000 GiB free; free some space; "
        "the earlier checkpoints are untouched"
    )
    assert names(tmp_path) == []
    monkeypatch.setattr(shutil, "disk_usage", free_bytes(needed))
    store.save(1, write=write_model, state=state, team=ALONE, num_bytes=needed)
    assert names(tmp_path) == ["step-000001"]


def test_later_checkpoints_need_what_the_newest_one_takes_and_none_is_lost(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.save(1, write=write_model, state=TrainerState(1, rng={"rank0": {}}), team=ALONE)
    monkeypatch.setattr(shutil, "disk_usage", free_bytes(100_000))
    state = TrainerState(2, rng={"rank0": {}})
    store.save(2, write=write_model, state=state, team=ALONE, num_bytes=3 << 30)
    monkeypatch.setattr(shutil, "disk_usage", free_bytes(10))
    with pytest.raises(CheckpointWriteError, match=r"needs about 0\.000 GiB"):
        store.save(3, write=write_model, state=TrainerState(3, rng={"rank0": {}}), team=ALONE)
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_a_checkpoint_takes_the_parameters_once_and_their_two_moments():
    """AdamW on 6 + 2 parameters in float32: (1 + 2) * 8 * 4 bytes, and two steps of 4 bytes."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert state_bytes(optimizer) == 3 * 8 * 4 + 2 * 4
    assert state_bytes(optimizer, copies=2) == 4 * 8 * 4 + 2 * 4


def test_a_run_says_that_its_first_checkpoint_has_no_room_and_goes_on_unless_it_must_save(
    tmp_path, monkeypatch
):
    """What the model and the moments take (see above) is known to the driver: 104 bytes, and 103 are free."""
    model, warned = torch.nn.Linear(3, 2), []
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    run: Any = SimpleNamespace(
        progress=Progress(step=1),
        phases=lambda name: nullcontext(),
        policy=SimpleNamespace(snapshot=lambda optimizer: lambda folder: pytest.fail("wrote")),
        reference=None,
        optimizer=optimizer,
        world=ALONE,
        store=CheckpointStore(tmp_path),
        observer=SimpleNamespace(warn=warned.append),
        counters=dict,
    )
    monkeypatch.setattr(shutil, "disk_usage", free_bytes(103))
    save(run)
    (said,) = warned
    assert said.startswith("checkpoint of step 1 needs about 0.000 GiB") and run.progress.saved_step == 0
    with pytest.raises(RuntimeError, match="GiB free; free some space"):
        save(run, must=True)
    assert names(tmp_path) == []
