"""How evenly a mixture uses its experts, and how far its routing has moved since the run began."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rl.moe.balance import Load, seeing
from rl.moe.routers import RouterSite
from rl.store.rows import RowLog

FILE = "experts.jsonl"  # in a run folder; rl.report draws it
LEAST_START = 0.5  # least violation that growth is measured from: after an even start, noise would be growth
WINDOW = 64  # mean choices per expert after which an expert without any counts as dead
_MAX_ROWS = 50


def load_metrics(counts_LE: Float[Tensor, "L E"]) -> dict[str, float]:
    """entropy / log E, max f E - 1 (mean and worst layer) and min f E, where f are shares of choices."""
    f_LE = counts_LE / counts_LE.sum(-1, keepdim=True).clamp(min=1)
    num_experts = f_LE.shape[1]
    entropy_L = -(f_LE * f_LE.clamp(min=1e-12).log()).sum(-1) / math.log(max(num_experts, 2))
    violation_L = f_LE.amax(-1) * num_experts - 1
    return {
        "moe/load_entropy": entropy_L.mean().item(),
        "moe/max_violation": violation_L.mean().item(),
        "moe/max_violation_layer": violation_L.max().item(),
        "moe/min_load": f_LE.min().item() * num_experts,
    }


def overlap(routes_LTK: Int[Tensor, "L T K"], others_LTK: Int[Tensor, "L T K"]) -> float:
    """Mean over tokens and layers of |A and B| / |A or B| of a token's experts (Jaccard); 1: equal."""
    both_LT = (routes_LTK[..., :, None] == others_LTK[..., None, :]).sum((-1, -2)).double()
    return (both_LT / (2 * routes_LTK.shape[-1] - both_LT)).mean().item()


@torch.no_grad()
def routes_of(
    compute: Callable[[Tensor], Any], sites: list[RouterSite], ids_1T: Int[Tensor, "1 T"]
) -> Int[Tensor, "L T K"]:
    """The experts that each layer chooses for a row of token ids, as `compute` runs the model."""
    with seeing(sites) as seen:
        compute(ids_1T)
    return torch.stack([seen.experts[site.name][0] for site in sites]).cpu().long()


class Health:
    """Metrics of routing, step by step, and the file from which the report draws the load of every expert.

    The file's first row holds the routing at the start, with which a resumed run compares too.
    """

    def __init__(self, run_dir: Path | None, *, top_k: int, num_steps: int) -> None:
        self.top_k, self._every = top_k, max(1, num_steps // _MAX_ROWS)
        self._log = None if run_dir is None else RowLog(run_dir / FILE)
        rows = self._log.read() if self._log is not None else []
        self._start: dict[str, Any] = rows[0]["start"] if rows and "start" in rows[0] else {}
        self._window: Tensor | None = None
        self._dead: float | None = None
        self._latest: Tensor | None = None

    def step(self, load: Load, routes_LTK: Tensor | None = None) -> dict[str, float]:
        """The metrics of a step with this load over all processes; `routes_LTK` are those of a fixed row."""
        counts_LE = self._latest = load.counts_LE.cpu()
        if not counts_LE.sum():
            return {}
        values = load_metrics(counts_LE)
        violation = self._start.setdefault("violation", values["moe/max_violation"])
        values["moe/violation_growth"] = values["moe/max_violation"] / max(violation, LEAST_START)
        self._window = counts_LE if self._window is None else self._window + counts_LE
        if self._window.sum(-1).min() >= WINDOW * counts_LE.shape[1]:
            self._dead, self._window = (self._window == 0).double().mean().item(), None
        if self._dead is not None:
            values["moe/dead_experts"] = self._dead
        if routes_LTK is not None:
            start = self._start.setdefault("routes", routes_LTK.tolist())
            values["moe/start_overlap"] = overlap(routes_LTK, torch.tensor(start))
        return values

    def write(self, step: int) -> None:
        """Writes the step's load in per cent of an even one; a long run skips steps."""
        if self._log is None or self._latest is None or (step > 1 and step % self._every):
            return
        f_LE = self._latest / self._latest.sum(-1, keepdim=True).clamp(min=1)
        row: dict[str, Any] = {"step": step, "load": (100 * f_LE * f_LE.shape[1]).round().int().tolist()}
        is_first = not any(earlier["step"] < step for earlier in self._log.read())
        self._log.replace(row | ({"start": self._start} if is_first else {}))

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
