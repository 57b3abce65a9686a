"""The transformers engine: slow, exact, always available."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList

from rl.model.exactness import switch_lengths
from rl.model.loading import context_length, num_ids
from rl.types import Call, Completion, FinishReason, SamplingParams
from rollout.calls import Sampled, completion, completion_routes, decode_texts, prompt_faults, version_spans
from rollout.in_process import InProcessEngine
from rollout.sampler import SeededSampler, completion_seed

Record = Callable[[int], AbstractContextManager[list[Any]]]
"""`with record(num_rows) as found` around model calls: `found` then has one array of experts, [rows, calls,
layers, K], those of each row's last token in each call.
"""


class TransformersEngine(InProcessEngine):
    """`generate` of transformers on its own copy of the model; equal seeds, equal results (bitwise on a CPU).

    Args:
        model: folder or hub name.
        tokenizer: a transformers tokenizer; turns completions into text and is used for nothing else.
        max_num_seqs: completions that are sampled together.
        timeout_s: longest wait for one `generate` call.
        attention: how transformers computes attention. Eager honours every config; what the policy settled on
            is as exact and may be faster.
        recorder: (model); makes what records the experts of each token; default: nothing records them.
    """

    name = "transformers"

    def __init__(
        self,
        model: str | Path,
        tokenizer: Any,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        max_num_seqs: int = 256,
        timeout_s: float = 600.0,
        revision: str | None = None,
        attention: str = "eager",
        recorder: Callable[[Any], Record] | None = None,
    ) -> None:
        self.device = torch.device(device)
        with torch.random.fork_rng():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(model),
                revision=revision,
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=False,
            )
        super().__init__(loaded.to(self.device), tokenizer, max_num_seqs=max_num_seqs, timeout_s=timeout_s)
        # A model folder may bring its own temperature, penalties or end ids, which `generate` would merge in.
        self.model.generation_config = GenerationConfig()
        self._record: Record = lambda num_rows: nullcontext([])
        self.cache = self._usable_cache()
        if recorder is not None:
            self._record = recorder(self.model)

    def _usable_cache(self) -> str:
        """ "shared": rows with one prompt share its keys and values. "own": each row computes its own.
        "none": the model's cache does not reproduce its logits.
        """
        fault = None
        for self.cache in ("shared", "own"):
            fault = self._cache_fault()
            if fault is None:
                return self.cache
        warnings.warn(f"{type(self.model).__name__} is sampled without a cache (slow): {fault}", stacklevel=3)
        return "none"

    def _cache_fault(self) -> str | None:
        """Why `self.cache` may not be used: sampling with it raises, or does not give the log-probs of whole
        sequences. The longest prompt of this check exceeds the model's window, if it has positions for that.
        """
        config = self.model.config.get_text_config()
        window = max((n for n in switch_lengths(config) if 0 < n <= 256), default=0)
        longest = max(3, min(9 + window, (context_length(config) or sys.maxsize) - 4))
        generator = torch.Generator().manual_seed(0)
        long, short = (
            tuple(torch.randint(0, num_ids(self.model), (n,), generator=generator).tolist())
            for n in (longest, 3)
        )
        prompts, gaps = [short, long, short], []
        try:
            sampled = self._sample(
                prompts, [0, 1, 2], sampling=SamplingParams(4), with_logprobs=True, deadline=math.inf
            )
            for prompt, found in zip(prompts, sampled, strict=True):
                whole = self.prompt_logprobs([*prompt, *found.token_ids])[len(prompt) - 1 :]
                gaps += [abs(a - b) for a, b in zip(whole, found.behavior_logprobs, strict=True)]
        except Exception as error:  # each family has a cache of its own, and its own ways to fail
            return f"it raises {type(error).__name__} ({(str(error).splitlines() or [''])[0]})"
        # In 16 bits single tokens are far off, and the mean is off by 0.1 nats.
        coarse = self.model.dtype != torch.float32
        gap, allowed = (sum(gaps) / len(gaps), 0.3) if coarse else (max(gaps), 0.0025)
        return None if gap <= allowed else f"log-probs with it differ by {gap:.2g} nats from those without"

    def _sampled(self, call: Call, deadline: float) -> Sampled:
        prompts, sampling = call.prompts, call.sampling
        config = self.model.config.get_text_config()
        room = context_length(config)
        faults = prompt_faults(prompts, sampling, vocab_size=config.vocab_size, room=room)
        by_length = sorted(set(range(len(prompts))) - faults.keys(), key=lambda i: len(prompts[i].token_ids))
        rows = [(i, g) for i in by_length for g in range(call.num_completions)]
        done: dict[tuple[int, int], Completion] = {}
        for start in range(0, len(rows), self.max_num_seqs):
            chunk = rows[start : start + self.max_num_seqs]
            row_seeds = [completion_seed(call.seeds[i], g) for i, g in chunk]
            row_ids = [prompts[i].token_ids for i, _ in chunk]
            try:
                sampled = self._sample(
                    row_ids, row_seeds, sampling=sampling, with_logprobs=call.with_logprobs, deadline=deadline
                )
            except RuntimeError as error:
                faults |= {i: str(error) for i, _ in chunk}
                continue
            done |= zip(chunk, sampled, strict=True)
        return done, faults

    @torch.no_grad()
    def prompt_logprobs(self, token_ids: list[int]) -> list[float]:
        ids = torch.tensor([token_ids], device=self.device)
        logprobs = self.model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        return logprobs.gather(-1, ids[0, 1:, None]).squeeze(-1).tolist()

    @torch.no_grad()
    def _sample(
        self,
        prompts: Sequence[tuple[int, ...]],
        seeds: Sequence[int],
        *,
        sampling: SamplingParams,
        with_logprobs: bool,
        deadline: float,
    ) -> list[Completion]:
        """One completion per row. Rows with the same prompt share its prefill; without a cache each row is
        sampled by itself.
        """
        if self.cache == "none" and len(prompts) > 1:
            rows = zip(prompts, seeds, strict=True)
            return [
                self._sample([p], [s], sampling=sampling, with_logprobs=with_logprobs, deadline=deadline)[0]
                for p, s in rows
            ]
        sampler = SeededSampler(seeds, sampling, device=self.device, with_logprobs=with_logprobs)
        unique = list(dict.fromkeys(prompts))
        rows_B = torch.tensor([unique.index(p) for p in prompts], device=self.device)
        width = max(map(len, unique))
        ids_UT = torch.tensor([(0,) * (width - len(p)) + p for p in unique], device=self.device)
        mask_UT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in unique], device=self.device)
        stop_ids = list(sampling.stop_token_ids)
        cache = self._prefill(ids_UT, mask_UT, rows_B)
        with self._record(len(prompts)) as routes:
            output = self.model.generate(
                ids_UT[rows_B],
                attention_mask=mask_UT[rows_B],
                past_key_values=cache,
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=sampling.max_completion_length,
                    max_time=deadline - time.monotonic(),
                    eos_token_id=stop_ids or None,
                    pad_token_id=stop_ids[0] if stop_ids else 0,
                    disable_compile=True,
                    use_cache=self.cache != "none",
                ),
                logits_processor=LogitsProcessorList([sampler]),
            )
        completions = self._completions(output[:, width:].tolist(), sampler, sampling)
        for number, made in enumerate(completions if routes else ()):
            # The first call computes the last prompt token, each further one the token sampled before.
            made.routes = completion_routes(routes[0][number, : len(made.token_ids)], len(made.token_ids))
        decode_texts(self.tokenizer, completions, sampling.stop)
        return completions

    def _prefill(self, ids_UT: Tensor, mask_UT: Tensor, rows_B: Tensor) -> DynamicCache | None:
        """Keys and values of all prompt tokens except the last, once per prompt; None: none are shared."""
        if ids_UT.shape[1] < 2 or self.cache != "shared" or getattr(self.model, "_is_stateful", False):
            return None
        cache = DynamicCache(config=self.model.config)
        positions = (mask_UT.cumsum(-1) - 1).clamp(min=0)
        self.model(
            input_ids=ids_UT[:, :-1],
            attention_mask=mask_UT[:, :-1],
            position_ids=positions[:, :-1],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.batch_select_indices(rows_B)
        return cache

    def _completions(
        self, tokens: list[list[int]], sampler: SeededSampler, sampling: SamplingParams
    ) -> list[Completion]:
        completions = []
        faults = sampler.failed_at_B.tolist()
        for row, logprobs, failed_at in zip(tokens, sampler.chosen_logprobs(), faults, strict=True):
            end = next((t + 1 for t, token in enumerate(row) if token in sampling.stop_token_ids), None)
            length = min(end or len(row), failed_at)
            reason: FinishReason = "abort"
            if end == length:
                reason = "stop"
            elif length == sampling.max_completion_length:
                reason = "length"
            spans = version_spans([self.version], [length])
            completions.append(completion(row[:length], logprobs[:length], reason, spans))
        return completions
