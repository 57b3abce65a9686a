"""vLLM as an engine: prompts into requests, finished requests into groups, weights under running requests."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rl.types import Call, Completion, Group, Prompt, SamplingParams
from rollout.calls import aborted, check_groups, check_weights, completion, decode_texts, prompt_faults
from rollout.engine import WEIGHTS_UNKNOWN, EngineError
from rollout.fingerprint import HeldTensor
from rollout.sampler import completion_seed
from rollout.vllm.core import Answer, Core


@dataclass(slots=True, eq=False)
class Flight:
    """A prompt whose completions are being sampled; an unfinished one is None."""

    prompt: Prompt
    completions: list[Completion | None]
    for_collect: bool
    stop: tuple[str, ...]

    @property
    def is_done(self) -> bool:
        return None not in self.completions


class VllmEngine:
    """Stock vLLM (V1 engine core) as an engine; weights go in through vLLM's own reload.

    Args:
        core: `rollout.vllm.local.start_core` starts one.
        tokenizer: a transformers tokenizer; turns completions into text and is used for nothing else.
        max_model_len: longest prompt plus completion, in tokens.
        seed_requests: every completion draws from its own seed. Otherwise all draw from vLLM's one generator,
            and only a call's distribution can be repeated. Default: seeds where they are free, on a CPU and
            in vLLM's second model runner (dense models on a GPU). The first one launches a kernel per token.
            On a GPU equal seeds give equal completions up to rounding, which depends on the batch.
        sample_while_training: sample while the trainer computes, if the core has its own process. Off on a
            GPU by default, where the two would only take turns.
        timeout_s: longest wait for one `generate` call.
    """

    name = "vllm"

    def __init__(
        self,
        core: Core,
        tokenizer: Any,
        *,
        max_model_len: int,
        seed_requests: bool | None = None,
        sample_while_training: bool | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        goes_on = core.is_on_cpu if sample_while_training is None else sample_while_training
        self.runs_alone, self.held_while_training = core.runs_alone, core.runs_alone and not goes_on
        self.sleeps_while_training, self._is_asleep = core.sleeps, False
        self.tokenizer, self.version, self.device = tokenizer, 0, core.device
        self.timeout_s, self.max_model_len = timeout_s, max_model_len
        self.seed_requests = core.seeds_are_free if seed_requests is None else seed_requests
        self.tensors: Mapping[str, HeldTensor] = core.describe()
        self._core, self._is_held = core, False
        self._requests: dict[str, tuple[Flight, int]] = {}  # id -> flight, completion
        self._num_requests = self._num_submitted = 0
        self._landed: list[Flight] = []

    @property
    def in_flight(self) -> int:
        return self._num_submitted

    def submit(self, call: Call) -> None:
        self._check("sample")
        flights, _ = self._launch(call, for_collect=True)
        self._num_submitted += len(call.prompts) * call.num_completions
        self._landed += [flight for flight in flights if flight.is_done]

    def collect(self, *, timeout_s: float) -> list[Group]:
        self._check("hand out completions")
        deadline = time.monotonic() + timeout_s
        if timeout_s > 0:
            self._go_on()
        while not self._landed and self._num_submitted:
            self._advance(deadline, f"sampling {self._num_submitted} submitted completions")
            if time.monotonic() >= deadline:
                break
        groups, self._landed = self._groups(self._landed), []
        self._num_submitted -= sum(len(group.completions) for group in groups)
        return groups

    def generate(self, call: Call) -> list[Group]:
        self._check("sample")
        self._go_on()
        deadline = time.monotonic() + self.timeout_s
        flights, faults = self._launch(call, for_collect=False)
        what = f"sampling {len(call.prompts)} prompts x {call.num_completions} completions"
        while not all(flight.is_done for flight in flights) and time.monotonic() < deadline:
            self._advance(deadline, what)
        self._abandon(flights)
        groups = self._groups(flights)
        check_groups(groups, faults, self.timeout_s, late=time.monotonic() > deadline)
        return groups

    def abort(self, prompts: Collection[Prompt]) -> None:
        self._refuse_asleep("give up completions")
        given_up = {prompt.id for prompt in prompts}
        running = [flight for flight, _ in self._requests.values() if flight.for_collect]
        mine = {flight for flight in (*running, *self._landed) if flight.prompt.id in given_up}
        self._abandon(mine)
        self._landed = [flight for flight in self._landed if flight not in mine]
        self._num_submitted -= sum(len(flight.completions) for flight in mine)

    def hold(self, *, release: bool = False) -> None:
        self._refuse_asleep("be held")
        if release:
            self._core.sleep()
        else:
            self._core.pause()
        self._is_held, self._is_asleep = True, release

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        self.version = WEIGHTS_UNKNOWN
        self._core.load(weights, version=version)
        self.version, self._is_held, self._is_asleep = version, False, False

    def adopt(self, version: int) -> None:
        self._refuse_asleep("adopt weights")
        if not self._is_held:
            self._core.pause()
        self._core.resume(version)
        self.version, self._is_held = version, False

    def fingerprints(self) -> Mapping[str, int]:
        self._refuse_asleep("read its weights")
        return self._core.fingerprints()

    def prompt_logprobs(self, token_ids: list[int]) -> list[float]:
        self._check("score tokens")
        self._go_on()
        greedy, found = SamplingParams(1, temperature=0.0), None
        (request,) = self._start(token_ids, greedy, [None], with_logprobs=False, with_prompt_logprobs=True)
        deadline = time.monotonic() + self.timeout_s  # servers have answered by now
        what = f"the log-probs of {len(token_ids)} tokens"
        while found is None and time.monotonic() < deadline:
            found = next((a for a in self._advance(deadline, what) if a.request_id == request), None)
        if found is None or found.prompt_logprobs is None:
            self._core.abort([request])
            raise EngineError(f"{what} took longer than timeout_s={self.timeout_s:g}")
        return found.prompt_logprobs

    def close(self) -> None:
        self._core.close()
        self._requests, self._landed, self._num_submitted = {}, [], 0

    def _check(self, what: str) -> None:
        self._refuse_asleep(what)
        check_weights(self)

    def _refuse_asleep(self, what: str) -> None:
        if self._is_asleep:
            raise EngineError(
                f"engine {self.name} sleeps and cannot {what}: its weights and cache were dropped while the "
                "trainer computes; it takes update_weights alone, which wakes it"
            )

    def _launch(self, call: Call, *, for_collect: bool) -> tuple[list[Flight], dict[int, str]]:
        """Starts every completion that can be sampled: (a flight per prompt, why some prompts cannot)."""
        faults = prompt_faults(
            call.prompts, call.sampling, vocab_size=self._core.vocab_size, room=self.max_model_len
        )
        flights = []
        for index, (prompt, seed) in enumerate(zip(call.prompts, call.seeds, strict=True)):
            number = call.num_completions
            flight = Flight(prompt, [None] * number, for_collect, call.sampling.stop)
            flights.append(flight)
            if index in faults:
                flight.completions = [aborted() for _ in range(number)]
                continue
            base = completion_seed(seed)
            draws = [base + g if self.seed_requests else None for g in range(number)]
            ids = list(prompt.token_ids)
            started = self._start(ids, call.sampling, draws, with_logprobs=call.with_logprobs)
            for g, request in enumerate(started):
                self._requests[request] = (flight, g)
        return flights, faults

    def _start(
        self, token_ids: list[int], sampling: SamplingParams, seeds: Sequence[int | None], **wanted: bool
    ) -> list[str]:
        """Starts one request per seed; returns their ids."""
        requests = [str(self._num_requests + k) for k in range(len(seeds))]
        self._num_requests += len(seeds)
        self._core.add(token_ids, sampling, ids=requests, seeds=seeds, **wanted)  # type: ignore[arg-type]
        return requests

    def _go_on(self) -> None:
        """Ends a hold without new weights; running completions note it as an update to the same ones."""
        if self._is_held:
            check_weights(self)
            self._core.resume(self.version)
            self._is_held = False

    def _advance(self, deadline: float, waiting_for: str) -> list[Answer]:
        """Puts finished completions into their flights; waits for the first answer until `deadline`."""
        remaining = max(0.0, deadline - time.monotonic())
        answers = self._core.answers(timeout_s=remaining, waiting_for=waiting_for)
        for a in answers:
            if a.request_id not in self._requests:
                continue
            flight, g = self._requests.pop(a.request_id)
            found = completion(a.token_ids, a.logprobs, a.finish_reason, a.version_spans)
            found.routes = a.routes
            flight.completions[g] = found
            if flight.for_collect and flight.is_done:
                self._landed.append(flight)
        return answers

    def _abandon(self, flights: Collection[Flight]) -> None:
        """Aborts what is still missing in these flights."""
        ours = set(flights)
        late = [request for request, (flight, _) in self._requests.items() if flight in ours]
        if late:
            self._core.abort(late)
        for request in late:
            del self._requests[request]

    def _groups(self, flights: list[Flight]) -> list[Group]:
        """Groups with their texts; what is missing in a flight is aborted."""
        groups = [Group(f.prompt, [c or aborted() for c in f.completions]) for f in flights]
        for flight, group in zip(flights, groups, strict=True):
            decode_texts(self.tokenizer, group.completions, flight.stop)
        return groups
