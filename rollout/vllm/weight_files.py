"""Weights as files: whole, or the changed values only, in safetensors with an index that checksums them.

A delta overwrites: laid over the same base once or twice it gives the same weights. A server accepts it only
over the content that it loaded last. Checksums (xxh3, 128 bits) find damage, not an adversary.
"""

from __future__ import annotations

import json
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rollout.fingerprint import Fingerprints, HeldTensor, compared_part, listed
from rollout.vllm.file_server import INDEX, fetch, serving

POSITIONS = "::positions"  # NAME + this: flat positions of the values that NAME holds
FILE_BYTES = 2 * 2**30
NOTHING_YET = "no weights were written yet, so there is no version for a server that joins"
_CHUNK = 16 * 2**20
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Push:
    """Weights of one version, ready to be loaded by servers.

    Attributes:
        content: names these weights, as a delta or whole: the version, a dot, and who wrote them.
        where: a folder that the servers see, or the URL they get it from; nccl:// if it is broadcast.
        checksum: of the index, which has those of the files; empty if there are none.
        base: content that a delta is laid over; empty for whole weights.
        num_bytes: on disk, or sent.
        changed: share of the values that are sent.
    """

    version: int
    content: str
    where: str
    checksum: str
    base: str
    num_bytes: int
    changed: float


def overwritten(base: Tensor, values: Tensor, positions: Tensor | None) -> Tensor:
    """`base` with `values` [n] at flat `positions` [n]; all of `values` where there are no positions."""
    if positions is None:
        return values
    full = base.detach().clone(memory_format=torch.contiguous_format)
    full.view(-1)[positions.to(full.device, torch.int64)] = values.to(full.device)
    return full


def known(weights: Iterable[tuple[str, Tensor]], names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Passes weights on.

    Raises:
        ValueError: a name is not among `names`, or came twice; or one of them did not come.
    """
    missing = dict.fromkeys(names)
    for name, tensor in weights:
        if name not in missing:
            raise ValueError(
                f"the servers have no weight {name}, or it came twice; send the model they serve"
            )
        del missing[name]
        yield name, tensor
    if missing:
        raise ValueError(f"the stream of weights lacks {listed(list(missing))}")


class ReadFiles:
    """A version's folder, opened and checked against the checksum of its index.

    Raises:
        ValueError: a file is missing or damaged, or an index is of another version.
    """

    def __init__(self, folder: Path, checksum: str) -> None:
        self.folder = folder
        try:
            text = (folder / INDEX).read_bytes()
            if (found := xxhash.xxh3_128_hexdigest(text)) != checksum:
                raise ValueError(f"{folder / INDEX} has the checksum {found}, not {checksum}")
            index = json.loads(text)
            for file, expected in index["metadata"]["files"].items():
                if _checksum(folder / file) != expected:
                    raise ValueError(
                        f"{folder / file} is damaged or cut short (its checksum differs); it holds "
                        + listed(sorted(n for n, f in index["weight_map"].items() if f == file))
                    )
        except OSError as error:
            raise ValueError(f"{error.filename or folder} cannot be read: {error.strerror}") from error
        self.metadata: dict[str, Any] = index["metadata"]
        self.files: dict[str, str] = index["weight_map"]
        self.names = [name for name in self.files if not name.endswith(POSITIONS)]

    def check(self, held: Mapping[str, HeldTensor], is_delta: bool) -> None:
        """Compares names, shapes and dtypes, and the positions of a delta, with what a model holds.

        Raises:
            ValueError: something differs; the message names the tensor.
        """
        wanted = {name for name, one in held.items() if one.source == name}
        if extra := sorted(set(self.names) - wanted):
            raise ValueError(f"the model has no weight {listed(extra)}")
        if not is_delta and (missing := sorted(wanted - set(self.names))):
            raise ValueError(f"the files lack {listed(missing)}")
        for name, values, positions in self.tensors():
            shape, size = held[name].shape, torch.Size(held[name].shape).numel()
            if values.dtype != held[name].dtype:
                raise ValueError(f"{name} is {values.dtype} in the files and {held[name].dtype} in the model")
            if positions is None and tuple(values.shape) != shape:
                raise ValueError(f"{name} is {tuple(values.shape)} in the files and {shape} in the model")
            if positions is not None and not (
                is_delta
                and values.shape == positions.shape == (len(positions),)
                and (not len(positions) or (int(positions.min()) >= 0 and int(positions.max()) < size))
            ):
                raise ValueError(f"{name}: {len(values)} values do not fit its {size} places")

    def tensors(self) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """(name, values, positions or None), file by file, in the order in which they were written."""
        for file in self.metadata["files"]:
            with safe_open(self.folder / file, "pt") as opened:
                for name in self.names:
                    if self.files[name] == file:
                        at = name + POSITIONS
                        yield (
                            name,
                            opened.get_tensor(name),
                            opened.get_tensor(at) if at in self.files else None,
                        )


@contextmanager
def opened(push: Mapping[str, Any]) -> Iterator[ReadFiles]:
    """The files of a push, fetched first if they are at a URL.

    Raises:
        ValueError: they are missing or damaged.
    """
    if "://" not in push["where"]:
        yield ReadFiles(Path(push["where"]), push["checksum"])
        return
    with tempfile.TemporaryDirectory(prefix="cohort-weights-") as folder:
        fetch(push["where"], Path(folder))
        yield ReadFiles(Path(folder), push["checksum"])


class WeightFiles:
    """Writes versions for servers, and remembers the weights that all of them hold; safe to share by threads.

    The memory costs one copy of the weights in the engines' dtypes, on the CPU.

    Args:
        folder: of this run alone; it is emptied at first, and removed in the end.
        held: what the servers hold (`Control.describe`).
        url: where they get the files if they do not see `folder`; this process serves them there.
        token: what this process then asks for.

    Raises:
        ValueError: this host cannot listen at `url`.
    """

    def __init__(
        self, folder: str | Path, held: Mapping[str, HeldTensor], *, url: str = "", token: str = ""
    ) -> None:
        self.folder, self._url, self._open = Path(folder).absolute(), url, ExitStack()
        self._dtypes = {name: one.dtype for name, one in held.items() if one.source == name}
        self._num_values = sum(torch.Size(held[name].shape).numel() for name in self._dtypes)
        self._writer, self._lock = secrets.token_hex(4), Lock()
        self._base: dict[str, Tensor] = {}
        self._committed: Push | None = None
        self._pending: Push | None = None
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        if url:
            self._open.enter_context(serving(self.folder, token, url))

    def write(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> Push:
        """Writes what changed since the version that all servers hold; everything if there is none.

        Raises:
            ValueError: the stream lacks a weight, or has one that the servers lack.
        """
        with self._lock:
            base, self._pending = self._committed, None
            self._remove_all_but(base)
            changes = (self._changed(name, tensor.detach()) for name, tensor in known(weights, self._dtypes))
            self._pending = self._written(changes, version, base=base.content if base else "")
            return self._pending

    def commit(self) -> None:
        """Notes that every server holds the version written last: the next delta is laid over it."""
        with self._lock:
            if self._pending is None:
                return
            for name, values, positions in self._read(self._pending).tensors():
                # A copy, since whole values are mapped from a file that is removed.
                self._base[name] = overwritten(self._base.get(name, values), values, positions).clone()
            self._committed, self._pending = self._pending, None

    def whole(self) -> Push:
        """The version that was written last, whole: for a server that joins, or has lost its base.

        Raises:
            ValueError: nothing was written yet.
        """
        with self._lock:
            last = self._pending or self._committed
            if last is None:
                raise ValueError(NOTHING_YET)
            if not last.base:
                return last
            over = {name: (new, at) for name, new, at in self._read(last).tensors()} if self._pending else {}
            every = (
                (name, overwritten(base, *over[name]) if name in over else base, None)
                for name, base in self._base.items()
            )
            return self._written(every, last.version, base="")

    def bring(self, member: Any, push: Push) -> None:
        """Does nothing: a server reads the files by itself."""

    def close(self) -> None:
        """Removes the files: no server needs what it has loaded."""
        self._open.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _changed(self, name: str, tensor: Tensor) -> tuple[str, Tensor, Tensor | None]:
        """The values that differ from the base in any bit, with their positions, if that is shorter."""
        new = tensor.to("cpu", self._dtypes[name]).contiguous()
        if (base := self._base.get(name)) is None:
            return name, new, None
        bits = _BITS[new.dtype.itemsize]
        positions = (new.view(bits) != base.view(bits)).view(-1).nonzero()[:, 0]
        if new.numel() < 2**31:
            positions = positions.int()
        if len(positions) * (positions.itemsize + new.itemsize) >= new.nbytes:
            return name, new, None
        return name, new.view(-1)[positions], positions

    def _written(
        self, changes: Iterable[tuple[str, Tensor, Tensor | None]], version: int, *, base: str
    ) -> Push:
        content = f"{version}.{self._writer}"
        folder = self.folder / f"{content}-{'delta' if base else 'whole'}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        files, weight_map, batch, size, sent = {}, {}, {}, 0, 0

        def save() -> None:
            file = f"model-{len(files) + 1:05d}.safetensors"
            save_file(batch, folder / file, {"format": "pt"})
            files[file] = _checksum(folder / file)
            weight_map.update(dict.fromkeys(batch, file))

        for name, values, positions in changes:
            parts = {name: values} if positions is None else {name: values, name + POSITIONS: positions}
            if positions is not None and not len(positions):
                continue
            sent += values.numel()
            if batch and size + sum(t.nbytes for t in parts.values()) > FILE_BYTES:
                save()
                batch, size = {}, 0
            batch |= parts
            size += sum(t.nbytes for t in parts.values())
        if batch:
            save()
        metadata = {"version": version, "content": content, "base": base, "files": files}
        text = json.dumps({"metadata": metadata, "weight_map": weight_map}).encode()
        (folder / INDEX).write_bytes(text)
        return Push(
            version,
            content,
            f"{self._url}/{folder.name}" if self._url else str(folder),
            xxhash.xxh3_128_hexdigest(text),
            base,
            sum(path.stat().st_size for path in folder.iterdir()),
            sent / self._num_values if base else 1.0,
        )

    def _read(self, push: Push) -> ReadFiles:
        return ReadFiles(self.folder / push.where.rpartition("/")[2], push.checksum)

    def _remove_all_but(self, push: Push | None) -> None:
        for folder in self.folder.iterdir():
            if push is None or folder.name != push.where.rpartition("/")[2]:
                shutil.rmtree(folder)


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def noting(
    weights: Iterable[tuple[str, Tensor]], held: Mapping[str, HeldTensor], version: int, found: dict[str, int]
) -> Iterator[tuple[str, Tensor]]:
    """Passes weights on, and puts the fingerprints that servers have to show into `found`."""
    copies: dict[str, list[str]] = {}
    for name, one in held.items():
        copies.setdefault(one.source, []).append(name)
    hashes = Fingerprints()
    for name, tensor in weights:
        for copy in copies.get(name, ()):
            hashes.add(copy, compared_part(tensor, held[copy], version))
        yield name, tensor
    found |= hashes.found()


def writer_of(label: str) -> str:
    """Who wrote the weights that a label names (`Push.content`)."""
    return label.partition(".")[2]
