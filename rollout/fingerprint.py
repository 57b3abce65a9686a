"""64-bit fingerprints of weights, equal on both sides of a sync exactly when the compared bytes are equal.

A fault that shuffles, scales, truncates or forgets values changes a fingerprint. Fingerprints are not a
defence against an adversary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import xxhash
from torch import Tensor

NUM_SAMPLED_COLUMNS = 8
GOLDEN = -0x61C8864680B583EB  # SplitMix64's increment
_ROW_WORDS = 1024
_BATCH_ROWS = 8192  # 64 MiB, hashed by four kernels


@dataclass(frozen=True, slots=True)
class HeldTensor:
    """A tensor that an engine holds, with all that its sender needs to compute the same fingerprint.

    Attributes:
        shape: of the whole tensor under its Hugging Face name.
        dtype: what the engine keeps; a sender's float32 is rounded to it first.
        device: where both sides hash, since CPU and CUDA use different hash functions.
        source: the name that carries these weights in a stream; other than its own only for a tied
            copy.
        sampled: the engine cannot show the bytes (a kernel packed them), only multiply by them. The
            fingerprint then covers `sampled_columns` of this sync instead of all columns.
        ranges: the engine's worker holds these slices of `axis` alone, one after the other; empty: all of it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    source: str
    sampled: bool = False
    axis: int = 0
    ranges: Sequence[Sequence[int]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranges", tuple(map(tuple, self.ranges)))  # lists where they came by a wire

    @property
    def num_bytes(self) -> int:
        """Size of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def own_shape(self) -> tuple[int, ...]:
        """Shape of what the worker holds."""
        if not self.ranges:
            return self.shape
        size = sum(end - first for first, end in self.ranges)
        return (*self.shape[: self.axis], size, *self.shape[self.axis + 1 :])

    def own(self, tensor: Tensor) -> Tensor:
        """What the worker holds of a whole tensor."""
        parts = [tensor.narrow(self.axis, first, end - first) for first, end in self.ranges]
        return torch.cat(parts, self.axis) if len(parts) > 1 else parts[0] if parts else tensor

    def spread(self, own: Tensor) -> Tensor:
        """A whole tensor with these values where the worker's are, and zeros elsewhere."""
        if not self.ranges:
            return own
        whole = own.new_zeros(self.shape)
        sizes = [end - first for first, end in self.ranges]
        for (first, _), part in zip(self.ranges, own.split(sizes, self.axis), strict=True):
            whole.narrow(self.axis, first, part.shape[self.axis]).copy_(part)
        return whole


def sampled_columns(num_columns: int, version: int) -> list[int]:
    """At most 8 columns, spread evenly over the width; the offset moves with the version.

    Column c is covered once in any ceil(num_columns / 8) consecutive versions.
    """
    stride = -(-num_columns // NUM_SAMPLED_COLUMNS)
    return list(range(version % stride, num_columns, stride))


def compared_part(tensor: Tensor, held: HeldTensor, version: int) -> Tensor:
    """What a fingerprint of a whole `tensor` hashes, in the engine's dtype: what the worker holds of it, or
    sampled columns of that as rows.

    A negative zero becomes zero in sampled columns: the matrix product that reads packed weights cannot tell
    them apart.
    """
    tensor = held.own(tensor.detach())
    if not held.sampled:
        return tensor.to(held.device, held.dtype)
    columns = torch.tensor(sampled_columns(tensor.shape[-1], version), device=tensor.device)
    return tensor.index_select(-1, columns).movedim(-1, 0).to(held.device, held.dtype) + 0.0


class Fingerprints:
    """Hashes tensors as they come by: on a CPU by xxh3, on any other device by `WordHashes`."""

    def __init__(self) -> None:
        self._found: dict[str, int] = {}
        self._names: list[str] = []
        self._words = WordHashes()

    def add(self, name: str, tensor: Tensor) -> None:
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        if flat.device.type == "cpu":
            self._found[name] = xxhash.xxh3_64_intdigest(cast(Any, flat.numpy()))
        else:
            self._names.append(name)
            self._words.add(flat)

    def found(self) -> dict[str, int]:
        """Name -> 64-bit hash of the tensor's bytes, row by row; there is one transfer, here."""
        return self._found | dict(zip(self._names, self._words.found(), strict=True))


def fingerprints(parts: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Name -> 64-bit hash, see `Fingerprints`."""
    hashes = Fingerprints()
    for name, tensor in parts:
        hashes.add(name, tensor)
    return hashes.found()


def mismatches(sent: Mapping[str, int], held: Mapping[str, int]) -> list[str]:
    """Names whose fingerprints differ, or that only one side has."""
    return sorted(name for name in sent.keys() | held.keys() if sent.get(name) != held.get(name))


def listed(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


class WordHashes:
    """length + sum over r of p_r * (sum over c of (w_rc xor (w_rc >> 32)) * m_c) mod 2^64, for each tensor.

    The w_rc are its bytes as 64-bit words in rows of 1,024, padded with zeros. The m_c and p_r are
    pseudo-random and odd, so the sum depends on the order. Integer sums do not depend on how a device adds.
    The shift brings the high bytes down, where every bit of a multiplier acts on them.
    """

    def __init__(self) -> None:
        self._lengths: list[int] = []
        self._pieces: list[tuple[int, int, int]] = []  # index of its tensor, first row, rows
        self._sums: list[Tensor] = []
        self._batch: list[Tensor] = []
        self._size = 0

    def add(self, flat: Tensor) -> None:
        """Hashes uint8 [number of bytes], or keeps them until a batch is full; all are on one device."""
        words, most = _words(flat), _BATCH_ROWS * _ROW_WORDS
        for k, piece in enumerate(words.split(most) if words.numel() > most else (words,)):
            rows = -(-piece.numel() // _ROW_WORDS)
            if self._batch and self._size + rows > _BATCH_ROWS:
                self._flush()
            self._pieces.append((len(self._lengths), k * _BATCH_ROWS, rows))
            self._batch.append(piece)
            self._size += rows
        self._lengths.append(flat.numel())

    def found(self) -> list[int]:
        """The hashes of all that was added, in that order."""
        if not self._lengths:
            return []
        self._flush()
        sums_R = torch.cat(self._sums)
        device, size = sums_R.device, len(sums_R)
        owners_P, first_P, rows_P = torch.tensor(self._pieces).T.to(device)
        before_P = first_P - rows_P.cumsum(0) + rows_P
        places_R = torch.arange(size, device=device)
        numbers_R = places_R + before_P.repeat_interleave(rows_P, output_size=size)
        owners_R = owners_P.repeat_interleave(rows_P, output_size=size)
        totals = torch.tensor(self._lengths, device=device)
        return totals.index_add_(0, owners_R, sums_R * _odd(numbers_R + _ROW_WORDS + 1)).tolist()

    def _flush(self) -> None:
        self._sums.append(_row_sums(self._batch))
        self._batch, self._size = [], 0


def _words(flat: Tensor) -> Tensor:
    """Bytes as int64, with zeros to fill the last one up; a copy only where the bytes do not fit."""
    rest = -flat.numel() % 8
    if rest or flat.storage_offset() % 8:
        flat = torch.cat([flat, flat.new_zeros(rest)])
    return flat.view(torch.int64)


def _row_sums(pieces: Sequence[Tensor]) -> Tensor:
    """The inner sum of `WordHashes`, for every row of every piece of int64; int64 [R]."""
    zeros, parts = pieces[0].new_zeros(_ROW_WORDS), []
    for piece in pieces:
        parts.append(piece)
        if rest := -piece.numel() % _ROW_WORDS:
            parts.append(zeros[:rest])
    words_RC = torch.cat(parts).view(-1, _ROW_WORDS)  # as words: a GPU copies bytes one by one
    halves = words_RC.view(torch.int32)
    halves[:, ::2].bitwise_xor_(halves[:, 1::2])  # the lower half comes first
    return words_RC.mul_(_column_weights(words_RC.device)).sum(-1)


@cache
def _column_weights(device: torch.device) -> Tensor:
    return _odd(torch.arange(1, _ROW_WORDS + 1, device=device))


def _odd(numbers: Tensor) -> Tensor:
    return mixed(numbers * GOLDEN) | 1


def mixed(z: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014), a bijection that mixes well. The constants are in
    two's complement: int64 wraps around as 64 unsigned bits do, and only the shifts need masks.
    """
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & 0x1FFFFFFFF)
