"""64-bit fingerprints of weights, equal on both sides of a sync exactly when the compared bytes are equal.

A fault that shuffles, scales, truncates or forgets values changes a fingerprint. Fingerprints are not a
defence against an adversary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import xxhash
from torch import Tensor

NUM_SAMPLED_COLUMNS = 8
_ROW_WORDS = 1024
_ROW_BYTES = 8 * _ROW_WORDS
_BATCH_ROWS = 8192  # 64 MiB, hashed by half a dozen kernels


@dataclass(frozen=True, slots=True)
class HeldTensor:
    """A tensor that an engine holds, with all that its sender needs to compute the same fingerprint.

    Attributes:
        shape: of the whole tensor under its Hugging Face name.
        dtype: what the engine keeps; a sender's float32 is rounded to it first.
        device: where both sides hash, since CPU and CUDA use different hash functions.
        source: the name that carries these weights in a stream; another one than its own only for a tied
            copy.
        sampled: the engine cannot show the bytes (a kernel packed them), only multiply by them. The
            fingerprint then covers `sampled_columns` of this sync instead of all columns.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    source: str
    sampled: bool = False

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def sampled_columns(num_columns: int, version: int) -> list[int]:
    """At most 8 columns, spread evenly over the width; the offset moves with the version.

    Column c is covered once in any ceil(num_columns / 8) consecutive versions.
    """
    stride = _stride(num_columns)
    return list(range(version % stride, num_columns, stride))


def covered_share(held: HeldTensor) -> float:
    """Share of a tensor's bytes that a fingerprint compares, on average over versions; in (0, 1]."""
    return 1.0 / _stride(held.shape[-1]) if held.sampled else 1.0


def _stride(num_columns: int) -> int:
    return -(-num_columns // NUM_SAMPLED_COLUMNS)


def compared_part(tensor: Tensor, held: HeldTensor, version: int) -> Tensor:
    """What a fingerprint of `tensor` [..., K] hashes, in the engine's dtype: all, or sampled columns as rows.

    A negative zero becomes zero in sampled columns: the matrix product that reads packed weights cannot tell
    them apart.
    """
    tensor = tensor.detach()
    if not held.sampled:
        return tensor.to(held.device, held.dtype)
    columns = torch.tensor(sampled_columns(tensor.shape[-1], version), device=tensor.device)
    return tensor.index_select(-1, columns).movedim(-1, 0).to(held.device, held.dtype) + 0.0


def fingerprints(parts: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Name -> 64-bit hash of the tensor's bytes, row by row.

    On a CPU xxh3; on any other device `hash_words` in large batches, and one transfer at the end.
    """
    hashes: dict[str, int] = {}
    names: list[str] = []

    def elsewhere() -> Iterator[Tensor]:
        for name, tensor in parts:
            flat = tensor.contiguous().view(-1).view(torch.uint8)
            if flat.device.type == "cpu":
                hashes[name] = xxhash.xxh3_64_intdigest(cast(Any, flat.numpy()))
            else:
                names.append(name)
                yield flat

    found = hash_words(elsewhere())
    return hashes | dict(zip(names, found, strict=True))


def mismatches(sent: Mapping[str, int], held: Mapping[str, int]) -> list[str]:
    """Names whose fingerprints differ, or that only one side has."""
    return sorted(name for name in sent.keys() | held.keys() if sent.get(name) != held.get(name))


def hash_words(flats: Iterable[Tensor]) -> list[int]:
    """length + sum over r of p_r * (sum over c of (w_rc xor (w_rc >> 32)) * m_c) mod 2^64, for each tensor.

    The w_rc are its bytes as 64-bit words in rows of 1,024, padded with zeros. The m_c and p_r are
    pseudo-random and odd, so the sum depends on the order. Integer sums do not depend on how a device adds.
    The shift brings the high bytes down, where every bit of a multiplier acts on them.

    Args:
        flats: uint8 [number of bytes], all on one device.
    """
    lengths: list[int] = []
    owners: list[int] = []  # of each piece, the index of its tensor
    numbers: list[Tensor] = []  # of each piece, the numbers of its rows
    sums: list[Tensor] = []
    batch: list[Tensor] = []
    size = 0
    for flat in flats:
        for k, piece in enumerate(flat.split(_BATCH_ROWS * _ROW_BYTES)):
            rows = -(-len(piece) // _ROW_BYTES)
            if batch and size + rows > _BATCH_ROWS:
                sums.append(_row_sums(batch))
                batch, size = [], 0
            owners.append(len(lengths))
            numbers.append(torch.arange(k * _BATCH_ROWS, k * _BATCH_ROWS + rows))
            batch.append(piece)
            size += rows
        lengths.append(len(flat))
    if not batch:
        return lengths
    sums.append(_row_sums(batch))
    device = batch[0].device
    owners_R = torch.tensor(owners).repeat_interleave(torch.tensor([len(n) for n in numbers]))
    weights_R = _odd(torch.cat(numbers).to(device) + _ROW_WORDS + 1)
    totals = torch.tensor(lengths, device=device)
    return totals.index_add_(0, owners_R.to(device), torch.cat(sums) * weights_R).tolist()


def _row_sums(pieces: Sequence[Tensor]) -> Tensor:
    """The inner sum of `hash_words`, for every row of every piece; int64 [R]."""
    zeros = pieces[0].new_zeros(_ROW_BYTES)
    bytes_B = torch.cat([part for piece in pieces for part in (piece, zeros[: -len(piece) % _ROW_BYTES])])
    words_RC = bytes_B.view(torch.int64).view(-1, _ROW_WORDS)
    mixed_RC = (words_RC >> 32).bitwise_and_(0xFFFFFFFF).bitwise_xor_(words_RC)
    return mixed_RC.mul_(_column_weights(bytes_B.device)).sum(-1)


@cache
def _column_weights(device: torch.device) -> Tensor:
    return _odd(torch.arange(1, _ROW_WORDS + 1, device=device))


def _odd(numbers: Tensor) -> Tensor:
    """SplitMix64 of the numbers, made odd (Steele et al. 2014, section 5), in two's complement; int64."""
    z = numbers * -0x61C8864680B583EB
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return (z ^ ((z >> 31) & 0x1FFFFFFFF)) | 1
