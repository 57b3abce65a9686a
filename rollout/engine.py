"""The Engine protocol: prompts in, groups of completions out, and the policy's weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

from torch import Tensor

from rl.types import Call, Group, Prompt
from rollout.fingerprint import HeldTensor

WEIGHTS_UNKNOWN = -1


class EngineError(RuntimeError):
    """The engine cannot serve a call: all prompts failed, time ran out, or its weights are unknown."""


class Engine(Protocol):
    """Samples completions with the policy's weights of one version.

    Attributes:
        name: "transformers" or "vllm", for logs.
        version: policy version whose weights it holds; WEIGHTS_UNKNOWN after an update that broke off.
        tensors: every parameter it holds, under Hugging Face names.
        runs_alone: it samples while nobody calls it, in a process of its own.
        held_while_training: it shares a GPU with the trainer, which calls `hold` before it computes.
        sleeps_while_training: it frees its memory meanwhile; the trainer calls `hold(release=True)`.
    """

    name: str
    runs_alone: bool
    held_while_training: bool
    sleeps_while_training: bool
    tensors: Mapping[str, HeldTensor]

    @property
    def version(self) -> int: ...

    @property
    def in_flight(self) -> int:
        """Completions that were submitted and not collected yet."""
        ...

    def submit(self, call: Call) -> None:
        """Begins to sample; `collect` hands the groups out.

        Raises:
            EngineError: the weights are unknown, or the engine is dead.
        """
        ...

    def collect(self, *, timeout_s: float) -> list[Group]:
        """Groups that are finished, in the order in which they finished; none if `timeout_s` passed before.

        `group.prompt` is the object that was submitted. A completion that failed is an "abort" in its group:
        unlike `generate`, this raises nothing even when all did.

        Raises:
            EngineError: the engine died; it names what was waited for.
        """
        ...

    def abort(self, prompts: Collection[Prompt]) -> None:
        """Gives up what was submitted for prompts of these ids and not collected yet. It is not handed out,
        and is no longer in flight.
        """
        ...

    def generate(self, call: Call) -> list[Group]:
        """One Group per prompt, in order. Completions end at `sampling.stop_token_ids`, the id included, or
        after the token that completes one of `sampling.stop`.

        A completion does not depend on what else is sampled, up to the rounding of the kernels. With
        temperature 0 the log-probs are those of the distribution at temperature 1. What was submitted stays
        in flight.

        Raises:
            EngineError: every completion failed, or nothing was finished within the time limit. If only
                some failed, their `finish_reason` is "abort".
        """
        ...

    def hold(self, *, release: bool = False) -> None:
        """Pauses what is in flight, until new weights come or a call waits for completions.

        Args:
            release: an engine that `sleeps_while_training` drops weights and cache. Until `update_weights`,
                it takes no call except `close`; what is in flight then goes on with its cache recomputed.

        Raises:
            EngineError: it sleeps.
        """
        ...

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Replaces every weight, of any dtype and device. After an update that broke off, nothing is sampled.

        Allowed while completions are in flight: they pause, none is aborted, and their `version_spans` say
        which version sampled which token.
        """
        ...

    def adopt(self, version: int) -> None:
        """Notes that another process has sent this version's weights to the engine that both use."""
        ...

    def fingerprints(self) -> Mapping[str, int]:
        """Hashes of what the engine really holds, one for each of `tensors` (`rollout.fingerprint`)."""
        ...

    def prompt_logprobs(self, token_ids: list[int]) -> list[float]:
        """log p(ids[i] | ids[:i]) for i >= 1 at temperature 1: the canary of a weight sync."""
        ...

    def close(self) -> None:
        """Frees the model; safe to call twice."""
        ...
