"""A policy that hides some of what precedes a token, and hides anew in each pass over a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rl.batch import Batch, MicroBatch
from rl.policy import Prepared, Scores
from rl.store.metrics import Metric
from rl.store.optimizer_state import load_optimizer, optimizer_writer
from rl.together import SummedGradients
from rl.world import World

SETTINGS = ["loss.kl_coef=0", "train.num_epochs=2"]
METRIC = Metric("toy/hidden", "share", "tokens whose predecessor was hidden")
HIDDEN = 0


class Redraws:
    shares_prompts, redraws, in_step = False, True, False

    def __init__(self, world: World) -> None:
        self.world, self.device, self.step_metrics = world, torch.device("cpu"), dict
        self.table = nn.Parameter(torch.zeros(12, 12))

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [("table", self.table)]

    def weights(self) -> Any:
        return [("table", self.table.detach())]

    def prepare(self, batch: Batch, *, draw: int) -> list[Prepared]:
        return [self._drawn(micro_batch, draw) for micro_batch in batch.micro_batches]

    def _drawn(self, micro_batch: MicroBatch, draw: int) -> Prepared:
        generator = torch.Generator().manual_seed(int(micro_batch.token_ids_N.sum()) * 10 + draw)
        hide = torch.rand(len(micro_batch.columns_L), generator=generator) < 0.3
        return Prepared(micro_batch, hide)

    def score(self, prepared: Prepared, *, ids_LK: Any = None) -> Scores:
        batch, hide = prepared.batch, prepared.drawn
        seen = batch.token_ids_N[batch.predecessors_L].masked_fill(hide, HIDDEN)
        logprobs = self.table[seen].log_softmax(-1)
        return Scores(
            logprobs.gather(-1, batch.targets_L[:, None])[:, 0],
            -(logprobs.exp() * logprobs).sum(-1),
            metrics={"toy/hidden": (hide.sum(), torch.tensor(float(len(hide))))},
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


make_policy = Redraws


def make_reference(policy: Redraws) -> None:
    return None
