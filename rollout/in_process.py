"""What engines have in common that sample in this process, on their own copy of a transformers model."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rl.model.streamed import streamed
from rl.types import Call, Group, Prompt
from rollout.calls import Sampled, aborted, check_groups, check_weights
from rollout.engine import WEIGHTS_UNKNOWN
from rollout.fingerprint import HeldTensor, compared_part, fingerprints


class InProcessEngine(ABC):
    """Samples one whole call after another, only while it is called, each with the weights of that moment."""

    name: str
    model: Any
    runs_alone = held_while_training = sleeps_while_training = False

    def __init__(self, model: Any, tokenizer: Any, *, max_num_seqs: int, timeout_s: float) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.max_num_seqs, self.timeout_s, self.version = max_num_seqs, timeout_s, 0
        held = {name: HeldTensor(tuple(p.shape), p.dtype, p.device, name) for name, p in streamed(model)}
        self.tensors: Mapping[str, HeldTensor] = held
        self._calls: list[Call] = []

    @abstractmethod
    def _sampled(self, call: Call, deadline: float) -> Sampled:
        """What was sampled before `deadline` of time.monotonic(); the rest is aborted."""

    @abstractmethod
    def prompt_logprobs(self, token_ids: list[int]) -> list[float]: ...

    @property
    def in_flight(self) -> int:
        return sum(len(call.prompts) * call.num_completions for call in self._calls)

    def submit(self, call: Call) -> None:
        """Only notes the call: `collect` samples it."""
        check_weights(self)
        self._calls.append(call)

    def collect(self, *, timeout_s: float) -> list[Group]:
        """Samples all submitted calls; only the engine's own `timeout_s` bounds how long each takes."""
        if self._calls:
            check_weights(self)
        calls, self._calls = self._calls, []
        return [group for call in calls for group in self._groups(call)[0]]

    def generate(self, call: Call) -> list[Group]:
        check_weights(self)
        groups, faults, is_late = self._groups(call)
        check_groups(groups, faults, self.timeout_s, late=is_late)
        return groups

    def _groups(self, call: Call) -> tuple[list[Group], dict[int, str], bool]:
        deadline = time.monotonic() + self.timeout_s
        done, faults = self._sampled(call, deadline)
        groups = [
            Group(prompt, [done.get((i, g), aborted()) for g in range(call.num_completions)])
            for i, prompt in enumerate(call.prompts)
        ]
        return groups, faults, time.monotonic() > deadline

    def abort(self, prompts: Collection[Prompt]) -> None:
        given_up = {prompt.id for prompt in prompts}
        calls, self._calls = self._calls, []
        for call in calls:
            pairs = zip(call.prompts, call.seeds, strict=True)
            if left := [(prompt, seed) for prompt, seed in pairs if prompt.id not in given_up]:
                kept, seeds = zip(*left, strict=True)
                self._calls.append(replace(call, prompts=kept, seeds=seeds))

    def hold(self, *, release: bool = False) -> None:
        return  # it samples only while it is called

    @torch.no_grad()
    def update_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Raises ValueError for a name or shape that the model lacks; weights before it have been copied."""
        self.version, own = WEIGHTS_UNKNOWN, dict(streamed(self.model))
        for name, tensor in weights:
            if name not in own or own[name].shape != tensor.shape:
                raise ValueError(
                    f"this model has no weight {name} of shape {tuple(tensor.shape)}; send the same model's"
                )
            own[name].copy_(tensor)
        self.version = version

    def adopt(self, version: int) -> None:
        self.version = version

    def fingerprints(self) -> dict[str, int]:
        own = streamed(self.model)
        return fingerprints((name, compared_part(p, self.tensors[name], self.version)) for name, p in own)

    def close(self) -> None:
        self.model = None
