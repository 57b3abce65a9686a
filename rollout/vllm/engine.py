"""vLLM as an engine: prompts into requests, finished requests into groups, weights under running requests."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rl.types import Completion, FinishReason, Group, Prompt, SamplingParams
from rollout.calls import (
    WEIGHTS_UNKNOWN,
    Call,
    EngineError,
    aborted,
    check_call,
    check_groups,
    completion,
    decode_texts,
    prompt_faults,
)
from rollout.fingerprint import HeldTensor
from rollout.sampler import completion_seed
from rollout.vllm.bucket import Bucket, Layout
from rollout.vllm.core import Answer, VllmCore
from rollout.vllm.start import cpu_arguments, gpu_arguments, start_engine, takes_own_process, vllm_available

Process = Literal["auto", "own", "inside"]
REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


@dataclass(slots=True)
class Flight:
    """A prompt whose completions are being sampled; None for one that is not finished."""

    prompt: Prompt
    completions: list[Completion | None]
    num_missing: int
    for_collect: bool
    stop: tuple[str, ...] = ()


class VllmEngine:
    """Stock vLLM (V1 engine core); weights go in through vLLM's own reload.

    Args:
        model: folder or hub name.
        tokenizer: a transformers tokenizer; turns completions into text and is used for nothing else.
        max_model_len: longest prompt plus completion, in tokens.
        process: "own" gives vLLM's engine core a process of its own, which samples while this one trains;
            "inside" runs it in this one. "auto" is "own" on a GPU, where Python per completion is the limit,
            and "inside" on a CPU, where both would share the same cores, unless vLLM would change the class
            of the trainer's model.
        gpu_memory_utilization: share of the GPU for weights, activations and KV cache.
        kv_cache_gib: KV cache on a CPU.
        enforce_eager: no CUDA graphs; default: eager on a CPU only.
        seed_requests: every completion draws from its own seed. Without it all draw from vLLM's one generator
            and no call can be repeated, only its distribution. Default: seeds where they cost nothing, which
            is on a CPU and in vLLM's second model runner (dense models on a GPU). The first one launches a
            kernel per completion and token for them. On a GPU equal seeds give equal completions up to
            rounding, which depends on what else is in the batch.
        sample_while_training: of its own process. Default: not on a GPU, where the two would only take turns.
        recompute_kv: an update computes the keys and values of running completions anew with the new weights;
            default: they stay those of the weights that sampled them.
        timeout_s: longest wait for one `generate` call, for an answer of the core, and for the start.
        version: policy version of the weights in `model`.

    Raises:
        ValueError: vLLM cannot be used here, or refuses the model or the arguments.
        EngineError: it did not start in time.
    """

    name = "vllm"

    def __init__(
        self,
        model: str | Path,
        tokenizer: Any,
        *,
        dtype: torch.dtype,
        max_model_len: int,
        process: Process = "auto",
        max_num_seqs: int = 256,
        gpu_memory_utilization: float = 0.35,
        kv_cache_gib: float = 2.0,
        enforce_eager: bool | None = None,
        seed_requests: bool | None = None,
        sample_while_training: bool | None = None,
        recompute_kv: bool = False,
        timeout_s: float = 600.0,
        revision: str | None = None,
        version: int = 0,
    ) -> None:
        if (reason := vllm_available()) is not None:
            raise ValueError(f"engine.name=vllm cannot be used: {reason}; or use engine.name=transformers")
        from vllm.platforms import current_platform

        on_cpu = current_platform.is_cpu()
        eager = on_cpu if enforce_eager is None else enforce_eager
        if on_cpu:
            arguments = cpu_arguments(kv_cache_gib, max_model_len=max_model_len)
        else:
            arguments = gpu_arguments(
                gpu_memory_utilization, max_model_len=max_model_len, max_num_seqs=max_num_seqs, eager=eager
            )
        arguments |= {
            "model": str(model),
            "revision": revision,
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "enforce_eager": eager,
        }
        own = self.runs_alone = takes_own_process(process, arguments, on_cpu=on_cpu)
        goes_on = on_cpu if sample_while_training is None else sample_while_training
        self.held_while_training, self._is_held = own and not goes_on, False
        self.tokenizer, self.version = tokenizer, version
        self.timeout_s, self.max_model_len, self.recompute_kv = timeout_s, max_model_len, recompute_kv
        engine, owns_group = start_engine(arguments, own=own, timeout_s=timeout_s)
        seeds_are_free = on_cpu or getattr(engine.vllm_config, "use_v2_model_runner", False)
        self.seed_requests = seeds_are_free if seed_requests is None else seed_requests
        self.device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
        self._vocab_size = engine.model_config.get_vocab_size()
        self._core = VllmCore(
            engine, own=own, owns_group=owns_group, uncompiled=on_cpu and eager, timeout_s=timeout_s
        )
        self.tensors: Mapping[str, HeldTensor] = self._describe(uncompiled=own and on_cpu and eager)
        self._bucket = Bucket(self.tensors, self.device) if own else None
        self._handle_sent = False
        self._versions = [version]  # of the weights, one more at each update
        self._requests: dict[str, tuple[Flight, int, int]] = {}  # id -> flight, completion, first of versions
        self._num_requests = self._num_submitted = 0
        self._landed: list[Flight] = []

    @property
    def in_flight(self) -> int:
        return self._num_submitted

    def submit(
        self,
        prompts: Sequence[Prompt],
        *,
        num_completions: int,
        sampling: SamplingParams,
        seeds: Sequence[int],
        with_logprobs: bool = True,
    ) -> None:
        check_call(self, prompts, seeds)
        call = Call(tuple(prompts), num_completions, sampling, tuple(seeds), with_logprobs)
        flights, _ = self._launch(call, for_collect=True)
        self._num_submitted += len(prompts) * num_completions
        self._landed += [flight for flight in flights if not flight.num_missing]

    def collect(self, *, timeout_s: float) -> list[Group]:
        deadline = time.monotonic() + timeout_s
        if timeout_s > 0:
            self._go_on()
        while not self._landed and self._num_submitted:
            check_call(self, (), ())
            self._advance(deadline, f"sampling {self._num_submitted} submitted completions")
            if time.monotonic() >= deadline:
                break
        groups, self._landed = self._groups(self._landed), []
        self._num_submitted -= sum(len(group.completions) for group in groups)
        return groups

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_completions: int,
        sampling: SamplingParams,
        seeds: Sequence[int],
        with_logprobs: bool = True,
    ) -> list[Group]:
        check_call(self, prompts, seeds)
        self._go_on()
        deadline = time.monotonic() + self.timeout_s
        call = Call(tuple(prompts), num_completions, sampling, tuple(seeds), with_logprobs)
        flights, faults = self._launch(call, for_collect=False)
        while any(flight.num_missing for flight in flights) and time.monotonic() < deadline:
            self._advance(deadline, f"sampling {len(prompts)} prompts x {num_completions} completions")
        self._abandon(flights)
        groups = self._groups(flights)
        check_groups(groups, faults, self.timeout_s, late=time.monotonic() > deadline)
        return groups

    def hold(self) -> None:
        self._take(self._core.pause())
        self._is_held = True

    @torch.no_grad()
    def update_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        self.version = WEIGHTS_UNKNOWN
        self._take(self._core.pause())
        self._core.call("cohort_begin")
        if self._bucket is None:
            self._core.call("cohort_receive", self._rounded(weights))
        else:
            self._bucket.send(self._known(weights), self._load_bucket)
        self._core.call("cohort_finish", version)
        self._resume(version, recompute_kv=self.recompute_kv)

    def fingerprints(self) -> dict[str, int]:
        return self._core.call("cohort_fingerprints", self.version)

    def prompt_logprobs(self, token_ids: list[int]) -> list[float]:
        check_call(self, (), ())
        self._go_on()
        parameters = _parameters(SamplingParams(1, temperature=0.0), False, prompt_logprobs=0)
        deadline = time.monotonic() + self.timeout_s
        request, found = self._start(token_ids, parameters, [None])[0], None
        what = f"the log-probs of {len(token_ids)} tokens"
        while found is None and time.monotonic() < deadline:
            found = next((a for a in self._advance(deadline, what) if a.request_id == request), None)
        if found is None:
            self._core.abort([request])
            raise EngineError(f"{what} took longer than timeout_s={self.timeout_s:g}")
        return [
            position[token].logprob
            for position, token in zip(found.prompt_logprobs[1:], token_ids[1:], strict=True)
        ]

    def close(self) -> None:
        self._core.close()
        if self._bucket is not None:
            self._bucket.close()
        self._requests, self._landed, self._num_submitted = {}, [], 0

    def _launch(self, call: Call, *, for_collect: bool) -> tuple[list[Flight], dict[int, str]]:
        """Starts every completion that can be sampled: (a flight per prompt, why some prompts cannot)."""
        faults = prompt_faults(
            call.prompts, call.sampling, vocab_size=self._vocab_size, room=self.max_model_len
        )
        flights, parameters = [], _parameters(call.sampling, call.with_logprobs)
        for index, (prompt, seed) in enumerate(zip(call.prompts, call.seeds, strict=True)):
            number = call.num_completions
            if index in faults:
                flights.append(Flight(prompt, [aborted() for _ in range(number)], 0, for_collect))
                continue
            flight = Flight(prompt, [None] * number, number, for_collect, call.sampling.stop)
            base = completion_seed(seed)
            draws = [base + g if self.seed_requests else None for g in range(number)]
            for g, request in enumerate(self._start(list(prompt.token_ids), parameters, draws)):
                self._requests[request] = (flight, g, len(self._versions) - 1)
            flights.append(flight)
        return flights, faults

    def _start(self, token_ids: list[int], parameters: Any, seeds: Sequence[int | None]) -> list[str]:
        """One request per seed; their ids."""
        requests = [str(self._num_requests + k) for k in range(len(seeds))]
        self._num_requests += len(seeds)
        # Requests of different weights share no cached keys and values.
        salt = str(len(self._versions) - 1)
        self._core.add(token_ids, parameters, request_ids=requests, seeds=seeds, salt=salt)
        return requests

    def _go_on(self) -> None:
        """Ends a hold without new weights; running completions note it as an update to the same ones."""
        if self._is_held:
            check_call(self, (), ())
            self._resume(self.version, recompute_kv=False)

    def _resume(self, version: int, *, recompute_kv: bool) -> None:
        self._core.resume(recompute_kv=recompute_kv)
        self._versions.append(version)
        self.version, self._is_held = version, False

    def _advance(self, deadline: float, waiting_for: str) -> list[Answer]:
        """Takes in what finishes; waits for the first answer until `deadline`."""
        remaining = max(0.0, deadline - time.monotonic())
        return self._take(self._core.answers(timeout_s=remaining, waiting_for=waiting_for))

    def _take(self, answers: list[Answer]) -> list[Answer]:
        """Puts finished completions into their flights."""
        for answer in answers:
            if answer.request_id not in self._requests:
                continue
            flight, g, first = self._requests.pop(answer.request_id)
            reason = REASONS.get(answer.finish_reason, "abort")
            versions = self._versions[first : first + len(answer.marks) + 1]
            flight.completions[g] = completion(
                answer.token_ids, answer.logprobs, reason, versions, answer.marks
            )
            flight.num_missing -= 1
            if flight.for_collect and not flight.num_missing:
                self._landed.append(flight)
        return answers

    def _abandon(self, flights: list[Flight]) -> None:
        """Aborts what is still missing in these flights."""
        if not any(flight.num_missing for flight in flights):
            return
        ours = {id(flight) for flight in flights}
        late = [request for request, (flight, _, _) in self._requests.items() if id(flight) in ours]
        self._core.abort(late)
        for request in late:
            del self._requests[request]

    def _groups(self, flights: list[Flight]) -> list[Group]:
        """Groups with their texts; what is missing in a flight is aborted."""
        groups = [Group(f.prompt, [c or aborted() for c in f.completions]) for f in flights]
        for flight, group in zip(flights, groups, strict=True):
            decode_texts(self.tokenizer, group.completions, flight.stop)
        return groups

    def _describe(self, *, uncompiled: bool) -> dict[str, HeldTensor]:
        return {
            name: HeldTensor(tuple(shape), getattr(torch, dtype), self.device, source, sampled)
            for name, shape, dtype, source, sampled in self._core.call("cohort_describe", uncompiled)
        }

    def _known(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            if name not in self.tensors:
                raise ValueError(f"vLLM's model has no weight {name}; send the model it was started from")
            yield name, tensor.detach()

    def _rounded(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor.to(self.tensors[name].dtype)) for name, tensor in self._known(weights))

    def _load_bucket(self, layout: Layout) -> None:
        assert self._bucket is not None
        self._core.call("cohort_receive_bucket", layout, None if self._handle_sent else self._bucket.handle)
        self._handle_sent = True


def _parameters(sampling: SamplingParams, with_logprobs: bool, *, prompt_logprobs: int | None = None) -> Any:
    from vllm import SamplingParams as Parameters
    from vllm.sampling_params import RequestOutputKind

    return Parameters(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        max_tokens=sampling.max_completion_length,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=True,  # ends are explicit: stop_token_ids
        logprobs=0 if with_logprobs else None,
        prompt_logprobs=prompt_logprobs,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
