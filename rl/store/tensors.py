"""Trees of tensors on disk: their form as JSON, their tensors as safetensors. No pickles.

In memory they are dicts and lists with tensors and JSON values as leaves; in `trainer/NAME.json`
`{"$tensor": NAME}` stands for a tensor.

`trainer/NAME.safetensors` is the main process's file, `trainer/NAME-rank3.safetensors` that of process 3. The
main process writes whole tensors. Of a sharded tensor (DTensor) each process writes its slice, and the file's
metadata says where the slice begins in the whole. So any number of processes can read a checkpoint, each
what it needs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

_TENSOR = "$tensor"
PLACES = "places"  # in a file's metadata: name of a slice -> [its offset, shape of the whole]


class NonFiniteError(ValueError):
    """A tensor that was about to be saved holds NaN or infinity."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A slice of a tensor in a file; `offset` is where it begins in the whole."""

    file: Path
    offset: tuple[int, ...]
    shape: tuple[int, ...]


def check_finite(named_tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Raises NonFiniteError, with the names, if a floating-point tensor holds NaN or infinity.

    A sum is finite only if every term is, so one pass decides the usual case; overflows get the exact test.
    """
    bad = []
    for name, tensor in named_tensors:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        values = tensor.detach()
        if values.element_size() == 1:  # float8 has no sum
            values = values.float()
        wide = torch.float64 if values.dtype == torch.float64 else torch.float32
        if not math.isfinite(values.sum(dtype=wide).item()) and not values.isfinite().all():
            bad.append(f"{name} ({int((~values.isfinite()).sum())} of {values.numel()} values)")
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise NonFiniteError(
            f"{what}: NaN or infinity in {', '.join(bad[:3])}{more}; nothing was saved. "
            "Resume from the last checkpoint; lower optimizer.lr or optimizer.max_grad_norm if it recurs"
        )


def write_tree(folder: Path, kind: str, tree: Any) -> None:
    """Writes what this process holds of a tree into `folder/trainer`; the main process writes its form.

    Raises:
        NonFiniteError: a number in it is NaN or infinity.
    """
    tensors: dict[str, Tensor] = {}
    form = split_tree(tree, kind, tensors)
    write_tensors(folder, kind, tensors)
    if own_rank() == 0:
        write_json(folder / "trainer" / f"{kind}.json", form)


def write_tensors(folder: Path, kind: str, tensors: Mapping[str, Tensor]) -> None:
    """Writes what this process holds of the tensors into `folder/trainer`; not fsynced, not collective.

    Raises:
        NonFiniteError: one holds NaN or infinity; nothing is written.
    """
    rank, mine, places = own_rank(), {}, {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            if (offset := _own_offset(tensor)) is None:
                continue
            mine[name], places[name] = tensor.to_local().detach(), [offset, tuple(tensor.shape)]
        elif rank == 0:
            mine[name] = tensor.detach()
    check_finite(mine.items(), f"{kind} state")
    if mine or rank == 0:
        path = _file(folder, kind, rank)
        path.parent.mkdir(exist_ok=True)
        save_file(unshared(mine), path, {PLACES: json.dumps(places)})


class TensorFiles:
    """The tensors of given files; or of one kind in a checkpoint, whichever process wrote them; by default,
    the model's.
    """

    def __init__(self, folder: Path | Sequence[Path], kind: str | None = None) -> None:
        self.pieces: dict[str, list[Piece]] = {}
        self.shapes: dict[str, list[int]] = {}
        files = sorted(folder.glob("*.safetensors")) if isinstance(folder, Path) else folder
        if kind is not None and isinstance(folder, Path):
            main = _file(folder, kind, 0)
            files = [main, *sorted(main.parent.glob(f"{kind}-rank*.safetensors"))]
        for file in files:
            with safe_open(file, framework="pt") as opened:
                places = json.loads((opened.metadata() or {}).get(PLACES, "{}"))
                for name in opened.keys():  # noqa: SIM118
                    shape = tuple(opened.get_slice(name).get_shape())
                    offset, self.shapes[name] = places.get(name, [(0,) * len(shape), list(shape)])
                    self.pieces.setdefault(name, []).append(Piece(file, tuple(offset), shape))

    def read(self, name: str, like: Tensor | None = None) -> Tensor:
        """A tensor on the CPU in its saved dtype: all of it, or this process's slice of it if `like` is
        sharded.

        Raises:
            ValueError: the files do not hold all of it.
        """
        pieces, shape = self.pieces.get(name, []), self.shapes.get(name, [])
        first: Sequence[int] = [0] * len(shape)
        if isinstance(like, DTensor) and list(like.shape) == shape:
            shape, first = compute_local_shape_and_global_offset(shape, like.device_mesh, like.placements)
        parts = [found for piece in pieces if (found := _overlap(piece, name, first, shape)) is not None]
        if len(parts) == 1 and list(parts[0][1].shape) == list(shape):
            return parts[0][1]
        if sum(part.numel() for _, part in parts) != math.prod(shape) or not parts:
            raise ValueError(f"the checkpoint does not hold all of {name}: the file of a process is missing")
        whole = parts[0][1].new_empty(shape)
        for place, part in parts:
            whole[place] = part
        return whole


def read_tensors(folder: Path, kind: str, into: Mapping[str, Tensor]) -> None:
    """Copies what `write_tensors` wrote into the tensors of the same names; each process its slices."""
    prefix = ""
    if not _file(folder, kind, 0).exists():  # until 0.1 they were among the optimizer's
        kind, prefix = "optimizer", f"optimizer/{kind}/"
    copy_tensors(TensorFiles(folder, kind), into, f"{folder}: the {kind} state", prefix)


@torch.no_grad()
def copy_tensors(files: TensorFiles, into: Mapping[str, Tensor], what: str, prefix: str = "") -> None:
    """Copies saved tensors into those of the same names; each process its slices.

    Raises:
        ValueError: one is missing, or has another shape.
    """
    for name, tensor in into.items():
        if (shape := files.shapes.get(prefix + name)) != list(tensor.shape):
            raise ValueError(f"{what} holds {name} of shape {shape}, but it is {list(tensor.shape)} now")
        saved = files.read(prefix + name, tensor)
        (tensor.to_local() if isinstance(tensor, DTensor) else tensor).copy_(saved)


def _overlap(
    piece: Piece, name: str, first: Sequence[int], shape: Sequence[int]
) -> tuple[tuple[slice, ...], Tensor] | None:
    """(place in the wanted slice, values) of the part that a piece holds; None if it holds nothing of it."""
    ends = zip(first, shape, piece.offset, piece.shape, strict=True)
    spans = [(max(a, b), min(a + n, b + m)) for a, n, b, m in ends]
    if any(start > end for start, end in spans):
        return None
    inside = tuple(slice(s - o, e - o) for (s, e), o in zip(spans, piece.offset, strict=True))
    with safe_open(piece.file, framework="pt") as opened:
        part = opened.get_slice(name)[inside] if inside else opened.get_tensor(name)
    return tuple(slice(s - a, e - a) for (s, e), a in zip(spans, first, strict=True)), part


def split_tree(tree: Any, path: str, tensors: dict[str, Tensor] | None) -> Any:
    """The tree as JSON values; its tensors go into `tensors` under their path (None: tensors are refused)."""
    if isinstance(tree, Tensor) and tensors is not None:
        assert path not in tensors, f"two tensors at {path}"
        tensors[path] = tree
        return {_TENSOR: path}
    if isinstance(tree, Mapping):
        for key in tree:
            assert isinstance(key, str) and key != _TENSOR, f"{path} has the key {key!r}"
        return {key: split_tree(value, f"{path}/{key}", tensors) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [split_tree(value, f"{path}/{i}", tensors) for i, value in enumerate(tree)]
    if isinstance(tree, float) and not math.isfinite(tree):
        raise NonFiniteError(f"{path} is {tree}; only finite numbers are saved")
    is_plain = tree is None or isinstance(tree, bool | int | float | str)
    assert is_plain, f"{path} is a {type(tree).__name__}; only tensors and JSON values are saved"
    return tree


def join_tree(tree: Any, tensor_of: Callable[[str], Tensor]) -> Any:
    """The tree that `split_tree` took apart."""
    if isinstance(tree, dict):
        if _TENSOR in tree:
            return tensor_of(tree[_TENSOR])
        return {key: join_tree(value, tensor_of) for key, value in tree.items()}
    return [join_tree(value, tensor_of) for value in tree] if isinstance(tree, list) else tree


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as safetensors requires (flat optimizers hand out views)."""
    seen: set[tuple[torch.device, int]] = set()
    result = {}
    for name, tensor in tensors.items():
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        own = tensor.clone() if storage in seen else tensor
        result[name] = own.contiguous()
        seen.add(storage)
    return result


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, allow_nan=False), encoding="ascii")


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def own_rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _file(folder: Path, kind: str, rank: int) -> Path:
    return folder / "trainer" / (f"{kind}-rank{rank}.safetensors" if rank else f"{kind}.safetensors")


def _own_offset(tensor: DTensor) -> tuple[int, ...] | None:
    """Where this process's slice begins; None if it has none, or if another process writes the same."""
    mesh, placements = tensor.device_mesh, tensor.placements
    place: Any = mesh.get_coordinate()
    copies = any(isinstance(p, Replicate) and at for p, at in zip(placements, place, strict=True))
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    return None if copies or 0 in shape else tuple(offset)
