"""The interface of a vLLM engine core, free of vLLM's own types: requests in, answers out.

`rollout.vllm.local` has one in this process and one in a process beside it. Every wait is bounded.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import wraps
from io import BytesIO
from itertools import groupby
from threading import Thread
from typing import Any, Literal, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from rl.types import FinishReason, SamplingParams, VersionSpan
from rollout.calls import completion_routes
from rollout.engine import EngineError
from rollout.fingerprint import HeldTensor
from rollout.sampler import completion_seed

T = TypeVar("T")
M = TypeVar("M", bound=Callable[..., Any])
SleepingPart = Literal["weights", "cache"]
NOT_FINITE = -9999.0  # what vLLM's API says for a log-prob that is not finite
UNREAD = (ValueError, KeyError, TypeError, IndexError, AttributeError)  # where an answer is odd
REASONS: dict[str | None, FinishReason] = {"stop": "stop", "length": "length"}
GAUGES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "cache",
    "vllm:num_preemptions_total": "preemptions",
    "process_start_time_seconds": "started",  # tells one process from the next
}


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


@dataclass(slots=True, eq=False)
class Stream:
    """A completion that is being sampled by one server, or by several in turn.

    Attributes:
        token_ids, logprobs: so far.
        versions: of the weights that sampled each token.
        first: number of tokens that earlier servers have sampled.
        said: labels of the weights that sampled each token from `first` on, if the server gives them.
        sure: number of tokens after which the server was found to hold the weights that it had proved.
        tries: number of servers that began it.
        asked_as: the id of its request at the present server, which other processes ask, too.
        marks: (number, version): of the first `number` tokens, sampled or not yet, none has a later version.
        rows: experts that the last server says (`completion_routes`), with its last message.
    """

    id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    seed: int | None
    with_logprobs: bool
    with_routes: bool = False
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    first: int = 0
    sure: int = 0
    said: list[str] | None = None
    reason: str | None = None
    tries: int = 0
    asked_as: str = ""
    marks: list[tuple[int, int]] = field(default_factory=list)
    rows: Any = field(default=None, repr=False)
    task: Any = None

    def begin(self, salt: str) -> dict[str, Any]:
        """The request for what is left. After kept tokens it has another seed, since the random numbers of
        the first one are used up.
        """
        self.first = self.sure = len(self.token_ids)
        self.tries += 1
        self.asked_as = f"{salt}.{self.id}.{self.tries}"
        self.said, self.reason, self.rows, self.marks = None, None, None, []
        left = self.sampling.max_completion_length - self.first
        parameters = request_body(self.sampling, max_tokens=left)
        if self.seed is not None:
            parameters["seed"] = completion_seed(self.seed, self.first) if self.first else self.seed
        if self.with_logprobs:
            parameters["logprobs"] = 0
        ids = self.prompt_ids + self.token_ids
        if self.with_routes:  # prompts are routed live in training
            parameters["routed_experts_prompt_start"] = len(ids) - 1
        asked = {"token_ids": ids, "sampling_params": parameters, "cache_salt": salt, "stream": True}
        return asked | {"request_id": self.asked_as}

    def take(self, message: dict[str, Any], version: int) -> None:
        """Adds what a message of the server brings; RuntimeError if it says that the completion failed."""
        if "choices" not in message:
            raise RuntimeError(f"the server broke a completion off: {str(message)[:200]}")
        for choice in message["choices"]:
            ids = choice["token_ids"] or []
            logprobs = (
                [one["logprob"] for one in choice["logprobs"]["content"]]
                if self.with_logprobs and ids
                else []
            )
            if min(logprobs, default=0.0) <= NOT_FINITE:
                raise RuntimeError("the model's logits are not finite")
            self.token_ids += ids
            self.logprobs += logprobs
            places = range(len(self.versions), len(self.token_ids))
            self.versions += [next((old for end, old in self.marks if at < end), version) for at in places]
            if (spans := choice.get("weight_versions")) is not None:
                self.said = [s["version"] for s in spans for _ in range(s["end"] - s["start"])]
            if (routed := choice.get("routed_experts")) is not None:
                self.rows = np.load(BytesIO(b64decode(routed)), allow_pickle=False)
            self.reason = choice.get("finish_reason") or self.reason

    def mark(self, count: int | None, version: int, now: int | None = None) -> None:
        """Notes how many tokens its paused server, of this version, has sampled. None: it has ended, or has
        not begun; in that case a later mark, or a new request, takes this one's place.

        Args:
            now: the version with which it has gone on since, if it has.

        Raises:
            EngineError: they are fewer than it has sent, though it has not gone on.
        """
        sent = len(self.token_ids) - self.first
        if count is not None and count < sent:
            if now is None:
                raise EngineError(f"it counts {count} tokens of a completion of which it has sent {sent}")
            self.versions[self.first + count :] = [now] * (sent - count)
        end = self.first + (self.sampling.max_completion_length if count is None else count)
        self.marks = [mark for mark in self.marks if mark[0] < end] + [(end, version)]

    def keep(self, num_tokens: int) -> None:
        self.rows = None
        for values in (self.token_ids, self.logprobs, self.versions):
            del values[num_tokens:]

    def drop(self, sure: int = 0) -> None:
        """Forgets what this server has sampled beyond `sure` tokens, and the end that may just have come."""
        self.reason = None
        self.keep(max(self.first, sure))

    def answer(self) -> Answer:
        """The completion so far; an "abort" if more is left to sample."""
        reason = REASONS.get(self.reason, "abort")
        if reason == "abort" and self.token_ids:  # its end may be lost although its last token came
            reason = "length" if len(self.token_ids) == self.sampling.max_completion_length else reason
            reason = "stop" if self.token_ids[-1] in self.sampling.stop_token_ids else reason
        spans = [VersionSpan(version, len(list(run))) for version, run in groupby(self.versions)]
        routes = completion_routes(self.rows, len(self.token_ids) - self.first)
        if routes is not None:  # those of earlier servers went with them
            routes = np.pad(routes, ((self.first, 0), (0, 0), (0, 0)), constant_values=-1)
        return Answer(self.id, self.token_ids, self.logprobs, spans, reason, routes=routes)


def in_thread(work: Callable[[], T], name: str = "fleet") -> Future[T]:
    """Starts a call in a thread, which is left alone if nobody waits for it any longer."""
    found: Future[T] = Future()

    def run() -> None:
        try:
            found.set_result(work())
        except Exception as error:
            found.set_exception(error)

    Thread(target=run, name=name, daemon=True).start()
    return found


def in_turn(method: M) -> M:
    """Methods of an object wait for each other, and for whoever else holds its `_turn`."""

    @wraps(method)
    def alone(self: Any, *arguments: Any, **named: Any) -> Any:
        with self._turn:
            return method(self, *arguments, **named)

    return cast(M, alone)


def unread(path: str, error: Exception, text: str) -> str:
    """The error's words for an answer in which something is missing or malformed."""
    return f"{path} answered what cannot be read ({type(error).__name__}: {error}): {text[:300]}"


def request_body(sampling: SamplingParams, **more: Any) -> dict[str, Any]:
    """vLLM's `sampling_params` of a request: as JSON for a server, as keywords for an engine of our own."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": True,  # stop_token_ids alone end a completion
        "detokenize": False,
        **more,
    }


class Core(Protocol):
    """Samples requests with weights of one version at a time.

    Attributes:
        runs_alone: it samples while nobody calls it, in a process of its own.
        is_on_cpu: it computes on the CPU.
        sleeps: it has to free its memory while the trainer computes.
        seeds_are_free: seeds of requests cost no extra kernels.
        device: where weights may be sent from without a copy.
        vocab_size: number of ids that a prompt may have.
    """

    runs_alone: bool
    is_on_cpu: bool
    sleeps: bool
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
        """Ends requests; no answer comes for them."""
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

    def sleep(self) -> None:
        """Pauses, preempts what is in flight, and drops weights and cache, so that others can use the memory.

        From then on it takes only `load`, which wakes it and recomputes the cache with the new weights.
        """
        ...

    def wake(self, part: SleepingPart) -> None:
        """Takes the memory of one part again; its contents are undefined."""
        ...

    def resume(self, version: int) -> None:
        """Goes on with the weights that it holds, which are of this version."""
        ...

    def load(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Replaces the weights under held requests, which then go on. This wakes a core that sleeps.

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


def gauges_of(text: str) -> dict[str, float]:
    """Reads metrics in Prometheus' text form; of several engines behind one server, the largest values."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        name = GAUGES.get(line.partition("{")[0].partition(" ")[0])
        if name is not None:
            found[name] = max(float(line.rpartition(" ")[2]), found.get(name, 0.0))
    return found
