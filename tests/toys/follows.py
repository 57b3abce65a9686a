"""A policy with a reference of its own that follows it, and that a checkpoint has to keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rl.batch import Batch
from rl.policy import Prepared, Scores
from rl.store.metrics import Metric
from rl.store.optimizer_state import load_optimizer, optimizer_writer
from rl.store.tensors import read_tensors, write_tensors
from rl.together import SummedGradients

SETTINGS = ["loss.kl_coef=0.2", "model.reference={update_every: 1, mixup: 0.25}"]
METRIC = Metric("toy/largest", "nats", "largest logit")


class Table:
    shares_prompts = redraws = in_step = False

    def __init__(self, world: Any) -> None:
        self.device, self.step_metrics = torch.device("cpu"), dict
        self.table = nn.Parameter(torch.zeros(12, 12))

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [("table", self.table)]

    def weights(self) -> Any:
        return [("table", self.table.detach())]

    def prepare(self, batch: Batch, *, draw: int) -> list[Prepared]:
        return [Prepared(micro_batch) for micro_batch in batch.micro_batches]

    def score(self, prepared: Prepared, *, ids_LK: Any = None) -> Scores:
        chosen, largest = chosen_logprobs(self.table, prepared), self.table.detach().max()
        return Scores(chosen, 0 * chosen, metrics={"toy/largest": (largest, torch.tensor(1.0))})

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def finish_gradients(self, max_norm: float) -> float:
        return SummedGradients(self.trainable, 1).finish(max_norm)

    def snapshot(self, optimizer: torch.optim.Optimizer) -> Any:
        write, table = optimizer_writer(optimizer, self.trainable()), {"table": self.table.detach()}
        return lambda folder: (save_file(table, folder / "model.safetensors"), write(folder))

    def load(self, folder: Path, optimizer: torch.optim.Optimizer) -> None:
        self.table.data.copy_(load_file(folder / "model.safetensors")["table"])
        load_optimizer(folder, optimizer, self.trainable())


def chosen_logprobs(table: Tensor, prepared: Prepared) -> Tensor:
    b = prepared.batch
    return table.log_softmax(-1)[b.token_ids_N[b.predecessors_L], b.targets_L]


class Follower:
    def __init__(self, policy: Table) -> None:
        self.table = policy.table.detach().clone()

    def logprobs(self, prepared: Prepared) -> Tensor:
        return chosen_logprobs(self.table, prepared)

    def follow(self, policy: Table, mixup: float) -> None:
        self.table.lerp_(policy.table.detach(), mixup)

    def snapshot(self) -> Any:
        return lambda folder: write_tensors(folder, "reference", {"table": self.table})

    def load(self, folder: Path) -> None:
        read_tensors(folder, "reference", {"table": self.table})


make_policy, make_reference = Table, Follower
