"""vLLM's engine core behind one interface, in this process or in one of its own; every wait is bounded."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from threading import Thread
from typing import Any

import torch

from rollout.calls import EngineError
from rollout.vllm.scheduler import LOGPROBS, MARKS
from rollout.vllm.start import stop_engine

_LIVENESS_S = 0.5


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished request. `marks` are its numbers of tokens at each update of the weights in between."""

    request_id: str
    token_ids: list[int]
    logprobs: list[float]
    marks: list[int]
    finish_reason: str
    prompt_logprobs: Any = field(default=None, repr=False)


class VllmCore:
    """One `vllm.LLMEngine` whose scheduler is `rollout.vllm.scheduler.make_scheduler`.

    Args:
        own: the engine core is another process.
        owns_group: vLLM made torch's default process group in this process.
        uncompiled: an eager vLLM in this process still compiles the ranks of its log-probs: 6 s on a CPU, and
            a C++ compiler is needed. True prevents that.
        timeout_s: longest wait for one answer of the core.
    """

    def __init__(
        self,
        engine: Any,
        *,
        own: bool,
        owns_group: bool,
        uncompiled: bool,
        timeout_s: float,
    ) -> None:
        self.engine: Any = engine
        self.own, self.timeout_s = own, timeout_s
        self._generator_state = torch.Generator().get_state()
        self._owns_group, self._uncompiled = owns_group, uncompiled
        self._client: Any = engine.engine_core
        self._process = self._client.resources.engine_manager.processes[0] if own else None

    @property
    def pid(self) -> int | None:
        """Process id of the core, None if it is this process."""
        return self._process.pid if self._process else None

    def add(
        self,
        token_ids: list[int],
        parameters: Any,
        *,
        request_ids: Sequence[str],
        seeds: Sequence[int | None],
        salt: str,
    ) -> None:
        """Starts one request per id and seed; only requests with the same salt share cached prompts.

        As `LLMEngine.add_request` does for n completions, but for their parent: it would hold them back until
        the last one is finished. Checking the prompt and its parameters costs more than all else, so this is
        done once.
        """
        from vllm.inputs import tokens_input

        with self._faults("requests were added"):
            engine = self.engine
            checked = engine.input_processor.process_inputs(
                request_ids[0],
                tokens_input(token_ids, cache_salt=salt),
                parameters,
                supported_tasks=engine.get_supported_tasks(),
            )
            for request_id, seed in zip(request_ids, seeds, strict=True):
                request = copy(checked)
                request.request_id = request.external_req_id = request_id
                request.sampling_params = copy(checked.sampling_params)
                request.sampling_params.seed = seed
                engine.output_processor.add_request(request, None, None, 0)
                engine.engine_core.add_request(request)

    def abort(self, request_ids: list[str]) -> None:
        with self._faults("requests were aborted"):
            self.engine.abort_request(request_ids)

    def answers(self, *, timeout_s: float, waiting_for: str) -> list[Answer]:
        """Requests that finished; waits at most `timeout_s` for the first. Inside, this takes the steps.

        Raises:
            EngineError: the core failed, or its process died.
        """
        deadline = time.monotonic() + timeout_s
        outputs: list[Any] = []
        with self._faults(waiting_for), self._surroundings():
            if self.own:
                while self._has_output(deadline):
                    outputs += self.engine.step()
                    deadline = 0.0 if outputs else deadline  # what else is there already comes along
            while not self.own and self.engine.has_unfinished_requests():
                outputs += self.engine.step()
                if outputs or time.monotonic() >= deadline:
                    break
        return [_answer(output) for output in outputs]

    def call(self, method: str, *arguments: Any) -> Any:
        """Calls a method of `rollout.vllm.worker.WeightReceiver` at the worker.

        From a process of its own only plain data may come and go (numbers, texts, bytes, lists, dicts): vLLM
        would need its setting for insecure serialization to send anything else.
        """
        return self._utility("collective_rpc", method, None, list(arguments))[0]

    def pause(self) -> list[Answer]:
        """Holds all requests where they are; returns what finished in the steps that were under way.

        Afterwards no step is in flight, and `resume` marks in every request how many tokens it has.
        """
        self._utility("pause_scheduler", "keep", False)
        outputs: list[Any] = []
        if not self.own:
            with self._faults("the last steps before an update"), self._surroundings():
                while self._client.engine_core.batch_queue:
                    outputs += self.engine.step()
        return [_answer(output) for output in outputs]

    def resume(self, *, recompute_kv: bool) -> None:
        """Goes on; with `recompute_kv` from new keys and values of everything sampled so far."""
        if recompute_kv:
            self._utility("reset_prefix_cache", True)
        self._utility("resume_scheduler")

    def close(self) -> None:
        """Ends the core and its process; safe to call twice."""
        if self.engine is not None:
            stop_engine(self.engine, owns_group=self._owns_group)
        if self._process is not None:
            self._process.join(_LIVENESS_S)  # killed by now; else it would stay as a zombie
        self.engine = self._client = None

    def _has_output(self, deadline: float) -> bool:
        """Waits until a message of the core's process is there, or `deadline`."""
        queue = self._client.outputs_queue
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
                return getattr(self._client.engine_core, method)(*arguments)
            return self._bounded(lambda: self._client.call_utility(method, *arguments), method)

    def _bounded(self, ask: Callable[[], Any], what: str) -> Any:
        """The result of a call into the core's process; vLLM's own wait for it has no end."""
        results: list[Any] = []
        errors: list[Exception] = []

        def run() -> None:
            try:
                results.append(ask())
            except Exception as error:
                errors.append(error)

        thread = Thread(target=run, name=f"vllm {what}", daemon=True)
        thread.start()
        deadline = time.monotonic() + self.timeout_s
        while thread.is_alive():
            thread.join(_LIVENESS_S)
            if thread.is_alive():
                self._check_alive()
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no answer within timeout_s={self.timeout_s:g}")
        if errors:
            raise errors[0]
        return results[0]

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
        """What sampling in this process may not change or do."""
        with ExitStack() as stack:
            if not self.own and self._uncompiled:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if self.own:
                yield
                return
            # On a CPU vLLM draws from torch's global generator, also beside the requests' own.
            stack.enter_context(torch.random.fork_rng(devices=[]))
            torch.set_rng_state(self._generator_state)
            yield
            self._generator_state = torch.get_rng_state()


def _answer(output: Any) -> Answer:
    ours = output.kv_transfer_params or {}
    sampled = output.outputs[0]
    return Answer(
        output.request_id,
        list(sampled.token_ids),
        array("f", ours.get(LOGPROBS, b"")).tolist(),
        list(ours.get(MARKS, [])),
        sampled.finish_reason or "abort",
        output.prompt_logprobs,
    )
