"""Optimizer, random numbers and the tree format: bit for bit back, and under the right names."""

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rl import driver
from rl.store.checkpoint import CheckpointStore
from rl.store.optimizer_state import load_optimizer, optimizer_writer
from rl.store.tensors import NonFiniteError, TensorFiles, check_finite, read_tensors, write_tensors
from rl.store.trainer_state import TrainerState, capture_rng, restore_rng
from rl.types import ALONE

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw_amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
}


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 4))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler, num_steps: int) -> None:
    """Every step draws from all generators: inputs from torch and numpy, dropout, a scale from python."""
    for _ in range(num_steps):
        inputs = torch.randn(5, 8) * random.gauss(1, 0.1) + torch.from_numpy(np.random.randn(5, 8)).float()
        model(inputs).square().mean().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_that_goes_on_from_a_checkpoint_equals_one_that_never_stopped(tmp_path, name):
    random.seed(1)
    np.random.seed(2)
    model = make_model(3)
    optimizer = OPTIMIZERS[name](model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    train(model, optimizer, scheduler, 3)
    state = TrainerState(3, rng={"rank0": capture_rng()}, counters={"schedule": scheduler.state_dict()})
    write_optimizer = optimizer_writer(optimizer, model.named_parameters())

    def write(folder: Path) -> None:
        save_file(dict(model.state_dict()), folder / "model.safetensors")
        write_optimizer(folder)

    CheckpointStore(tmp_path).save(3, write=write, state=state, team=ALONE)
    train(model, optimizer, scheduler, 3)

    random.seed(0)
    np.random.seed(0)
    resumed = make_model(0)
    loaded = CheckpointStore(tmp_path).load_newest()
    assert loaded is not None
    resumed.load_state_dict(load_file(loaded.path / "model.safetensors"))
    again = OPTIMIZERS[name](resumed.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(again, T_max=10)
    load_optimizer(loaded.path, again, resumed.named_parameters())
    schedule.load_state_dict(loaded.trainer_state.counters["schedule"])
    assert restore_rng(loaded.trainer_state.rng["rank0"]) == []
    train(resumed, again, schedule, 3)

    for key, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    before, after = optimizer.state_dict(), again.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for index, entry in before["state"].items():
        for key, value in entry.items():
            restored = after["state"][index][key]
            same = torch.equal(restored, value) if isinstance(value, torch.Tensor) else restored == value
            assert same, (index, key)


def test_random_numbers_go_on_where_they_were_captured():
    random.seed(5)
    random.gauss(0, 1)  # leaves the second of a pair in gauss_next
    np.random.seed(6)
    np.random.randn()
    state = capture_rng()

    def draw() -> list[float]:
        return [random.gauss(0, 1), random.random(), *np.random.randn(3), *torch.randn(3).tolist()]

    first = draw()
    assert restore_rng(state) == []
    assert draw() == first


def test_a_cuda_generator_without_a_device_is_reported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    [sentence] = restore_rng({**capture_rng(), "cuda": torch.zeros(16, dtype=torch.uint8)})
    assert sentence.startswith("the saved CUDA generator has no device here")


def test_a_run_that_goes_on_without_a_generators_device_warns(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = []
    rng = {"rank0": {**capture_rng(), "cuda": torch.zeros(16, dtype=torch.uint8)}}
    state = TrainerState(3, rng=rng, counters={"bad_steps_in_row": 0, "skipped_steps": 0})
    run: Any = SimpleNamespace(
        progress=SimpleNamespace(),
        policy=SimpleNamespace(load=lambda *_: None),
        optimizer=None,
        reference=None,
        world=SimpleNamespace(rank=0),
        observer=SimpleNamespace(warn=said.append),
        put_back=lambda counters: None,
    )
    loaded: Any = SimpleNamespace(path=None, trainer_state=state)
    driver._put_back(run, loaded)
    assert run.progress.step == 3 and len(said) == 1 and "has no device here" in said[0]


def test_moments_keep_their_dtype_where_parameters_are_narrower(tmp_path):
    # torch's own load_state_dict would round these fp32 moments to bfloat16.
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    moment = torch.tensor([1 / 3, 2 / 3])
    optimizer.state[parameter] = {"momentum_buffer": moment}
    optimizer_writer(optimizer, [("w", parameter)])(tmp_path)
    again = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    load_optimizer(tmp_path, again, [("w", parameter)])
    restored = again.state[parameter]["momentum_buffer"]
    assert restored.dtype == torch.float32 and torch.equal(restored, moment)


def test_groups_go_by_name_and_implementation_flags_stay_the_live_ones(tmp_path):
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([{"params": [a], "lr": 0.5}, {"params": [b]}], lr=0.25, fused=True)
    a.grad, b.grad = torch.ones(2), torch.ones(3)
    optimizer.step()
    optimizer_writer(optimizer, [("a", a), ("b", b)])(tmp_path)
    saved = json.loads((tmp_path / "trainer" / "optimizer.json").read_text())
    assert [group["params"] for group in saved["param_groups"]] == [["a"], ["b"]]
    live = torch.optim.AdamW([{"params": [a]}, {"params": [b]}], lr=1.0, foreach=True)
    load_optimizer(tmp_path, live, [("b", b), ("a", a)])
    assert [group["lr"] for group in live.param_groups] == [0.5, 0.25]
    assert all(group["foreach"] and not group["fused"] for group in live.param_groups)
    # (1 - beta1) * gradient = 0.1 * 1 after one step.
    assert torch.allclose(live.state[b]["exp_avg"], torch.full((3,), 0.1))


def test_a_state_of_another_model_is_refused_and_changes_nothing(tmp_path):
    model, other = nn.Linear(2, 2), nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    optimizer_writer(optimizer, model.named_parameters())(tmp_path)
    live = torch.optim.AdamW(other.parameters(), lr=0.25)
    with pytest.raises(
        ValueError, match=r"2 shapes differ such as bias is \[3\], was \[2\], weight is \[3, 2\]"
    ):
        load_optimizer(tmp_path, live, other.named_parameters())
    with pytest.raises(
        ValueError, match=r"2 saved parameters are gone such as bias, weight; 2 parameters are new"
    ):
        renamed = ((f"lora.{name}", parameter) for name, parameter in other.named_parameters())
        load_optimizer(tmp_path, live, renamed)
    assert live.param_groups[0]["lr"] == 0.25 and not live.state
    split = torch.optim.AdamW([{"params": [model.weight]}, {"params": [model.bias]}])
    with pytest.raises(ValueError, match="1 parameter groups were saved, there are 2"):
        load_optimizer(tmp_path, split, model.named_parameters())


def test_a_parameter_without_a_name_is_refused():
    model = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(AssertionError, match="a parameter without a name"):
        optimizer_writer(optimizer, [("weight", model.weight)])


def save_and_load(folder: Path, **fields) -> TrainerState:
    state = TrainerState(1, **{"rng": {"rank0": {}}, **fields})
    parameter = nn.Parameter(torch.zeros(1))
    write_optimizer = optimizer_writer(torch.optim.SGD([parameter]), [("w", parameter)])

    def write(path: Path) -> None:
        save_file({"w": torch.zeros(1)}, path / "model.safetensors")
        write_optimizer(path)

    CheckpointStore(folder).save(1, write=write, state=state, team=ALONE)
    loaded = CheckpointStore(folder).load_newest()
    assert loaded is not None
    return loaded.trainer_state


def test_nested_trees_views_and_odd_strings_come_back(tmp_path):
    flat = torch.arange(6.0)
    tree = {
        "views": [flat[:3], flat[2:], flat.view(2, 3).T],
        "deep": {
            "list": [1, None, {"half": torch.ones(2, dtype=torch.bfloat16)}],
            "empty": torch.zeros(0, 3),
        },
        "text": "\ud800 \u2028 \0",
        "float": 0.1 + 0.2,
    }
    loaded = save_and_load(tmp_path, rng=tree).rng
    assert [view.tolist() for view in loaded["views"]] == [[0, 1, 2], [2, 3, 4, 5], [[0, 3], [1, 4], [2, 5]]]
    assert loaded["deep"]["list"][:2] == [1, None]
    assert loaded["deep"]["list"][2]["half"].dtype == torch.bfloat16
    assert loaded["deep"]["empty"].shape == (0, 3)
    assert (loaded["text"], loaded["float"]) == ("\ud800 \u2028 \0", 0.30000000000000004)


@pytest.mark.parametrize(
    ("counters", "message"),
    [
        ({"seen": {1, 2}}, "counters/seen is a set; only tensors and JSON values are saved"),
        ({"loss": torch.zeros(1)}, "counters/loss is a Tensor; only tensors and JSON values are saved"),
        ({"a": [{3: 1}]}, "counters/a/0 has the key 3"),
        ({"$tensor": "x"}, r"counters has the key '\$tensor'"),
        ({"a": [1.0, float("nan")]}, "counters/a/1 is nan; only finite numbers are saved"),
    ],
)
def test_what_json_can_not_hold_is_refused_by_its_path(tmp_path, counters, message):
    with pytest.raises((NonFiniteError, AssertionError), match=message):
        save_and_load(tmp_path, counters=counters)


def test_check_finite_names_what_is_broken_and_only_that():
    tensors = {
        "fine": torch.ones(3),
        "integers": torch.arange(3),
        "empty": torch.zeros(0),
        # Finite values whose sum overflows.
        "large": torch.full((4,), 3e38),
        "half": torch.full((4,), 6e4, dtype=torch.float16),
        "eight": torch.ones(4).to(torch.float8_e4m3fn),
    }
    check_finite(tensors.items(), "model")
    broken = {name: torch.tensor([0.0, float("inf"), -float("inf")]) for name in "abcde"}
    with pytest.raises(NonFiniteError) as error:
        check_finite((tensors | broken).items(), "model of step 7")
    assert str(error.value).startswith(
        "model of step 7: NaN or infinity in a (2 of 3 values), b (2 of 3 values), c (2 of 3 values) "
        "and 2 more; nothing was saved."
    )
    with pytest.raises(NonFiniteError, match="bits"):
        check_finite([("bits", torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn))], "model")


def test_a_tensor_of_another_shape_is_refused_and_not_broadcast(tmp_path):
    write_tensors(tmp_path, "reference", {"w": torch.ones(1, 3)})
    with pytest.raises(ValueError, match=r"holds w of shape \[1, 3\], but it is \[4, 3\] now"):
        read_tensors(tmp_path, "reference", {"w": torch.zeros(4, 3)})


def test_the_slice_of_a_process_that_is_missing_is_named(tmp_path):
    """Rows 6 of 7 were the third process's; what is left says how large the whole was."""
    (tmp_path / "trainer").mkdir()
    place = json.dumps({"w": [[0, 0], [7, 3]]})
    save_file({"w": torch.ones(6, 3)}, tmp_path / "trainer" / "reference.safetensors", {"places": place})
    with pytest.raises(ValueError, match="does not hold all of w: the file of a process is missing"):
        TensorFiles(tmp_path, "reference").read("w")


@dataclass(frozen=True)
class Ranks:
    rank: int
    size: int

    def gather(self, mine: object) -> list:
        found: list = [None] * self.size
        torch.distributed.all_gather_object(found, mine)
        return found


def sharded_program(folder: Path, rank: int, world_size: int) -> None:
    """Two steps of AdamW on a sharded model. Two ranks save after the first; one rank starts from there."""
    from torch.distributed.fsdp import fully_shard

    store = torch.distributed.FileStore(str(folder / f"store{world_size}"), world_size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    mesh = torch.distributed.init_device_mesh("cpu", (world_size,))
    model = make_model(3).eval()
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    checkpoints = CheckpointStore(folder / "checkpoints")

    def step(number: int) -> None:
        inputs = torch.linspace(-1, number, 40).view(5, 8)
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def weights() -> dict[str, torch.Tensor]:
        return {name: value.full_tensor() for name, value in model.state_dict().items()}

    if world_size == 2:
        step(1)
        whole = weights()
        write_optimizer = optimizer_writer(optimizer, model.named_parameters())

        def write(path: Path) -> None:
            if rank == 0:
                save_file(whole, path / "model.safetensors")
            write_optimizer(path)
            write_tensors(path, "reference", dict(model.named_parameters()))

        state = TrainerState(1, rng={"rank0": {}})
        found = checkpoints.save(1, write=write, state=state, team=Ranks(rank, world_size))
        read_back(found, model)
    else:
        loaded = checkpoints.load_newest()
        assert loaded is not None
        own = dict(model.named_parameters())
        for name, value in load_file(loaded.path / "model.safetensors").items():
            own[name].data.to_local().copy_(value)
        load_optimizer(loaded.path, optimizer, model.named_parameters())
        read_back(loaded.path, model)
    step(2)
    result = weights()
    if rank == 0:
        save_file(result, folder / f"world{world_size}.safetensors")
    torch.distributed.destroy_process_group()


def read_back(folder: Path, model: nn.Module) -> None:
    """Weights that were written in slices are those of the model, in slices and whole."""
    own = dict(model.named_parameters())
    copies = {name: p.detach().clone() for name, p in own.items()}
    for copy in copies.values():
        copy.to_local().zero_()
    read_tensors(folder, "reference", copies)
    whole = {name: torch.zeros(p.shape) for name, p in own.items()}
    read_tensors(folder, "reference", whole)
    for name, p in own.items():
        assert torch.equal(copies[name].to_local(), p.to_local())
        assert torch.equal(whole[name], p.full_tensor())


def test_a_sharded_optimizer_saved_by_two_ranks_goes_on_with_one(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, __file__, str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(2)]
    try:
        assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    files = sorted(path.name for path in (tmp_path / "checkpoints/step-000001/trainer").glob("*.safetensors"))
    assert files == [
        "optimizer-rank1.safetensors",
        "optimizer.safetensors",
        "reference-rank1.safetensors",
        "reference.safetensors",
        "rng.safetensors",
    ]
    two, one = (load_file(tmp_path / f"world{n}.safetensors") for n in (2, 1))
    assert two.keys() == one.keys() and two
    for name in two:
        # The mean gradient over two equal ranks is the gradient itself, up to rounding.
        torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=1e-7)


if __name__ == "__main__":
    rank = int(sys.argv[2])
    sharded_program(Path(sys.argv[1]), rank, 2)
    if rank == 0:
        sharded_program(Path(sys.argv[1]), 0, 1)
