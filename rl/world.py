"""The processes of a run: sums, maxima and agreement over them. One process needs no communication."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from safetensors.torch import load, save
from torch import Tensor

PEER_WAIT_S = 1800.0
LOOPBACK = "127.0.0.1"
STORE_FD = "COHORT_STORE_FD"
"""Environment variable of `cohort train`: rank 0's file descriptor of the meeting socket; else -1."""
_TENSOR = "$tensor"


def make_accelerator(engine_timeout_s: float = 0.0) -> Accelerator:
    """An accelerator on this process's GPU, or on the CPU if there is none.

    Processes wait for each other at most `PEER_WAIT_S`, or three times what one of them may wait for its
    engine. NCCL's default of ten minutes can be shorter than that, and ends a process by SIGABRT.
    """
    wait = timedelta(seconds=max(PEER_WAIT_S, 3 * engine_timeout_s))
    if STORE_FD in os.environ:
        _meet_on_loopback(int(os.environ.pop(STORE_FD)), wait)
    waits = InitProcessGroupKwargs(timeout=wait)
    return Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[waits])


def listen_on_loopback() -> socket.socket:
    """A socket for `STORE_FD`. By itself, torch's store would listen on every address of the machine."""
    server = socket.socket()
    server.bind((LOOPBACK, 0))
    server.listen(512)
    return server


def loopback_environment() -> dict[str, str]:
    """Environment variables that keep gloo and NCCL traffic on the loopback interface of this machine."""
    name = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name} if name else {}


def _meet_on_loopback(listening_fd: int, wait: timedelta) -> None:
    """Makes the default process group; rank 0 holds the socket, the others pass -1."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    port = int(os.environ["MASTER_PORT"])
    server = {"is_master": True, "master_listen_fd": listening_fd} if listening_fd >= 0 else {}
    store = torch.distributed.TCPStore(LOOPBACK, port, size, timeout=wait, wait_for_workers=False, **server)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)


@dataclass(frozen=True)
class World:
    """The processes of a run. All of them call each method equally often."""

    accelerator: Accelerator

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def size(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def gather_numbers(self, values: Sequence[float]) -> list[list[float]]:
        """The numbers of every process, in rank order; exact for integers up to 2^53."""
        if self.size == 1:
            return [list(values)]
        mine = torch.tensor([list(values)], dtype=torch.float64, device=self.accelerator.device)
        return cast(Tensor, self.accelerator.gather(mine)).tolist()

    def sum(self, values: Sequence[float]) -> list[float]:
        return [sum(column) for column in zip(*self.gather_numbers(values), strict=True)]

    def max(self, values: Sequence[float]) -> list[float]:
        return [max(column) for column in zip(*self.gather_numbers(values), strict=True)]

    def any(self, wish: bool) -> bool:
        return self.sum([float(wish)])[0] > 0

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Copies the main process's values into the tensors of every process."""
        for tensor in tensors if self.size > 1 else ():
            torch.distributed.broadcast(tensor, 0)

    def gather(self, mine: Any) -> list[Any]:
        """An object of every process, in rank order: JSON values with string keys, and tensors among them.

        It travels as JSON and safetensors: with pickle, whoever joins the group could run code in the
        others. Tuples arrive as lists, and tensors on the CPU.
        """
        if self.size == 1:
            return [mine]
        payload = _encode(mine)
        lengths = [int(n) for (n,) in self.gather_numbers([len(payload)])]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        rows = cast(Tensor, self.accelerator.gather(padded[None].to(self.accelerator.device))).cpu()
        return [_decode(row[:n].numpy().tobytes()) for row, n in zip(rows, lengths, strict=True)]

    def merged(
        self,
        ratios: Mapping[str, tuple[float, float]],
        *,
        maxima: Mapping[str, float],
        minima: Mapping[str, float],
    ) -> dict[str, float]:
        """Numbers by name over all processes: total sum / total count of `ratios` (left out at count 0), the
        largest of `maxima` and the smallest of `minima`. A name may be missing on some processes.
        """
        tables = zip(*self.gather([dict(ratios), dict(maxima), dict(minima)]), strict=True)
        pairs, highs, lows = map(_by_name, tables)
        totals = {name: [sum(column) for column in zip(*found, strict=True)] for name, found in pairs.items()}
        values = {name: total / count for name, (total, count) in totals.items() if count}
        values |= {name: float(max(found)) for name, found in highs.items()}
        return values | {name: float(min(found)) for name, found in lows.items()}

    def exposure(self) -> str | None:
        """A warning that others can reach the processes' meeting point; None if nobody else can."""
        if self.size == 1 or "COHORT_LAUNCHED" in os.environ:
            return None
        where = f"{os.environ.get('MASTER_ADDR', 'this machine')}:{os.environ.get('MASTER_PORT', '?')}"
        return (
            f"the {self.size} processes meet at {where} without authentication, on every address of that "
            "machine, and send in plain text: keep that network private (on one machine `cohort train CONFIG "
            "--processes N` uses the loopback interface alone)"
        )

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def end(self) -> None:
        """Ends a successful run: no process leaves before the others are done."""
        if self.size > 1:
            self.wait()
            torch.distributed.destroy_process_group()


def _by_name(tables: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for table in tables for name in table)
    return {name: [table[name] for table in tables if name in table] for name in names}


def _encode(value: Any) -> bytes:
    """Length of the JSON (8 bytes), the JSON with {"$tensor": NAME} for each tensor, and the tensors."""
    tensors: dict[str, Tensor] = {}

    def put(tensor: Any) -> dict[str, str]:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{type(tensor).__name__} cannot go to other processes; JSON and tensors can")
        name = str(len(tensors))
        tensors[name] = tensor.detach().cpu().contiguous().clone()
        return {_TENSOR: name}

    text = json.dumps(value, default=put).encode()
    return len(text).to_bytes(8, "little") + text + save(tensors)


def _decode(payload: bytes) -> Any:
    begin = 8 + int.from_bytes(payload[:8], "little")
    tensors = load(payload[begin:])

    def take(found: dict[str, Any]) -> Any:
        return tensors[found[_TENSOR]] if found.keys() == {_TENSOR} else found

    return json.loads(payload[8:begin], object_hook=take)
