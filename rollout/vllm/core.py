"""A vLLM engine core behind one interface, neutral of vLLM's own types: requests in, answers out.

`rollout.vllm.local` has one in this process and one in a process beside it. Every wait is bounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from rl.types import FinishReason, SamplingParams, VersionSpan
from rollout.fingerprint import HeldTensor


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished request.

    Attributes:
        logprobs: nats, one per token; empty if they were not asked for.
        version_spans: which weights sampled which tokens.
        prompt_logprobs: of prompt tokens after the first, if they were asked for.
        routes: experts per token and layer, or None.
    """

    request_id: str
    token_ids: list[int]
    logprobs: list[float]
    version_spans: list[VersionSpan]
    finish_reason: FinishReason
    prompt_logprobs: list[float] | None = field(default=None, repr=False)
    routes: Any = field(default=None, repr=False)


class Core(Protocol):
    """Samples requests with weights of one version at a time.

    Attributes:
        runs_alone: it samples while nobody calls it, in a process of its own.
        is_on_cpu: it computes on the CPU.
        seeds_are_free: seeds of requests cost no kernel of their own.
        device: where weights may be sent from without a copy.
        vocab_size: ids that a prompt may have.
    """

    runs_alone: bool
    is_on_cpu: bool
    seeds_are_free: bool
    device: torch.device
    vocab_size: int

    def add(
        self,
        token_ids: list[int],
        sampling: SamplingParams,
        *,
        ids: Sequence[str],
        seeds: Sequence[int | None],
        with_logprobs: bool,
        with_prompt_logprobs: bool = False,
    ) -> None:
        """Starts one request per id and seed. Requests of different weights share no cached prompts."""
        ...

    def abort(self, ids: Sequence[str]) -> None:
        """Ends requests, of which nothing is answered then."""
        ...

    def answers(self, *, timeout_s: float, waiting_for: str) -> list[Answer]:
        """Requests that finished; waits at most `timeout_s` for the first.

        Raises:
            EngineError: the core failed, or its process died.
        """
        ...

    def pause(self) -> None:
        """Holds all requests where they are, with no step in flight."""
        ...

    def resume(self, version: int) -> None:
        """Goes on with the weights that it holds, which are of this version."""
        ...

    def load(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Replaces the weights under held requests, which then go on.

        Raises:
            ValueError: the model has no weight of that name.
        """
        ...

    def describe(self) -> Mapping[str, HeldTensor]:
        """Every parameter, under Hugging Face names."""
        ...

    def fingerprints(self) -> Mapping[str, int]:
        """Hashes of what the core really holds (`rollout.fingerprint`)."""
        ...

    def close(self) -> None:
        """Ends the core and its process; safe to call twice."""
        ...
