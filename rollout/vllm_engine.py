"""vLLM in this process, beside the policy: one engine per process, one device, no tensor parallelism."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rl.types import Completion, FinishReason, Group, Prompt, SamplingParams
from rollout.engine import (
    WEIGHTS_UNKNOWN,
    EngineError,
    aborted,
    check_call,
    check_groups,
    finished,
    prompt_faults,
)
from rollout.fingerprint import HeldTensor, fingerprints
from rollout.sampler import completion_seed
from rollout.vllm_start import start_engine, stop_engine, vllm_available
from rollout.vllm_weights import as_checkpoint, find_slots, packs_experts, read_slots, repack

CPU_BLOCK_SIZE = (
    32  # tokens; completions share the full blocks of their prompt, and vLLM's 128 would share little
)
REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


class VllmEngine:
    """Stock vLLM (V1 engine core) in this process; weights go in through vLLM's own reload.

    Args:
        model: folder or hub name.
        tokenizer: a transformers tokenizer; turns completions into text and is used for nothing else.
        max_model_len: longest prompt plus completion, in tokens.
        gpu_memory_utilization: share of the GPU for weights, activations and KV cache.
        kv_cache_gib: KV cache on a CPU.
        enforce_eager: no CUDA graphs; default: eager on a CPU only.
        seed_requests: False takes vLLM's one generator for all completions, which is not reproducible;
            per-request seeds cost a kernel launch per completion and token on a GPU.
        timeout_s: longest wait for one `generate` call, and for the other processes at the start.
        version: policy version of the weights in `model`.

    Raises:
        ValueError: vLLM cannot be used here, or refuses the model or the arguments.
    """

    name = "vllm"

    def __init__(
        self,
        model: str | Path,
        tokenizer: Any,
        *,
        dtype: torch.dtype,
        max_model_len: int,
        max_num_seqs: int = 256,
        gpu_memory_utilization: float = 0.35,
        kv_cache_gib: float = 2.0,
        enforce_eager: bool | None = None,
        seed_requests: bool = True,
        timeout_s: float = 600.0,
        revision: str | None = None,
        version: int = 0,
    ) -> None:
        if (reason := vllm_available()) is not None:
            raise ValueError(f"engine.name=vllm cannot be used: {reason}; or use engine.name=transformers")
        from vllm.platforms import current_platform

        on_cpu = current_platform.is_cpu()
        eager = on_cpu if enforce_eager is None else enforce_eager
        device_arguments = (
            {
                "kv_cache_memory_bytes": int(kv_cache_gib * 2**30),
                "block_size": CPU_BLOCK_SIZE,
                # vLLM rewinds the generator of a prompt cut in two, which a CPU generator cannot do.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(4096, max_model_len),
            }
            if on_cpu
            else {"gpu_memory_utilization": gpu_memory_utilization}
        )
        arguments = device_arguments | {
            "model": str(model),
            "revision": revision,
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "enforce_eager": eager,
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # the model's own would add its temperature and penalties
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "seed": 0,
        }
        self.tokenizer, self.version = tokenizer, version
        self.max_model_len, self.seed_requests, self.timeout_s = max_model_len, seed_requests, timeout_s
        self._uncompiled = on_cpu and eager
        self._calls = 0
        self._loaded: dict[str, int] = {}
        self._engine: Any
        self._engine, self._owns_group = start_engine(arguments, timeout_s=timeout_s)
        self._vocab_size = self._engine.model_config.get_vocab_size()
        self._slots = find_slots(self._engine.apply_model(lambda model: model)[0])
        self.tensors: Mapping[str, HeldTensor] = {name: slot.held for name, slot in self._slots.items()}

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
        deadline = time.monotonic() + self.timeout_s
        faults = prompt_faults(prompts, sampling, vocab_size=self._vocab_size, room=self.max_model_len)
        waiting: dict[str, int] = {}
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            if index not in faults:
                parameters = self._parameters(sampling, num_completions, completion_seed(seed), with_logprobs)
                waiting[self._submit(list(prompt.token_ids), parameters)] = index
        answers = {waiting[request]: output for request, output in self._drain(waiting, deadline)}
        groups = [
            Group(prompt, self._completions(answers.get(i), num_completions))
            for i, prompt in enumerate(prompts)
        ]
        check_groups(groups, faults, self.timeout_s, late=time.monotonic() > deadline)
        return groups

    @torch.no_grad()
    def update_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        self.version = WEIGHTS_UNKNOWN
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": self._rounded(weights)})
        self._loaded = fingerprints(
            read_slots({n: s for n, s in self._slots.items() if packs_experts(s)}, version)
        )
        repack(self._slots)
        self._engine.reset_prefix_cache()
        self.version = version

    @torch.no_grad()
    def fingerprints(self) -> dict[str, int]:
        """Of the tensors that the kernels use; experts on a CPU of what was loaded, before it was packed."""
        shown = {name: slot for name, slot in self._slots.items() if not packs_experts(slot)}
        return self._loaded | fingerprints(read_slots(shown, self.version))

    def prompt_logprobs(self, token_ids: list[int]) -> list[float]:
        from vllm import SamplingParams as Parameters
        from vllm.sampling_params import RequestOutputKind

        parameters = Parameters(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        deadline = time.monotonic() + self.timeout_s
        answers = [output for _, output in self._drain([self._submit(token_ids, parameters)], deadline)]
        if not answers:
            raise EngineError(
                f"the log-probs of {len(token_ids)} tokens took longer than timeout_s={self.timeout_s:g}"
            )
        return [
            position[token].logprob
            for position, token in zip(answers[0].prompt_logprobs[1:], token_ids[1:], strict=True)
        ]

    def close(self) -> None:
        if self._engine is not None:
            stop_engine(self._engine, owns_group=self._owns_group)
        self._engine, self._slots = None, {}

    def _submit(self, token_ids: list[int], parameters: Any) -> str:
        from vllm.inputs import tokens_input

        self._calls += 1
        request = str(self._calls)
        self._engine.add_request(request, tokens_input(token_ids), parameters)
        return request

    def _drain(self, requests: Iterable[str], deadline: float) -> list[tuple[str, Any]]:
        """(request, output) of what finishes before `deadline`; the other requests are aborted.

        Raises:
            EngineError: the engine core failed.
        """
        answers: list[tuple[str, Any]] = []
        # An eager vLLM still compiles the ranks of its log-probs: 6 s on a CPU, and a C++ compiler is needed.
        stance = torch.compiler.set_stance("force_eager") if self._uncompiled else nullcontext()
        # On a CPU vLLM draws from torch's global generator beside the requests' own, and drops the numbers.
        with stance, torch.random.fork_rng(devices=[], enabled=self.seed_requests):
            while self._engine.has_unfinished_requests() and time.monotonic() < deadline:
                try:
                    outputs = self._engine.step()
                except Exception as error:
                    raise EngineError(f"vLLM stopped while sampling: {error}") from error
                answers += [(output.request_id, output) for output in outputs if output.finished]
        if self._engine.has_unfinished_requests():
            self._engine.abort_request(list(requests))
        return answers

    def _parameters(
        self, sampling: SamplingParams, num_completions: int, seed: int, with_logprobs: bool
    ) -> Any:
        from vllm import SamplingParams as Parameters
        from vllm.sampling_params import RequestOutputKind

        return Parameters(
            n=num_completions,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=seed if self.seed_requests else None,
            max_tokens=sampling.max_completion_length,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,  # ends are explicit: stop_token_ids
            logprobs=0 if with_logprobs else None,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _completions(self, output: Any, num_completions: int) -> list[Completion]:
        if output is None:
            return [aborted() for _ in range(num_completions)]
        completions = []
        for answer in output.outputs:
            ids = list(answer.token_ids)
            logprobs = (
                [answer.logprobs.logprobs[i] for i in answer.logprobs.start_indices]
                if answer.logprobs
                else []
            )
            reason = REASONS.get(answer.finish_reason, "abort")
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            completions.append(finished(ids, logprobs, reason, self.version, text))
        return completions

    def _rounded(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            if name not in self.tensors:
                raise ValueError(f"vLLM's model has no weight {name}; send the model it was started from")
            yield from as_checkpoint(name, tensor.detach().to(self.tensors[name].dtype))
