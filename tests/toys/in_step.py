"""A policy whose forward passes are collective: a process without work has to take part in each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rl.batch import Batch, idle_micro_batch
from rl.policy import Prepared, Scores
from rl.store.metrics import Metric
from rl.store.optimizer_state import load_optimizer, optimizer_writer
from rl.together import SummedGradients
from rl.world import World

SETTINGS = ["loss.kl_coef=0"]
METRIC = Metric("toy/processes", "processes", "how many computed a micro-batch together")


class InStep:
    shares_prompts, redraws, in_step = False, False, True

    def __init__(self, world: World) -> None:
        self.world, self.device, self.step_metrics = world, torch.device("cpu"), dict
        self.table = nn.Parameter(torch.zeros(12, 12))

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [("table", self.table)]

    def weights(self) -> Any:
        return [("table", self.table.detach())]

    def prepare(self, batch: Batch, *, draw: int) -> list[Prepared]:
        mine = [Prepared(micro_batch) for micro_batch in batch.micro_batches]
        most = int(self.world.max([len(mine)])[0])
        return mine + [Prepared(idle_micro_batch(), is_idle=True)] * (most - len(mine))

    def score(self, prepared: Prepared, *, ids_LK: Any = None) -> Scores:
        met = len(self.world.gather(len(prepared.batch.columns_L)))  # as a sharded layer gathers its weights
        batch = prepared.batch
        logprobs = self.table[batch.token_ids_N[batch.predecessors_L]].log_softmax(-1)
        return Scores(
            logprobs.gather(-1, batch.targets_L[:, None])[:, 0],
            -(logprobs.exp() * logprobs).sum(-1),
            metrics={"toy/processes": (torch.tensor(float(met)), torch.tensor(1.0))},
        )

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()

    def finish_gradients(self, max_norm: float) -> float:
        return SummedGradients(self.trainable, self.world.size).finish(max_norm)

    def snapshot(self, optimizer: torch.optim.Optimizer) -> Any:
        write_optimizer = optimizer_writer(optimizer, self.trainable())

        def write(folder: Path) -> None:
            if self.world.is_main:
                save_file({"table": self.table.detach()}, folder / "model.safetensors")
            write_optimizer(folder)

        return write

    def load(self, folder: Path, optimizer: torch.optim.Optimizer) -> None:
        self.table.data.copy_(load_file(folder / "model.safetensors")["table"])
        load_optimizer(folder, optimizer, self.trainable())


make_policy = InStep


def make_reference(policy: InStep) -> None:
    return None
