"""The causal policy under FSDP2: each process holds a share of weights, gradients and moments.

Units are the embedding (unless the head is tied to it), each decoder layer, and the rest: norm and head.
A unit is gathered while it computes and then freed, so all processes must make equally many model calls.
Gradients are sums over processes, as everywhere in this library, and reduced in fp32.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from rl.batch import IDLE, Batch, MicroBatch, Row, idle_micro_batch, micro_batch_of
from rl.causal import CausalPolicy
from rl.config import ModelConfig
from rl.model.adapter_folder import find_adapter
from rl.model.adapters import Plan, add_lora, check_adapted
from rl.model.exactness import take_long_factors
from rl.model.hollow import (
    digest_of,
    give_memory,
    hollow_model,
    in_files,
    is_hollow,
    own_tensors,
    short_model,
    weight_files,
)
from rl.model.saving import save_model, save_settings, shard_name, write_index
from rl.model.units import check_shardable, is_tied, units
from rl.policy import Prepared, Writer
from rl.references import Copy
from rl.store.optimizer_state import load_optimizer, optimizer_writer
from rl.store.tensors import TensorFiles, copy_tensors
from rl.types import Completion, WeightStream
from rl.world import World

ENTRIES = ("own_logprobs", "likeliest", "run")
"""Methods of scorers that compute with the model."""


class ShardedPolicy:
    """`rl.policy.Policy` around a causal policy, which answers for everything not defined here. Around other
    models it is what `rl.policy.Trained` names.

    Args:
        inner: has the same weights on every process, or reads them here (`load_split`); it is split in place.
        reference: of the KL term; if it is a copy of the weights, it is split as well.
        sharding: full: over all processes; hybrid: over those of a host, with a copy on each host.
        sent: dtype of the engine's weights; tensors are rounded to it before they are gathered.
    """

    in_step = True

    def __init__(self, inner: Any, reference: Any, *, sharding: str, sent: torch.dtype) -> None:
        self.inner, self.sent, self.world = inner, sent, World(inner.accelerator)
        mesh = make_mesh(inner.device, self.world.size, sharding)
        check_shardable(inner.model, mesh.shape[-1])
        copies = [reference.scorer] if isinstance(reference, Copy) else []
        for scorer in (inner.scorer, *copies):
            shard(scorer, mesh, compute=torch.float32 if inner.config.dtype == "fp32" else torch.bfloat16)
            if inner.unread:
                read = in_files(inner.model, own_tensors(cast(Any, scorer).model))
                copy_tensors(TensorFiles(inner.unread), read, inner.config.name)
        inner.canary()  # FSDP settles gradient dtypes in its first pass: adapters must be on

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def prepare(self, batch: Batch, *, draw: int) -> list[Prepared]:
        """One per micro-batch, and idle ones. Where a model call computes a single row: one per episode,
        padded to equally many rows on all processes.
        """
        parts, calls = batch.micro_batches, [1] * len(batch.micro_batches)
        if not (self.inner.shares_prompts or self.inner.scorer.padded):
            ones = [one for part in parts for one in one_by_one(part)]
            parts = sorted(ones, key=lambda one: -len(one.rows))
            calls = [len(one.rows) for one in parts]
        most = [max(found) for found in zip_longest(*self.world.gather(calls), fillvalue=0)]
        parts = [with_rows(part, number) for part, number in zip(parts, most, strict=False)]
        mine = self.inner.prepare(replace(batch, micro_batches=parts), draw=draw)
        return mine + [self._idle(number) for number in most[len(mine) :]]

    def _idle(self, num_rows: int = 1) -> Prepared:
        return Prepared(with_rows(idle_micro_batch(), num_rows).to(self.inner.device), is_idle=True)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def finish_gradients(self, max_norm: float) -> float:
        """Clips gradients, which are summed already; returns the norm over all shards before that."""
        norm: Any = nn.utils.clip_grad_norm_([p for _, p in self.inner.trainable()], max_norm)
        return norm.full_tensor().item()

    def weights(self) -> WeightStream:
        return GatheredWeights(self.inner.weights(), self.sent)

    def snapshot(self, optimizer: torch.optim.Optimizer) -> Writer:
        """A writer: each process writes its share of the model's tensors, the main one also an adapter."""
        write_optimizer = optimizer_writer(optimizer, self.inner.trainable())
        named = self._saved()
        owners = [0] * len(named) if self.inner.peft_model else deal_tensors(named, self.world.size)
        share = {
            name: whole.cpu()
            for (name, tensor), owner in zip(named.items(), owners, strict=True)
            for whole in [gathered(tensor)]
            if owner == self.world.rank
        }

        def write_rest(folder: Path) -> None:
            if self.inner.peft_model is not None:
                save_model(self.inner.peft_model, self.inner.model, folder, state_dict=share)
            else:
                save_settings(self.inner.model, folder)
                write_index(folder, self.inner.model, named=named, owners=owners, size=self.world.size)

        def write(folder: Path) -> None:
            if self.inner.peft_model is None and share:
                path = folder / shard_name(self.world.rank, self.world.size)
                save_file(in_files(self.inner.model, share), path, {"format": "pt"})
            if self.world.is_main:
                self.inner.write_model(folder, write_rest)
            write_optimizer(folder)

        return write

    def load(self, folder: Path, optimizer: torch.optim.Optimizer) -> None:
        copy_tensors(TensorFiles(folder), self._in_files(), f"{folder}: the model")
        load_optimizer(folder, optimizer, self.inner.trainable())

    def _saved(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint's model by name: the trained part of an adapter, else the whole model."""
        if (adapted := self.inner.peft_model) is not None:
            return {name: p for name, p in adapted.named_parameters() if p.requires_grad}
        return own_tensors(self.inner.model)

    def _in_files(self) -> dict[str, Tensor]:
        """The same tensors by their names in the files."""
        if self.inner.peft_model is None:
            return in_files(self.inner.model, self._saved())
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.inner.peft_model, self._saved())


def load_split(
    config: ModelConfig,
    accelerator: Accelerator,
    *,
    temperature: float,
    plan: Plan | None,
    longest: int,
    settle: Callable[[CausalPolicy], object] = id,
) -> tuple[CausalPolicy, str | None] | None:
    """A policy whose weights `ShardedPolicy` will read, each process its slices, and why packed rows are off.

    What depends on weights (is packing exact?) is settled by the model's first layers, which are freed again.

    Args:
        settle: settles how a policy computes its experts; called with that of the first layers, then with the
            one that is returned.

    Returns:
        None if the weights must be loaded whole: the name is an adapter's, or the model's files have other
        tensors than the model, as with a head of its own where the config ties it.

    Raises:
        ValueError: a process has other files, perhaps of an older revision on its host.
    """
    if find_adapter(config.name, config.revision) is not None:
        return None
    given: Any = {"accelerator": accelerator, "temperature": temperature}
    short = CausalPolicy(config.model_copy(update={"lora": None}), load=short_model, **given)
    settle(short)
    reason = short.settle_attention(longest)
    if config.lora is not None:
        adapted = hollow_model(config)
        add_lora(adapted, config, plan)
        check_adapted(adapted, config)
    policy = CausalPolicy(config, plan=plan, load=hollow_model, like=short, **given)
    settle(policy)
    take_over(policy, short)
    policy.unread = weight_files(config)
    shapes, world = TensorFiles(policy.unread).shapes, World(accelerator)
    check_same_files(config.name, world.gather({file.name: digest_of(file) for file in policy.unread}))
    try:
        read = in_files(policy.model, own_tensors(policy.model))
    except ValueError:
        return None
    differs = any(shapes.get(name) != list(one.shape) for name, one in read.items())
    return None if differs or is_tied(policy.model) != is_tied(short.model) else (policy, reason)


def check_same_files(name: str, processes: Sequence[Mapping[str, str]]) -> None:
    """Raises ValueError if processes, which read slices of {file: digest}, would mix those of two models."""
    for rank, found in enumerate(processes):
        if differ := sorted(file for file, _ in found.items() ^ processes[0].items()):
            said = f"model.name={name!r}: {differ[0]} differs between the hosts of processes 0 and {rank}"
            raise ValueError(f"{said}: copy the same files to each host, or name a folder that they share")


def take_over(policy: CausalPolicy, short: CausalPolicy) -> None:
    """Lets a policy compute as one with fewer layers settled it, and moves its adapters to the device."""
    for parameter in (p for p in policy.model.parameters() if not is_hollow(p)):
        parameter.data = parameter.data.to(policy.device)
    policy.model.generation_config = short.model.generation_config
    policy.packing_fault, policy.long_factors = short.packing_fault, short.long_factors
    policy.scorer.longest, policy.scorer.padded = short.scorer.longest, short.scorer.padded
    if policy.long_factors:
        take_long_factors(policy.model)
    policy.set_packed(short.scorer.packed)


def one_by_one(batch: MicroBatch) -> list[MicroBatch]:
    """The same rows with one micro-batch per episode, in which each row is a model call."""
    episodes: dict[tuple[int, int], list[list[Row]]] = {}
    for row in batch.rows:
        episodes.setdefault(row.episode, []).append([row])
    return [micro_batch_of(rows) for rows in episodes.values()]


def with_rows(batch: MicroBatch, number: int) -> MicroBatch:
    """The batch with `number` rows or more; added rows have no loss tokens, so they change nothing."""
    if number <= len(batch.rows):
        return batch
    blank = Completion([0], [0.0], [False], "stop", [])
    further = replace(batch.rows[-1], prompt=IDLE, completion=blank, advantage=0.0)
    return micro_batch_of([[row] for row in (*batch.rows, *[further] * (number - len(batch.rows)))])


class GatheredWeights:
    """A policy's weights, each rounded and then gathered on every process, one after another."""

    def __init__(self, weights: WeightStream, dtype: torch.dtype) -> None:
        self.weights, self.dtype, self.canary = weights, dtype, weights.canary

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.weights:
            yield name, gathered(tensor.to(self.dtype) if tensor.is_floating_point() else tensor)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor. Collective if it is split."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def make_mesh(device: torch.device, size: int, sharding: str) -> DeviceMesh:
    """The mesh of processes over which weights are split; for hybrid [hosts, processes of a host].

    Raises:
        ValueError: hybrid on a single host, or hosts with different numbers of processes.
    """
    if sharding == "full":
        return init_device_mesh(device.type, (size,))
    own = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if own == size or size % own:
        raise ValueError(
            "train.sharding=hybrid splits weights over the processes of a host, with a copy on each host, "
            f"but {own} of {size} processes are on this one; use train.sharding=full"
        )
    return init_device_mesh(device.type, (size // own, own), mesh_dim_names=("hosts", "cards"))


def shard(scorer: Any, mesh: DeviceMesh, *, compute: torch.dtype) -> None:
    """Splits a model in place (`units`); it then computes in the dtype `compute`."""
    policy = MixedPrecisionPolicy(compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*units(scorer.model), scorer):
        give_memory(module, torch.device(mesh.device_type))
        # The root is resharded too: between passes, names and optimizer must see shards, not whole tensors.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for module in scorer.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo supports only the factor 1 and the mean
    for name in ENTRIES:  # they do not go through forward, whose hooks gather
        if hasattr(scorer, name):
            register_fsdp_forward_method(scorer, name)


def deal_tensors(named: dict[str, Tensor], size: int) -> list[int]:
    """The process that writes each tensor: consecutive spans of about equally many bytes."""
    total, before, owners = sum(t.nbytes for t in named.values()), 0, []
    for tensor in named.values():
        owners.append(before * size // max(total, 1))
        before += tensor.nbytes
    return owners
