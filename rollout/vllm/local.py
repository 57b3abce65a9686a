"""vLLM's engine core in this process, or in one beside it on the same device; every wait is bounded."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import wait as wait_for
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import partial
from multiprocessing.connection import wait
from typing import Any

import torch
from torch import Tensor

from rl.types import SamplingParams
from rollout.calls import completion_routes, version_spans
from rollout.engine import EngineError
from rollout.fingerprint import HeldTensor
from rollout.vllm.bucket import Bucket
from rollout.vllm.core import REASONS, Answer, Core, SleepingPart, in_thread
from rollout.vllm.internals import reach, require
from rollout.vllm.scheduler import LOGPROBS, MARKS
from rollout.vllm.settings import (
    CoreSettings,
    engine_arguments,
    request_parameters,
    runs_on_cpu,
    takes_own_process,
)
from rollout.vllm.start import start_engine, stop_engine, vllm_available

_LIVENESS_S = 0.5
_RELEASE_S = 5.0


TAGS: dict[SleepingPart, str] = {"weights": "weights", "cache": "kv_cache"}
"""vLLM's own names for the parts that sleep."""


def start_core(settings: CoreSettings) -> Core:
    """The core that `settings.process` asks for.

    Raises:
        ValueError: vLLM cannot be used here, or refuses the model or the arguments.
        EngineError: it did not start in time.
    """
    if (reason := vllm_available()) is not None:
        raise ValueError(f"engine.name=vllm cannot be used: {reason}; or use engine.name=transformers")
    arguments = engine_arguments(settings)
    own = takes_own_process(settings.process, arguments, on_cpu=runs_on_cpu())
    return (beside if own else inside)(settings)


def inside(settings: CoreSettings) -> Core:
    """A core in this process: it samples while `answers` is called."""
    return LocalCore(settings, own=False)


def beside(settings: CoreSettings) -> Core:
    """A core in a process of its own, on the same device."""
    return LocalCore(settings, own=True)


class LocalCore:
    """One `vllm.LLMEngine` whose scheduler is `rollout.vllm.scheduler.make_scheduler`.

    Args:
        own: the engine core is another process.
    """

    def __init__(self, settings: CoreSettings, *, own: bool) -> None:
        self.is_on_cpu, arguments = runs_on_cpu(), engine_arguments(settings)
        if own and settings.apart:
            arguments["distributed_executor_backend"] = "mp"
        engine, self._owns_group = start_engine(arguments, own=own, timeout_s=settings.timeout_s)
        self.engine: Any = engine
        self.own = self.runs_alone = own
        self.timeout_s, self.recompute_kv = settings.timeout_s, settings.recompute_kv
        self.sleeps, self._routes = settings.sleeps, settings.routes
        # An eager vLLM on a CPU still compiles the ranks of its log-probs: 6 s, and a C++ compiler.
        self._uncompiled = self.is_on_cpu and arguments["enforce_eager"]
        self._generator_state = torch.Generator().get_state()
        self._process, self._bucket = None, None
        self.seeds_are_free = self.is_on_cpu or getattr(engine.vllm_config, "use_v2_model_runner", False)
        self.device = torch.device("cpu" if self.is_on_cpu else f"cuda:{torch.cuda.current_device()}")
        self.vocab_size: int = engine.model_config.get_vocab_size()
        self._versions = [0]  # of the weights, one more at each resumption
        self._begun: dict[str, tuple[int, list[int]]] = {}  # request -> index of its first version, prompt
        self._finished: list[Answer] = []  # in the steps before a pause
        self._asleep: set[SleepingPart] = set()
        try:
            require("engine", engine)
            require("engine beside" if own else "engine inside", engine)
            self._client: Any = reach("engine", "client", engine)
            self._process = reach("engine beside", "processes", engine)[0] if own else None
            self._held = self._describe()
            self._bucket = Bucket(self._held, self.device) if own else None
        except Exception:
            self.close()
            raise

    @property
    def pid(self) -> int | None:
        """Process id of the core, None if it is this process."""
        return self._process.pid if self._process else None

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
        """Does as `LLMEngine.add_request` for n completions, but without a parent request, which would hold
        them back until the last one is finished. Checking the prompt and its parameters costs more than all
        else, so it is done once.
        """
        from vllm.inputs import tokens_input

        begun = len(self._versions) - 1
        with self._faults("requests were added"):
            engine = self.engine
            checked = reach("engine", "process_inputs", engine)(
                ids[0],
                tokens_input(token_ids, cache_salt=str(begun)),
                request_parameters(sampling, with_logprobs, with_prompt_logprobs),
                supported_tasks=engine.get_supported_tasks(),
            )
            for request_id, seed in zip(ids, seeds, strict=True):
                request = copy(checked)
                request.request_id = request.external_req_id = request_id
                request.sampling_params = copy(checked.sampling_params)
                request.sampling_params.seed = seed
                if self._routes:  # prompts are routed live in training
                    request.sampling_params.routed_experts_prompt_start = len(token_ids) - 1
                reach("engine", "note_request", engine)(request, None, None, 0)
                self._client.add_request(request)
                self._begun[request_id] = (begun, token_ids)

    def abort(self, ids: Sequence[str]) -> None:
        with self._faults("requests were aborted"):
            self.engine.abort_request(list(ids))
        for request_id in ids:
            self._begun.pop(request_id, None)

    def answers(self, *, timeout_s: float, waiting_for: str) -> list[Answer]:
        """For a core inside this process, this takes the steps."""
        if self._finished:
            timeout_s = 0.0
        deadline = time.monotonic() + timeout_s
        outputs: list[Any] = []
        with self._faults(waiting_for), self._surroundings():
            if self.own:
                while self._has_output(deadline):
                    outputs += self.engine.step()
                    deadline = 0.0 if outputs else deadline  # then only what has already arrived
            while not self.own and self.engine.has_unfinished_requests():
                outputs += self.engine.step()
                if outputs or time.monotonic() >= deadline:
                    break
        found, self._finished = self._finished, []
        return found + self._answers(outputs)

    def call(self, method: str, *arguments: Any) -> Any:
        """Calls a method of `rollout.vllm.worker.WeightReceiver` at the worker.

        From a process of its own only plain data may come and go (numbers, texts, bytes, lists, dicts). To
        send anything else, vLLM would need its setting for insecure serialization.
        """
        return self._utility("collective_rpc", method, None, list(arguments))[0]

    def pause(self) -> None:
        """Takes in what finishes in the steps that are under way; `resume` then marks in every request how
        many tokens it has.
        """
        self._utility("pause_scheduler", "keep", False)
        outputs: list[Any] = []
        if not self.own:
            with self._faults("the last steps before an update"), self._surroundings():
                while reach("engine inside", "batch_queue", self.engine):
                    outputs += self.engine.step()
        self._finished += self._answers(outputs)

    def sleep(self) -> None:
        """Sleeps at vLLM's level 2, by the worker: the core would go on by itself once all is awake."""
        self.pause()
        self._utility("reset_prefix_cache", True)
        self.call("sleep", 2)
        self._asleep = set(TAGS)

    def wake(self, part: SleepingPart) -> None:
        self.call("cohort_wake", TAGS[part])
        self._asleep.discard(part)

    def resume(self, version: int) -> None:
        self._utility("resume_scheduler")
        self._versions.append(version)

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        if not self._asleep:
            self.pause()
        if "weights" in self._asleep:
            torch.cuda.empty_cache()  # frees for the core what this process's allocator keeps
            self.wake("weights")
        self.call("cohort_begin")
        if self._bucket is None:
            rounded = ((name, tensor.to(self._held[name].dtype)) for name, tensor in self._known(weights))
            self.call("cohort_receive", rounded)
        else:
            self._bucket.send(self._known(weights), partial(self.call, "cohort_receive_bucket"))
        self.call("cohort_finish", version)
        if self._asleep:  # the weights are in place; now there may be room for the cache
            self.wake("cache")
        elif self.recompute_kv:  # new keys and values of everything sampled so far
            self._utility("reset_prefix_cache", True)
        self.resume(version)

    def describe(self) -> Mapping[str, HeldTensor]:
        return self._held

    def fingerprints(self) -> dict[str, int]:
        return self.call("cohort_fingerprints", self._versions[-1])

    def close(self) -> None:
        """Ends the core and its process; safe to call twice."""
        is_released = self._release_bucket()
        if self.engine is not None:
            stop_engine(self.engine, owns_group=self._owns_group)
        if self._process is not None:
            self._process.join(_LIVENESS_S)  # killed by now; else it would stay as a zombie
        if self._bucket is not None:
            self._bucket.close(is_released=is_released)
        self.engine = self._client = None

    def _release_bucket(self) -> bool:
        """Asks the core's process to release the memory that this one shares; returns whether it did."""
        if self.engine is None or self._bucket is None or not self._bucket.is_known:
            return False
        self.timeout_s = min(self.timeout_s, _RELEASE_S)
        try:
            self.call("cohort_release")
        except EngineError:
            return False
        return True

    def _describe(self) -> dict[str, HeldTensor]:
        return {
            name: HeldTensor(tuple(shape), getattr(torch, dtype), self.device, *more)
            for name, shape, dtype, *more in self.call("cohort_describe", self.own and self._uncompiled)
        }

    def _known(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            if name not in self._held:
                raise ValueError(f"vLLM's model has no weight {name}; send the model it was started from")
            yield name, tensor.detach()

    def _answers(self, outputs: list[Any]) -> list[Answer]:
        return [
            self._answer(o, *self._begun.pop(o.request_id)) for o in outputs if o.request_id in self._begun
        ]

    def _answer(self, output: Any, begun: int, prompt_ids: list[int]) -> Answer:
        ours = output.kv_transfer_params or {}
        sampled, marks = output.outputs[0], list(ours.get(MARKS, []))
        ids = list(sampled.token_ids)
        given = output.prompt_logprobs
        return Answer(
            output.request_id,
            ids,
            array("f", ours.get(LOGPROBS, b"")).tolist(),
            version_spans(self._versions[begun : begun + len(marks) + 1], [*marks, len(ids)]),
            REASONS.get(sampled.finish_reason, "abort"),
            given and [at[token].logprob for at, token in zip(given[1:], prompt_ids[1:], strict=True)],
            completion_routes(sampled.routed_experts, len(ids)),
        )

    def _has_output(self, deadline: float) -> bool:
        """Waits for a message of the core's process until `deadline`; returns whether there is one."""
        queue = reach("engine beside", "outputs_queue", self.engine)
        while queue.empty():
            self._check_alive()
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False
            with queue.not_empty:
                queue.not_empty.wait_for(lambda: bool(queue.queue), min(remaining, _LIVENESS_S))
        return True

    def _check_alive(self) -> None:
        if self._process is not None and wait([self._process.sentinel], 0):
            raise RuntimeError(f"its process {self._process.pid} ended with code {self._process.exitcode}")

    def _utility(self, method: str, *arguments: Any) -> Any:
        """One of the engine core's own methods, wherever the core is."""
        with self._faults(f"{method}{arguments[:1]}"):
            if not self.own:
                return getattr(reach("engine inside", "core", self.engine), method)(*arguments)
            ask = reach("engine beside", "call_utility", self.engine)
            return self._bounded(lambda: ask(method, *arguments), method)

    def _bounded(self, ask: Callable[[], Any], what: str) -> Any:
        """The result of a call into the core's process; vLLM's own wait for it has no limit."""
        answer = in_thread(ask, f"vllm {what}")
        deadline = time.monotonic() + self.timeout_s
        while not wait_for([answer], _LIVENESS_S).done:
            self._check_alive()
            if time.monotonic() > deadline:
                raise RuntimeError(f"no answer within timeout_s={self.timeout_s:g}")
        return answer.result()

    @contextmanager
    def _faults(self, waiting_for: str) -> Iterator[None]:
        """Turns a fault of the core into an EngineError that says what was waited for.

        A ValueError is the caller's: an argument that vLLM refuses, or a fault of the weights' iterator.
        """
        if self.engine is None:
            raise EngineError("the engine is closed")
        try:
            yield
        except ValueError:
            raise
        except Exception as error:
            raise EngineError(f"vLLM's engine core failed while {waiting_for}: {error}") from error

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        """Keeps sampling in this process from changing torch's generator, and from compiling."""
        if self.own:
            yield
            return
        # On a CPU vLLM draws from torch's global generator, also beside the requests' own.
        eager = torch.compiler.set_stance("force_eager") if self._uncompiled else nullcontext()
        with eager, torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._generator_state)
            yield
            self._generator_state = torch.get_rng_state()
