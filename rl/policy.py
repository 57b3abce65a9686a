"""What the loop needs of a model that is trained, and of the one that it is compared with.

`rl.causal.CausalPolicy` is a policy, and so is anything with these methods (`recipes/kinds.py` names others).
A policy owns what is random or replayed in a forward pass: it draws once, in `prepare`, for every model.
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
"""Writes what it holds into a folder; called on every process."""


@dataclass(frozen=True)
class Prepared:
    """A micro-batch on its device, ready to be scored any number of times.

    Attributes:
        drawn: what the policy drew or replays for it (masks, routes); no one else looks at it.
        is_idle: it weighs nothing and counts nowhere; it keeps processes in step.
    """

    batch: MicroBatch
    drawn: Any = field(default=None, repr=False)
    is_idle: bool = False


@dataclass(frozen=True)
class Scores:
    """What a model says about the L loss tokens of a micro-batch, in nats, at the sampling temperature.

    Attributes:
        logprobs_LK: log-probs of the K asked ids at each loss token.
        rest_L: log of the mass of all ids that were not asked for.
        ids_LK: the asked ids, where the model chose them itself.
        extra_loss: a scalar that is added to the loss, such as a balance of experts; its share of the step's.
        metrics: name -> (sum, count) over what this micro-batch holds.
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
        """Adds the gradient of `loss`; gradients may be reduced over processes on the last of a step."""
        ...

    def finish_gradients(self, max_norm: float) -> float:
        """Sums gradients over processes (weights are global shares), clips them, and returns the norm before.

        Collective. The norm is not finite where any gradient is not.
        """
        ...

    def snapshot(self, optimizer: torch.optim.Optimizer) -> Writer:
        """Collective. What writes the weights in Hugging Face form, and the optimizer's state beside them."""
        ...

    def load(self, folder: Path, optimizer: torch.optim.Optimizer) -> None:
        """Collective. Puts back, bit for bit, what a snapshot wrote; each process reads what it holds."""
        ...


class Policy(Trained, Protocol):
    """A model that scores sampled completions.

    Attributes:
        shares_prompts: a prompt is computed once for all its completions in a micro-batch.
        redraws: its log-probs are estimates on what it draws, anew for each pass over a batch.
        in_step: its forward passes are collective; `prepare` pads with idle ones to equally many everywhere.
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
        """One per micro-batch, and idle ones; `draw` numbers the passes over the batch. Writes to nothing."""
        ...

    def score(self, prepared: Prepared, *, ids_LK: Int[Tensor, "L K"] | None = None) -> Scores:
        """Log-probs of the loss tokens, with a graph if gradients are on; of `ids_LK` as well if given."""
        ...

    def step_metrics(self) -> dict[str, float]:
        """Numbers of the step that ended, over all processes, besides those of its scores. Collective."""
        ...


class Reference(Protocol):
    """The model of the KL term: frozen, or following the policy. It sees what the policy drew."""

    def logprobs(self, prepared: Prepared) -> Float[Tensor, " L"]:
        """Log-probs of the loss tokens, without a graph."""
        ...

    def follow(self, policy: Any, mixup: float) -> None:
        """reference <- mixup * policy + (1 - mixup) * reference."""
        ...

    def snapshot(self) -> Writer | None:
        """What writes its state into a checkpoint; None if it is loaded again from where it came."""
        ...

    def load(self, folder: Path) -> None:
        """Puts back what its snapshot wrote."""
        ...
