"""Sends weights to another process through memory that both map, filled and loaded again and again.

On a GPU the bytes are device memory shared by CUDA IPC, on a CPU an anonymous file, which no crash
leaves behind.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from rollout.fingerprint import HeldTensor

BUCKET_BYTES = 256 << 20
_ALIGNMENT = 256
Layout = list[list[Any]]  # [name, first byte] of every tensor in a filled bucket
Deliver = Callable[[Layout, list[Any] | None], Any]


class Bucket:
    """Shared bytes in the trainer's process: `BUCKET_BYTES`, less for a small model, more for a big tensor.

    Attributes:
        bytes_B: the shared memory.
        handle: plain data (numbers and bytes) with which the other process opens it; `deliver` gets it with
            the first filling, and then None.
    """

    def __init__(self, tensors: Mapping[str, HeldTensor], device: torch.device) -> None:
        size = size_of_bucket(tensors, BUCKET_BYTES)
        if device.type == "cuda":
            self.bytes_B = torch.empty(size, dtype=torch.uint8, device=device)
            arguments: Any = reduce_tensor(self.bytes_B)[1]
            # The first seven say what to build (types, sizes, device); the rest is where the memory is.
            self.handle: list[Any] = ["cuda", size, arguments[3], *arguments[7:]]
        else:
            self._file = os.memfd_create("cohort weights")
            os.ftruncate(self._file, size)
            self.bytes_B = _mapped(self._file, size)
            self.handle = ["cpu", size, f"/proc/{os.getpid()}/fd/{self._file}"]
        self.tensors, self.is_known = tensors, False

    def send(self, weights: Iterable[tuple[str, Tensor]], deliver: Deliver) -> None:
        """Sends every tensor through the bucket; `deliver` loads each filling."""
        for layout, _ in fillings(weights, self.tensors, [self.bytes_B]):
            deliver(layout, None if self.is_known else self.handle)
            self.is_known = True

    def close(self, *, is_released: bool) -> None:
        """Gives the memory back.

        torch counts, in shared memory, the holders of what it sent. Memory whose count is not 0 when this
        process ends is freed after CUDA is gone, which is a SIGSEGV at exit.

        Args:
            is_released: the other process has released it. If not, it never opened it, or it died.
        """
        if not len(self.bytes_B):
            return
        if self.handle[0] == "cpu":
            os.close(self._file)
        elif not is_released:
            *_, counter, offset, _, _ = self.handle
            torch.UntypedStorage._release_ipc_counter(counter, offset, device=self.bytes_B.device)
        is_cuda, self.bytes_B = self.bytes_B.is_cuda, torch.empty(0, dtype=torch.uint8)
        if is_cuda:
            torch.cuda.ipc_collect()


def size_of_bucket(tensors: Mapping[str, HeldTensor], most: int) -> int:
    """At most `most` bytes, unless one tensor needs more."""
    sizes = [_aligned(held.num_bytes) for held in tensors.values()]
    return max(*sizes, min(most, sum(sizes)))


def fillings(
    weights: Iterable[tuple[str, Tensor]], tensors: Mapping[str, HeldTensor], buffers: Sequence[Tensor]
) -> Iterator[tuple[Layout, Tensor]]:
    """Writes every tensor into one of `buffers` in turn, in its engine's dtype; (layout, bytes used) of each
    filling.
    """
    layout: Layout = []
    turns = cycle(buffers)
    end, bytes_B = 0, next(turns)
    for name, tensor in weights:
        held = tensors[name]
        if layout and end + held.num_bytes > len(bytes_B):
            _settle(bytes_B)
            yield layout, bytes_B[:end]
            layout, end, bytes_B = [], 0, next(turns)
        view(bytes_B, end, held).copy_(tensor.detach())
        layout.append([name, end])
        end = _aligned(end + held.num_bytes)
    if layout:
        _settle(bytes_B)
        yield layout, bytes_B[:end]


def _settle(bytes_B: Tensor) -> None:
    if bytes_B.is_cuda:
        torch.cuda.current_stream(bytes_B.device).synchronize()


def open_bucket(handle: list[Any]) -> Tensor:
    """The bytes of a `Bucket` of another process, on this process's current device."""
    kind, size, *where = handle
    if kind == "cuda":
        offset, *memory = where
        place = (torch.UntypedStorage, torch.uint8, torch.cuda.current_device())
        return rebuild_cuda_tensor(torch.Tensor, (size,), (1,), offset, *place, *memory)
    file = os.open(where[0], os.O_RDWR)
    try:
        return _mapped(file, size)
    finally:
        os.close(file)


def received(
    bytes_B: Tensor, layout: Layout, tensors: Mapping[str, HeldTensor], layers: Mapping[str, frozenset[str]]
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a filled bucket, which the next filling will overwrite.

    vLLM keeps tensors until all of a layer have come. So each is a copy, unless this bucket holds its whole
    layer: `layers` maps a tensor to the names that complete its layer.
    """
    here = {name for name, _ in layout}
    for name, start in layout:
        tensor = view(bytes_B, start, tensors[name])
        yield name, tensor if name in layers and layers[name] <= here else tensor.clone()


def view(bytes_B: Tensor, start: int, held: HeldTensor) -> Tensor:
    return bytes_B[start : start + held.num_bytes].view(held.dtype).view(held.shape)


def _mapped(file: int, size: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(file, size), dtype=torch.uint8)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
