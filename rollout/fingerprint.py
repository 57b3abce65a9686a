"""64-bit fingerprints of weights, equal on both sides of a sync exactly when the compared bytes are equal.

A fault that shuffles, scales, truncates or forgets values changes a fingerprint; they are no defence against
an adversary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import xxhash
from torch import Tensor

NUM_SAMPLED_COLUMNS = 8
_WORDS_PER_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class HeldTensor:
    """One tensor that an engine holds, as the sender has to see it to compute the same fingerprint.

    Attributes:
        shape: of the whole tensor under its Hugging Face name.
        dtype: what the engine keeps; a sender's float32 is rounded to it first.
        device: where both sides hash, since CPU and CUDA use different hash functions.
        source: the name that carries these weights in a stream; differs from the own name only for a tied
            copy.
        sampled: the engine cannot show the bytes (a kernel packed them), only multiply by them. The
            fingerprint then covers `sampled_columns` of this sync instead of all columns.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    source: str
    sampled: bool = False


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
    """Name -> 64-bit hash of the tensor's bytes, row by row; one transfer from the device."""
    hashes: dict[str, int] = {}
    waiting: dict[str, Tensor] = {}
    for name, tensor in parts:
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        if flat.device.type == "cpu":
            hashes[name] = xxhash.xxh3_64_intdigest(cast(Any, flat.numpy()))
        else:
            waiting[name] = _hash_words(flat)
    arrived = torch.stack(list(waiting.values())).tolist() if waiting else []
    return hashes | dict(zip(waiting, arrived, strict=True))


def mismatches(sent: Mapping[str, int], held: Mapping[str, int]) -> list[str]:
    """Names whose fingerprints differ, or that only one side has."""
    return sorted(name for name in sent.keys() | held.keys() if sent.get(name) != held.get(name))


def _hash_words(flat: Tensor) -> Tensor:
    """Sum over i of (w_i xor (w_i >> 32)) * m_i mod 2^64, the w_i being the bytes as 64-bit words; int64.

    The m_i are pseudo-random and odd, so the sum depends on the order; integer sums do not depend on how a
    device adds. The shift brings the high bytes down, where every bit of a multiplier acts on them.
    """
    words = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(torch.int64)
    total = torch.full((), flat.numel(), dtype=torch.int64, device=flat.device)
    multipliers = _multipliers(flat.device)
    for number, chunk in enumerate(words.split(_WORDS_PER_CHUNK)):
        mixed = chunk ^ ((chunk >> 32) & 0xFFFFFFFF)
        total = total + (mixed * multipliers[: len(chunk)]).sum() * (2 * number + 1)
    return total


@cache
def _multipliers(device: torch.device) -> Tensor:
    """SplitMix64 of 1, 2, ..., made odd (Steele et al. 2014, section 5), in two's complement."""
    z = torch.arange(1, _WORDS_PER_CHUNK + 1, dtype=torch.int64, device=device) * -0x61C8864680B583EB
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return (z ^ ((z >> 31) & 0x1FFFFFFFF)) | 1
