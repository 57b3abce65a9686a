"""vLLM's own scheduler, made to report once per completion, or in a server 64 tokens of it at a time, instead
of once per token, and to do less for it.

Stock vLLM sends every token of every running completion to its client, and with it three small arrays when
log-probs are wanted. Building, encoding, decoding and adding up these messages costs more than scheduling
itself. With 256 completions, each step takes 1.4 ms to encode, 1.1 ms to decode, and 2 ms to add up. Nothing
in this process reads a completion before it is finished.

What is left is Python per token (`python -m tests.bench.scheduling`): with 256 completions it takes longer
than the GPU. Most of it decides what is never in doubt in the middle of a text. So a completion that stays in
its last block of the KV cache skips the cache's manager: its token is only appended. First tokens, ends, new
blocks and all that is not plain text go through vLLM's own code. The short cut relies on what that code does
for each token, so it is off where a request has none of `internals.NUM_VOID`.
"""

from __future__ import annotations

import logging
from array import array
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import numpy as np

from rollout.vllm import internals
from rollout.vllm.internals import NUM_VOID, reach, require

LOGPROBS, MARKS = "cohort_logprobs", "cohort_marks"

logger = logging.getLogger(__name__)  # vLLM's own loggers show errors only (`rollout.vllm.start`)


@dataclass(slots=True)
class Tally:
    """What a running completion has so far. `marks` holds its number of tokens at each weight update.

    Args:
        ends: tokens that may end it.
        is_plain: nothing but `ends` and its length ends it, and nothing else looks at its tokens.
    """

    with_logprobs: bool
    ends: frozenset[int]
    is_plain: bool
    token_ids: list[int] = field(default_factory=list)
    logprobs: array[float] = field(default_factory=lambda: array("f"))
    ranks: array[int] = field(default_factory=lambda: array("i"))
    routes: list[np.ndarray] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    num_sent: int = 0


def make_scheduler(vllm_config: Any, **arguments: Any) -> Any:
    """What vLLM's option `scheduler_cls` names: the stock scheduler, asynchronous or not, made to answer only
    once per completion.
    """
    # Routes of a step come in one array for all that was scheduled in it; a short cut would lose its row.
    short_cuts = not internals.returns_routes(vllm_config)
    return final_only(_stock(vllm_config), short_cuts=short_cuts)(vllm_config=vllm_config, **arguments)


def make_server_scheduler(vllm_config: Any, **arguments: Any) -> Any:
    """The same for `cohort serve`, whose clients read completions while they grow (`in_parts`). The stock
    scheduler, where a token brings more than its log-prob, or keys and values come from elsewhere.
    """
    stock, c = _stock(vllm_config), vllm_config
    brings_more = internals.returns_routes(c) or c.speculative_config or c.kv_transfer_config
    return (stock if brings_more else in_parts(stock))(vllm_config=vllm_config, **arguments)


def _stock(vllm_config: Any) -> Any:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    return AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler


def final_only(stock: Any, *, short_cuts: bool = True) -> Any:
    """A subclass of one of vLLM's schedulers, whose outputs are finished requests with all their tokens.

    Log-probs and marks travel in `kv_transfer_params`, the only free-form field of an output; no key-value
    connector is configured, so nothing else writes it.

    Args:
        short_cuts: do less per token, if vLLM's requests and its KV cache allow it.
    """
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
    from vllm.v1.request import RequestStatus

    running = RequestStatus.RUNNING
    is_async = issubclass(stock, AsyncScheduler)
    void = internals.num_void_attribute() if short_cuts else None
    num_void = attrgetter(void) if void else None
    if short_cuts and void is None:
        logger.warning(
            "a request of vLLM %s has none of %s: its own code counts tokens, which is slower with many "
            "completions",
            *(internals.installed(), ", ".join(NUM_VOID)),
        )
    counts_in_flight = internals.counts_tokens_in_flight()

    class FinalOnlyScheduler(stock):
        has_ranks = False  # whether ranks of sampled tokens are kept, too

        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.tallies: dict[str, Tally] = {}
            self.num_updates = 0
            self.tokens_per_block = 0  # 0: no short cuts
            require("scheduler", self)
            caches = reach("scheduler", "caches", self)
            sizes = {cache.block_size for cache in caches}
            # A sliding window would keep blocks that it has left until the next one is filled.
            if num_void and len(sizes) == 1 and all(type(cache) is FullAttentionManager for cache in caches):
                self.tokens_per_block = sizes.pop()
                self.stock_allocate = self.kv_cache_manager.allocate_slots
                self.kv_cache_manager.allocate_slots = self._allocate_slots

        def add_request(self, request: Any) -> None:
            if not self._counts(request):
                return super().add_request(request)
            parameters = request.sampling_params
            self.tallies[request.request_id] = Tally(
                parameters.logprobs is not None,
                frozenset(parameters.stop_token_ids) | {parameters.eos_token_id},
                is_plain=not (
                    parameters.min_tokens
                    or parameters.repetition_detection
                    or request.use_structured_output
                    or request.has_encoder_inputs
                    or request.resumable
                ),
            )
            super().add_request(request)
            if parameters.prompt_logprobs is not None and request in self.waiting:
                # A weight sync waits for it; at the end of the queue it would wait for all completions.
                self.waiting.remove_request(request)
                self.waiting.prepend_request(request)

        def _counts(self, request: Any) -> bool:
            """Whether its tokens are kept here until they are reported."""
            return True

        def finish_requests(self, *arguments: Any, **named: Any) -> Any:
            aborted = super().finish_requests(*arguments, **named)
            self.tallies = {name: tally for name, tally in self.tallies.items() if name in self.requests}
            return aborted

        def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
            rows = model_runner_output.logprobs
            if len(self.tallies) == len(self.requests):
                model_runner_output.logprobs = None  # vLLM would cut a slice out of it for every request
            self.logprobs = [] if rows is None else rows.logprobs[:, 0].tolist()
            self.ranks = rows.sampled_token_ranks.tolist() if self.has_ranks and rows is not None else []
            if self.tokens_per_block:
                self._go_on(scheduler_output, model_runner_output)
            steps = super().update_from_output(scheduler_output, model_runner_output)
            for client, step in list(steps.items()):
                step.outputs = self._final(step.outputs, model_runner_output.req_id_to_index)
                if not step.outputs and not step.finished_requests and step.scheduler_stats is None:
                    del steps[client]
            return steps

        def _allocate_slots(self, request: Any, num_new_tokens: int, **more: Any) -> Any:
            """No blocks if the request's last block has room, else the manager's answer."""
            room = -request.num_computed_tokens % self.tokens_per_block
            if num_new_tokens < room and more == {"num_lookahead_tokens": 0}:
                return self.kv_cache_manager.empty_kv_cache_blocks
            return self.stock_allocate(request, num_new_tokens, **more)

        def _go_on(self, scheduled: Any, sampled: Any) -> None:
            """Appends the tokens that neither begin nor end a completion; leaves the others to vLLM."""
            assert num_void is not None
            rows, tokens, block = sampled.req_id_to_index, sampled.sampled_token_ids, self.tokens_per_block
            logprobs, ranks = self.logprobs, self.ranks
            left: dict[str, int] = {}
            for name, number in scheduled.num_scheduled_tokens.items():
                tally, request = self.tallies.get(name), self.requests.get(name)
                new = tokens[rows[name]] if tokens else ()
                if (
                    tally is None
                    or not (tally.is_plain and tally.token_ids and len(new) == 1)
                    or new[0] in tally.ends
                    or len(request._output_token_ids) + 1 >= request.max_tokens
                    or len(request._all_token_ids) + 1 >= self.max_model_len
                    or request.status is not running
                    or num_void(request)
                ):
                    left[name] = number
                    continue
                tally.token_ids.append(new[0])
                if tally.with_logprobs and logprobs:
                    tally.logprobs.append(logprobs[rows[name]])
                    if ranks:
                        tally.ranks.append(ranks[rows[name]])
                request._output_token_ids.append(new[0])
                request._all_token_ids.append(new[0])
                if len(request._all_token_ids) % block == 0:
                    request.update_block_hashes()
                if counts_in_flight:
                    request.num_in_flight_tokens -= number
                if is_async:
                    request.num_output_placeholders -= 1
                    num_cached = request.num_computed_tokens - request.num_output_placeholders
                    if num_cached % block == 0:
                        self.kv_cache_manager.cache_blocks(request, num_cached)
            scheduled.num_scheduled_tokens = left

        def _final(self, outputs: Any, rows: dict[str, int]) -> list[Any]:
            final = []
            for output in outputs:
                tally = self.tallies.get(output.request_id)
                if tally is None:  # vLLM gave it up in this very step, and says so
                    final.append(output)
                    continue
                if output.new_token_ids:
                    tally.token_ids += output.new_token_ids
                    if tally.with_logprobs and self.logprobs:
                        tally.logprobs.append(self.logprobs[rows[output.request_id]])
                        if self.ranks:
                            tally.ranks.append(self.ranks[rows[output.request_id]])
                if output.routed_experts is not None:  # often a view of what the next step fills
                    tally.routes.append(np.array(output.routed_experts))
                if self._is_due(output, tally):
                    final.append(self._filled(output, tally))
                if output.finish_reason is not None:
                    del self.tallies[output.request_id]
            return final

        def _is_due(self, output: Any, tally: Tally) -> bool:
            return output.finish_reason is not None

        def _filled(self, output: Any, tally: Tally) -> Any:
            output.routed_experts = np.concatenate(tally.routes) if tally.routes else None
            output.new_token_ids = tally.token_ids
            output.kv_transfer_params = {LOGPROBS: tally.logprobs.tobytes(), MARKS: tally.marks}
            return output

        def set_pause_state(self, pause_state: Any) -> None:
            """Marks a resumption, which means new weights; no step is in flight, so the counts are exact."""
            super().set_pause_state(pause_state)
            if pause_state.name != "UNPAUSED":
                return
            self.num_updates += 1
            for tally in self.tallies.values():
                tally.marks.append(len(tally.token_ids))
            for request in self.requests.values():
                if request.num_computed_tokens == 0:
                    # It waits, and must not find keys and values of the old weights in the prefix cache.
                    request.cache_salt = str(self.num_updates)
                    request.block_hashes.clear()
                    request.update_block_hashes()

    return FinalOnlyScheduler


def in_parts(stock: Any) -> Any:
    """A subclass of one of vLLM's schedulers, which reports a first token, then as many at a time as
    `--stream-interval` says, and the rest at a completion's end. A pause ends only after all that was sampled
    is reported, so that a part is of one version of the weights.

    Requests that want more than that are left to vLLM: text (and what stops it), log-probs of other tokens.
    What a server itself aborts (`/pause` in mode "abort") ends with what was reported, up to a part less.
    """
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.outputs import LogprobsLists

    class InPartsScheduler(final_only(stock)):
        has_ranks, is_paused = True, False

        def _counts(self, request: Any) -> bool:
            wanted = request.sampling_params
            more = wanted is None or wanted.detokenize or wanted.num_logprobs or request.resumable
            return not (more or getattr(self, "return_sampling_mask", False))

        def _is_due(self, output: Any, tally: Tally) -> bool:
            return output.finish_reason is not None or not tally.num_sent or bool(output.events)

        def _filled(self, output: Any, tally: Tally) -> Any:
            begin, tally.num_sent = tally.num_sent, len(tally.token_ids)
            output.new_token_ids = tally.token_ids[begin:]
            if tally.with_logprobs and output.new_token_ids:
                ids, ranks = (np.array(one, np.int32) for one in (output.new_token_ids, tally.ranks[begin:]))
                logprobs = np.array(tally.logprobs[begin:], dtype=np.float32)
                output.new_logprobs = LogprobsLists(ids[:, None], logprobs[:, None], ranks)
            return output

        def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
            steps = super().update_from_output(scheduler_output, model_runner_output)
            interval = self.scheduler_config.stream_interval
            for name, tally in self.tallies.items():
                request, number = self.requests[name], len(tally.token_ids) - tally.num_sent
                if number >= interval or (number and self.is_paused):
                    step = steps.setdefault(request.client_index, EngineCoreOutputs(outputs=[]))
                    output = EngineCoreOutput(name, [], events=request.take_events())
                    step.outputs.append(self._filled(output, tally))
            return steps

        def has_requests(self) -> bool:
            """Also while there is something to report at a pause, which waits for this."""
            waits = self.is_paused and any(len(t.token_ids) > t.num_sent for t in self.tallies.values())
            return waits or super().has_requests()

        def set_pause_state(self, pause_state: Any) -> None:
            stock.set_pause_state(self, pause_state)
            self.is_paused = pause_state.name != "UNPAUSED"  # what was preempted waits over any pause

    return InPartsScheduler
