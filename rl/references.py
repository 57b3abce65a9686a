"""References of the KL term: a copy of the policy, frozen or following it, or the base below an adapter.

They score through their policy, and so with its draws and its way of computing.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rl.model.hollow import is_hollow
from rl.model.on_host import layers_to_host, narrow_matrices
from rl.model.streamed import streamed
from rl.policy import Prepared, Reference, Scores, Writer
from rl.store.tensors import read_tensors, write_tensors

KIND = "reference"


class Scoring(Protocol):
    """What references need of a policy.

    Attributes:
        peft_model: peft's wrapper, or None without an adapter.
    """

    peft_model: Any

    @property
    def device(self) -> torch.device: ...

    def autocast(self) -> AbstractContextManager[Any]: ...

    @property
    def scorer(self) -> nn.Module: ...

    def score_by(self, scorer: nn.Module, prepared: Prepared) -> Scores:
        """What `score` computes, with the weights of `scorer`."""
        ...


def make_reference(
    policy: Scoring, *, moves: bool, hosted: bool = False, is_split: bool = False
) -> Reference:
    """A reference equal to the policy as it is now; with `moves` it will `follow`, so checkpoints save it.

    Args:
        hosted: the layers of a copy stay in host memory and come to the device one at a time.
        is_split: it will be split over processes, which needs weights of one dtype. Else a copy that does
            not move keeps matrices in the dtype to which autocast casts them.
    """
    if policy.peft_model is not None:
        return BaseModel(policy)
    return Copy(policy, moves=moves, hosted=hosted, narrow=not (moves or is_split))


class Copy:
    """A copy of the policy's model."""

    def __init__(self, policy: Scoring, *, moves: bool, hosted: bool = False, narrow: bool = False) -> None:
        self.policy, self.moves = policy, moves
        hollow = {id(p): nn.Parameter(p.detach(), False) for p in policy.scorer.parameters() if is_hollow(p)}
        self.scorer = copy.deepcopy(policy.scorer, hollow).requires_grad_(False).eval()
        model, kind = cast(Any, self.scorer).model, policy.device.type
        with policy.autocast():
            if narrow and torch.is_autocast_enabled(kind):
                narrow_matrices(model, torch.get_autocast_dtype(kind))
        if hosted:
            layers_to_host(model)

    @torch.no_grad()
    def logprobs(self, prepared: Prepared) -> Float[Tensor, " L"]:
        return self.policy.score_by(self.scorer, prepared).logprobs_L

    @torch.no_grad()
    def follow(self, policy: Scoring, mixup: float) -> None:
        for (_, theirs), (_, ours) in zip(streamed(self.scorer), streamed(policy.scorer), strict=True):
            here = theirs.to(ours.device)  # where the policy is, as without memory.reference_on_host
            here.lerp_(ours.to(theirs.dtype), mixup)
            if here is not theirs:
                theirs.copy_(here)

    def snapshot(self) -> Writer | None:
        tensors = self.scorer.state_dict()
        return (lambda folder: write_tensors(folder, KIND, tensors)) if self.moves else None

    def load(self, folder: Path) -> None:
        if self.moves:
            read_tensors(folder, KIND, self.scorer.state_dict())


class BaseModel:
    """The base model below the policy's adapter; only the adapter is trained."""

    def __init__(self, policy: Scoring) -> None:
        self.policy = policy

    @torch.no_grad()
    def logprobs(self, prepared: Prepared) -> Float[Tensor, " L"]:
        with self.policy.peft_model.disable_adapter():
            return self.policy.score_by(self.policy.scorer, prepared).logprobs_L

    def follow(self, policy: Scoring, mixup: float) -> None:
        raise ValueError("the base model below an adapter cannot follow: it is not a copy")

    def snapshot(self) -> Writer | None:
        return None

    def load(self, folder: Path) -> None:
        return
