"""The processes of a run: sums, maxima and agreement over them. One process needs no communication."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor

PEER_WAIT_S = 1800.0


def make_accelerator(engine_timeout_s: float = 0.0) -> Accelerator:
    """On this process's GPU, or on the CPU where there is none.

    Processes wait for each other at most `PEER_WAIT_S`, or three times what one of them may wait for its
    engine. NCCL's own ten minutes are no more than that wait, and end a process by SIGABRT.
    """
    waits = InitProcessGroupKwargs(timeout=timedelta(seconds=max(PEER_WAIT_S, 3 * engine_timeout_s)))
    return Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[waits])


@dataclass(frozen=True)
class World:
    """All processes call each method equally often."""

    accelerator: Accelerator

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def size(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """The numbers of every process, in rank order; exact for integers up to 2^53."""
        if self.size == 1:
            return [list(values)]
        mine = torch.tensor([list(values)], dtype=torch.float64, device=self.accelerator.device)
        return cast(Tensor, self.accelerator.gather(mine)).tolist()

    def sum(self, values: Sequence[float]) -> list[float]:
        return [sum(column) for column in zip(*self.gather(values), strict=True)]

    def max(self, values: Sequence[float]) -> list[float]:
        return [max(column) for column in zip(*self.gather(values), strict=True)]

    def any(self, wish: bool) -> bool:
        return self.sum([float(wish)])[0] > 0

    def all(self, wish: bool) -> bool:
        return self.sum([float(wish)])[0] == self.size

    def gather_ints(self, value: int) -> list[int]:
        return [int(row[0]) for row in self.gather([float(value)])]

    def gather_objects(self, mine: Any) -> list[Any]:
        """A small object of every process, in rank order."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, mine)
        return found

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def end(self) -> None:
        """The last that a process does in a run that ended well: none leaves before the others are done."""
        if self.size > 1:
            self.wait()
            torch.distributed.destroy_process_group()
