"""The protocols of the model being trained (`Policy`) and of the model in the KL term (`Reference`).

`rl.causal.CausalPolicy` is a policy; `recipes/kinds.py` names others. A policy owns what is random or
replayed in a forward pass: it draws once, in `prepare`, and the reference scores with the same draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rl.batch import Batch, MicroBatch
from rl.types import WeightStream

Writer = Callable[[Path], None]
"""Writes a snapshot into a folder; every process calls it."""


@dataclass(frozen=True)
class Prepared:
    """A micro-batch on its device, ready to be scored any number of times.

    Attributes:
        drawn: what the policy drew or replays for it (masks, routes); only the policy reads it.
        is_idle: a dummy of weight 0 that counts nowhere; it keeps collective model calls in step.
    """

    batch: MicroBatch
    drawn: Any = field(default=None, repr=False)
    is_idle: bool = False


@dataclass(frozen=True)
class Scores:
    """What a model says about the L loss tokens of a micro-batch, in nats, at the sampling temperature.

    Attributes:
        logprobs_LK: log-probs of the K requested ids at each loss token.
        rest_L: log of the total probability of all other ids.
        ids_LK: the K ids, where the model chose them itself.
        extra_loss: a scalar to add to the loss, such as a load-balancing term; this micro-batch's share.
        metrics: name -> (sum, count) over this micro-batch.
    """

    logprobs_L: Float[Tensor, " L"]
    entropy_L: Float[Tensor, " L"]
    logprobs_LK: Float[Tensor, "L K"] | None = None
    rest_L: Float[Tensor, " L"] | None = None
    ids_LK: Int[Tensor, "L K"] | None = None
    extra_loss: Tensor | None = None
    metrics: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Trained(Protocol):
    """What every loop needs of a model that is trained (`rl.driver`)."""

    @property
    def device(self) -> torch.device: ...

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that the optimizer moves, by name."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradient of `loss`; on the last call of a step it may start to sum over processes."""
        ...

    def finish_gradients(self, max_norm: float) -> float:
        """Sums gradients over processes (no mean: weights are global), clips; returns the norm before that.

        Collective. The norm is not finite if any gradient is not.
        """
        ...

    def snapshot(self, optimizer: torch.optim.Optimizer) -> Writer:
        """A writer of the weights in Hugging Face form and of the optimizer's state. Collective."""
        ...

    def load(self, folder: Path, optimizer: torch.optim.Optimizer) -> None:
        """Restores bit for bit what a snapshot wrote; each process reads only its share. Collective."""
        ...


class Policy(Trained, Protocol):
    """A model that scores sampled completions.

    Attributes:
        shares_prompts: a prompt is computed once for all its completions in a micro-batch.
        redraws: its log-probs are estimates from random draws, which it renews for each pass over a batch.
        in_step: its forward passes are collective; `prepare` adds idle ones until all processes have as many.
    """

    @property
    def shares_prompts(self) -> bool: ...
    @property
    def redraws(self) -> bool: ...
    @property
    def in_step(self) -> bool: ...

    def weights(self) -> WeightStream:
        """All weights, for the engine."""
        ...

    def prepare(self, batch: Batch, *, draw: int) -> list[Prepared]:
        """One per micro-batch, and idle ones. `draw` is the number of the pass; `batch` is not changed."""
        ...

    def score(self, prepared: Prepared, *, ids_LK: Int[Tensor, "L K"] | None = None) -> Scores:
        """Log-probs of the loss tokens, and of `ids_LK` if given; with a graph if gradients are on."""
        ...

    def step_metrics(self) -> dict[str, float]:
        """Metrics of the step that ended, over all processes, besides `Scores.metrics`. Collective."""
        ...


class Reference(Protocol):
    """The model in the KL term: frozen, or following the policy. It scores with the policy's draws."""

    def logprobs(self, prepared: Prepared) -> Float[Tensor, " L"]:
        """Log-probs of the loss tokens, without a graph."""
        ...

    def follow(self, policy: Any, mixup: float) -> None:
        """reference <- mixup * policy + (1 - mixup) * reference."""
        ...

    def snapshot(self) -> Writer | None:
        """A writer of its state into a checkpoint; None if it can be loaded from its source again."""
        ...

    def load(self, folder: Path) -> None:
        """Restores what its snapshot wrote."""
        ...
