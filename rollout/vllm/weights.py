"""A vLLM model's parameters under their Hugging Face names, read back from where the kernels use them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from rollout.fingerprint import HeldTensor, sampled_columns
from rollout.vllm.internals import reach, reach_or, require
from rollout.vllm.names import Names

# vLLM's parameters of all experts of a layer -> transformers' names; matrices [E, rows, columns], gate
# before up.
_EXPERTS = {"w13_weight": "gate_up_proj", "w2_weight": "down_proj"}
_EXPERTS_BIAS = {"w13_bias": "gate_up_proj_bias", "w2_bias": "down_proj_bias"}
# Products of other parameters that vLLM keeps on a CPU (multi-head latent attention).
_DERIVED = ("W_UK_T", "W_UV")
# Where vLLM's kernels of unquantized layers read the parameters as they are; on a CPU it packs copies.
_AS_THEY_ARE = ("cuda",)
_DIGIT = 128  # whole numbers below it are exact in every dtype, bfloat16 included
_ORDERS: dict[tuple[Any, ...], Tensor] = {}
_UNQUANTIZED = ("NoneType", "UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one Hugging Face tensor lives: rows [first, last) of a parameter of a module.

    Attributes:
        turned: the parameter's last two axes are swapped.
    """

    module: Any
    parameter: str
    first: int
    last: int
    held: HeldTensor
    turned: bool = False


def find_slots(model: nn.Module, names: Names) -> dict[str, Slot]:
    """Hugging Face name -> slot, for a model on one device, or a worker's slices of it (tensor parallel).

    vLLM stacks q, k, v into `qkv_proj` and gate, up into `gate_up_proj`; `packed_modules_mapping` names the
    parts in order. Embeddings are padded to a multiple of 64 rows. On a CPU vLLM moves the weight of a linear
    layer into a packed copy of the kernel and keeps an empty parameter. Such a slot is sampled. A tied head
    has a packed copy of its own.

    Raises:
        ValueError: vLLM's layers lack what a sync reads or calls.
    """
    packed: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    owners: dict[int, str] = {}
    slots: dict[str, Slot] = {}
    modules: Any = model.named_modules()
    for path, module in modules:
        parent, _, leaf = path.rpartition(".")
        for parameter, value in module.named_parameters(recurse=False):
            if parameter in _DERIVED:
                continue
            own_name = f"{path}.{parameter}"
            moved = value.numel() == 0
            if moved:
                require("emptied layer", module)
            owner = own_name if moved else owners.setdefault(id(value), own_name)
            if owner != own_name and reach_or("emptied layer", "cpu_linear", module, None) is None:
                continue  # the same bytes as the owner's
            dtype = module.weight.dtype if moved else value.dtype
            for name, first, last, shape, axis, ranges in _parts(module, value, packed.get(leaf, [leaf])):
                full = _full_name(names, path, ".".join(filter(None, (parent, name, parameter))), parameter)
                source = full if owner == own_name else names.transformers_name(owner)
                sampled = moved or source != full
                turned = names.is_transposed(full)
                if parameter in _EXPERTS:
                    shape = names.shapes.get(full) or shape
                    axis, ranges = _cut_of_experts(module, parameter, shape, turned)
                held = HeldTensor(shape, dtype, value.device, source, sampled, axis, ranges)
                slots[full] = Slot(module, parameter, first, last, held, turned)
                if sampled or packs_experts(slots[full]):
                    require("packed weight" if sampled else "packed experts", module)
    return slots


def _full_name(names: Names, path: str, name: str, parameter: str) -> str:
    """transformers' name of a parameter that vLLM calls `name`."""
    leaf = (_EXPERTS | _EXPERTS_BIAS).get(parameter)
    if leaf is None:
        return names.transformers_name(name)
    stem = path.removesuffix(".routed_experts")
    found = names.transformers_name(f"{stem}.{parameter}")
    return f"{stem}.{leaf}" if found == f"{stem}.{parameter}" else found


def _parts(module: Any, value: Tensor, names: list[str]) -> Iterator[tuple[Any, ...]]:
    """(name, first row, last row, whole shape, axis, ranges) of each Hugging Face tensor that is stacked in a
    parameter; the last two are those of `HeldTensor`.
    """
    if len(names) > 1:
        require("stacked layer", module)
    rows = _rows_here(module, value)
    stacked = [[part] for part in rows] if len(names) > 1 else [rows]
    whole = reach_or("emptied layer", "input_size", module, None)
    own = reach_or("split layer", "own", module, whole)
    width = value.shape[1:] if value.numel() else (own,)
    last = 0
    for name, parts in zip(names, stacked, strict=False):
        first, last = last, last + sum(end - start for start, end, _ in parts)
        before = [0, *accumulate(of for _, _, of in parts)]
        ranges = [(at + start, at + end) for at, (start, end, _) in zip(before, parts, strict=False)]
        if before[-1] > last - first:
            yield name, first, last, (before[-1], *width), 0, ranges
        elif width and own != whole:
            rank = reach("split layer", "tp_rank", module)
            yield name, first, last, (last - first, whole), 1, [(rank * own, rank * own + own)]
        else:
            yield name, first, last, (last - first, *width), 0, ()


def _cut_of_experts(module: Any, parameter: str, shape: Sequence[int], turned: bool) -> tuple[int, Any]:
    """(axis, ranges) of what tensor parallelism leaves of the experts here: of gate and up, or of down."""
    given = reach_or("split experts", "moe_config", module, None)
    if given is None or given.tp_size == 1:
        return 0, ()
    halves = 2 if parameter == "w13_weight" else 1
    axis = 1 if (halves == 2) != turned else 2
    whole = shape[axis] // halves
    own = whole // given.tp_size
    firsts = (k * whole + given.tp_rank * own for k in range(halves))
    return axis, [(first, first + own) for first in firsts]


def _rows_here(module: Any, value: Tensor) -> list[tuple[int, int, int]]:
    """(first, end, of how many) rows of each tensor stacked in a parameter; it may hold a slice of each."""
    if (size := reach_or("embedding", "org_vocab_size", module, None)) is not None:
        return [(reach("embedding", "first", module), reach("embedding", "end", module), size)]
    sizes = reach_or("stacked layer", "output_partition_sizes", module, [len(value)])
    whole, rank = (reach_or("split layer", name, module, 0) for name in ("output_size", "tp_rank"))
    if whole <= sum(sizes):  # every worker has all of it
        return [(0, size, size) for size in sizes]
    # Of queries, keys and values, on how many workers each slice is: few heads of keys are on several.
    copies = [1, *[reach_or("split layer", "num_kv_head_replicas", module, 1)] * (len(sizes) - 1)]
    workers = whole // sum(sizes)
    return [
        (rank // times * size, (rank // times + 1) * size, workers // times * size)
        for size, times in zip(sizes, copies, strict=True)
    ]


def complete_layers(slots: Mapping[str, Slot]) -> dict[str, frozenset[str]]:
    """Name -> the names that complete its layer; only for layers that consist of nothing else.

    It must be called while vLLM reloads, when the parameters have the sizes that are loaded. A padded
    embedding is never complete: vLLM processes it at the very end.
    """
    names: dict[int, set[str]] = {}
    for name, slot in slots.items():
        if slot.held.source == name:
            names.setdefault(id(slot.module), set()).add(name)
    found: dict[str, frozenset[str]] = {}
    for slot in slots.values():
        ours = names.get(id(slot.module), set())
        loaded = sum(math.prod(slots[name].held.own_shape) for name in ours)
        tensors = [*slot.module.parameters(recurse=False), *slot.module.buffers(recurse=False)]
        if loaded == sum(tensor.numel() for tensor in tensors):
            found |= dict.fromkeys(ours, frozenset(ours))
    return found


def read_slots(slots: Mapping[str, Slot], version: int) -> Iterator[tuple[str, Tensor]]:
    """(name, the part that a fingerprint compares), from the tensors that the model computes with.

    A packed weight is read by multiplying by unit vectors: each product is one column, exactly, since every
    other term is 0.
    """
    products: dict[int, Tensor] = {}
    for name, slot in slots.items():
        if not slot.held.sampled:
            rows = plain_experts(slot) if packs_experts(slot) else _rows(slot)
            yield name, rows.detach()
            continue
        key = id(slot.module)
        if key not in products:
            products = {key: _columns(slot, version)}
        yield name, products[key][:, slot.first : slot.last]


def _rows(slot: Slot) -> Tensor:
    """The tensor in the axes of transformers."""
    rows = getattr(slot.module, slot.parameter)[slot.first : slot.last]
    return rows.transpose(1, 2) if slot.turned else rows


def plain_experts(slot: Slot) -> Tensor:
    """Experts on a CPU, read back from where the kernel has packed them."""
    rows = slot.held.own_shape[2:0:-1] if slot.turned else slot.held.own_shape[1:]
    packed = getattr(slot.module, slot.parameter)
    plain = unpacked(packed, rows, slot.parameter, reach("packed experts", "pack", slot.module))
    return plain.transpose(1, 2) if slot.turned else plain


def whole_slots(slots: Mapping[str, Slot]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) as a checkpoint has them, from what the model computes with; a tied copy is left out.

    A packed weight is multiplied by the identity, which shows every value exactly (a negative zero as zero).
    Where a worker has a slice, the rest is zeros.
    """
    products: dict[int, Tensor] = {}
    for name, slot in slots.items():
        if slot.held.source != name:
            continue
        if not slot.held.sampled:
            yield name, slot.held.spread(plain_experts(slot) if packs_experts(slot) else _rows(slot))
            continue
        key = id(slot.module)
        if key not in products:
            products = {key: _product(slot, torch.eye(slot.held.own_shape[-1]))}
        yield name, slot.held.spread(products[key][:, slot.first : slot.last].T)


def _columns(slot: Slot, version: int) -> Tensor:
    """Columns `sampled_columns` of a packed weight [N, K], as rows [8, N]."""
    width = slot.held.own_shape[-1]
    columns = sampled_columns(width, version)
    units = torch.zeros(len(columns), width)
    units[torch.arange(len(columns)), torch.tensor(columns)] = 1.0
    return _product(slot, units)


def _product(slot: Slot, rows: Tensor) -> Tensor:
    """rows [R, K] times the transposed packed weight [N, K] of the slot's module."""
    rows = rows.to(slot.held.device, slot.held.dtype)
    return reach("packed weight", "apply", slot.module)(slot.module, rows, None) + 0.0


def can_be_written(model: nn.Module, slots: Mapping[str, Slot]) -> bool:
    """Whether loading only writes into the parameters, and nothing else is derived from them."""
    return not any("MLA" in type(module).__name__ for module in model.modules()) and all(
        slot.held.device.type in _AS_THEY_ARE
        and not slot.held.sampled
        and type(reach_or("layer", "quant_method", slot.module, None)).__name__ in _UNQUANTIZED
        and not hasattr(slot.module, "process_weights_after_loading")
        for slot in slots.values()
    )


def write_slot(slot: Slot, tensor: Tensor) -> None:
    _rows(slot).data.copy_(slot.held.own(tensor))


def repack(slots: Mapping[str, Slot]) -> None:
    """Packs again, on a CPU, weights that vLLM's reload leaves packed as before.

    The reload processes only layers that a tensor was loaded into, and a tied head is loaded through the
    embedding: its packed copy would go on multiplying by the weights of the engine's start. Experts are
    loaded, but their kernel packs them on the first load only and would read plain weights as packed ones.
    """
    for module in {id(s.module): s.module for n, s in slots.items() if s.held.source != n}.values():
        reach("packed weight", "pack", module)(module)
    for module in {id(s.module): s.module for s in slots.values() if packs_experts(s)}.values():
        reach("packed experts", "pack", module)(module)


def packs_experts(slot: Slot) -> bool:
    """True for experts on a CPU, where vLLM rearranges them for its kernel."""
    return slot.parameter in _EXPERTS and slot.held.device.type == "cpu"


def unpacked(packed: Tensor, rows: Sequence[int], parameter: str, pack: Callable[[Any], Any]) -> Tensor:
    """[E, *rows]: the values of `packed`, bit for bit, in the order in which they were loaded.

    Packing rearranges the values of each expert alike and may add zeros. The order is found by packing
    numbers.

    Args:
        rows: rows and columns of one expert.
        parameter: w13_weight or w2_weight.
        pack: vLLM's method that packs the experts of a layer.
    """
    key = (
        parameter,
        tuple(rows),
        packed.dtype,
        packed.shape[1:].numel(),
        type(getattr(pack, "__self__", pack)),
    )
    if key not in _ORDERS:
        _ORDERS[key] = _order(rows, parameter, packed, pack)
    return packed.detach().reshape(len(packed), -1)[:, _ORDERS[key]].view(len(packed), *rows)


def _order(rows: Sequence[int], parameter: str, packed: Tensor, pack: Callable[[Any], Any]) -> Tensor:
    """Where each value of an expert is in the packed one.

    Raises:
        ValueError: packing loses or changes values, so that nothing could prove what the kernel holds.
    """
    size = math.prod(rows)
    numbers, found, scale = torch.arange(1, size + 1), torch.zeros(packed[0].numel(), dtype=torch.long), 1
    while scale <= size:
        digits = (numbers // scale % _DIGIT).view(1, *rows)
        found += scale * _packed(digits.to(packed.dtype), parameter, pack).flatten().round().long()
        scale *= _DIGIT
    places = found.nonzero().flatten()
    if not torch.equal(found[places].sort().values, numbers):
        raise ValueError(
            f"vLLM's kernel on this CPU packs {parameter} in a way that cannot be read back, so nothing "
            "would prove that new experts arrived; use engine.name=transformers"
        )
    order = torch.empty(size, dtype=torch.long)
    order[found[places] - 1] = places
    return order


def _packed(values: Tensor, parameter: str, pack: Callable[[Any], Any]) -> Tensor:
    """These values of one expert as the kernel would hold them; the layer's other parameter is made up."""
    _, height, width = values.shape
    layer: Any = nn.Module()
    other = (1, width, height // 2) if parameter == "w13_weight" else (1, 2 * width, height)
    layer.w13_weight = nn.Parameter(values if parameter == "w13_weight" else values.new_zeros(other), False)
    layer.w2_weight = nn.Parameter(values if parameter == "w2_weight" else values.new_zeros(other), False)
    pack(layer)
    return getattr(layer, parameter).detach()
