"""The scheduler's short cuts change nothing: vLLM's own code per token makes the same steps and answers.

Both schedulers get the same completions and events, and for each token the same number, without a model.
"""

import random

import numpy as np
import pytest
from tiny_llama import make_model, save

from rollout.vllm.internals import NUM_VOID, num_void_attribute, returns_routes
from rollout.vllm.scheduler import LOGPROBS, MARKS
from tests.bench.scheduling import BLOCK, make_output, make_request, make_scheduler, settings_for
from tests.vllm_engines import needs_vllm

pytestmark = needs_vllm
END = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(make_model(0), tmp_path_factory.mktemp("model"))


def requests(number, seed):
    """Completions of 1 to 200 tokens; three of a kind share a prompt, and some have rules of their own."""
    from vllm import SamplingParams

    draw = random.Random(seed)
    for k in range(number):
        longest = draw.choice([1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 30, 90, 200])
        parameters = SamplingParams(
            max_tokens=longest,
            min_tokens=min(20, longest) * (k % 7 == 3),
            stop_token_ids=[END] if k % 5 else [],
            ignore_eos=True,
            detokenize=False,
            logprobs=0 if k % 3 else None,
            prompt_logprobs=0 if k % 11 == 7 else None,
        )
        yield make_request(
            str(k), [100 + (k // 3) % 150] * draw.choice([1, 5, 15, 16, 17, 37, 60]), parameters
        )


def token(name, position):
    """An end one time in 80, whoever asks."""
    return random.Random(f"{name}/{position}").choice([END, *range(3, 82)])


class Drive:
    """A scheduler under load, with `depth` steps on their way at a time, until all is done.

    Attributes:
        steps: what every step was, and the state after it.
        answers: what every completion came to.
        seen: events that happened.
    """

    def __init__(self, scheduler, *, seed, depth, number=40, eventful=True):
        self.scheduler, self.depth, self.eventful = scheduler, depth, eventful
        self.draw = random.Random(seed + 1)
        self.waiting = list(requests(number, seed))
        self.on_their_way, self.steps, self.answers, self.seen, self.routes = [], [], {}, set(), {}
        self.add(number // 2)
        for _ in range(3000):
            self.happen()
            if not scheduler.has_requests():
                self.take_all()
                if not self.waiting:
                    return
                self.add(1)
                continue
            scheduled = scheduler.schedule()
            step = described(scheduled)
            self.on_their_way.append((scheduled, sampled(scheduler, scheduled)))
            if len(self.on_their_way) == depth:
                self.take()
            self.steps.append((step, state(scheduler)))
        raise AssertionError("the completions came to no end")

    def add(self, number):
        for request in self.waiting[:number]:
            self.scheduler.add_request(request)
        del self.waiting[:number]

    def happen(self):
        """Arrivals; now and then an abort, an update, or new keys and values, with steps on their way."""
        from vllm.v1.core.sched.interface import PauseState
        from vllm.v1.request import RequestStatus

        if self.draw.random() < 0.3:
            self.add(1)
        event = self.draw.random() if self.eventful else 1.0
        if event < 0.02 and self.scheduler.requests:
            self.scheduler.finish_requests(
                [self.draw.choice(sorted(self.scheduler.requests))], RequestStatus.FINISHED_ABORTED
            )
            self.seen.add("abort")
        elif event < 0.03:
            self.scheduler.reset_prefix_cache(reset_running_requests=True)
            self.seen.add("reset under steps" if self.on_their_way else "reset")
        elif event < 0.06:
            self.scheduler.set_pause_state(PauseState.PAUSED_ALL)
            self.take_all()
            if self.draw.random() < 0.5:
                self.scheduler.reset_prefix_cache(reset_running_requests=True)
            self.add(1)
            self.scheduler.set_pause_state(PauseState.UNPAUSED)
            self.seen.add("update")

    def take_all(self):
        while self.on_their_way:
            self.take()

    def take(self):
        for outputs in self.scheduler.update_from_output(*self.on_their_way.pop(0)).values():
            for output in outputs.outputs:
                assert output.request_id not in self.answers
                self.routes[output.request_id] = output.routed_experts
                ours = output.kv_transfer_params or {}
                self.answers[output.request_id] = (
                    list(output.new_token_ids),
                    str(output.finish_reason),
                    np.frombuffer(ours.get(LOGPROBS, b""), "f").tolist(),
                    list(ours.get(MARKS, [])),
                )


def sampled(scheduler, scheduled):
    """What a model runner would answer: no token where a prompt, or what was preempted, is not through."""
    names = list(scheduled.num_scheduled_tokens)
    random.Random(len(names)).shuffle(names)  # its rows are in an order of its own
    found = [scheduler.requests[name] for name in names]
    tokens = [[] if r.is_prefill_chunk else [token(r.request_id, r.num_computed_tokens)] for r in found]
    output = make_output(names, tokens, [-0.01 * (row[0] if row else 0) for row in tokens])
    if (asked := getattr(scheduled, "aux_output_connector_metadata", None)) is not None:
        output.aux_output_connector_output = {r.request_id: routes(scheduler, r, asked) for r in found}
    return output


def routes(scheduler, request, asked):
    """What vLLM's worker gives, from where it gave the last rows on: not experts, but the token's position
    and how often the weights were updated.
    """
    from vllm.distributed.aux_output_connector.connector import AuxRequestOutput

    cursors = scheduler.__dict__.setdefault("cursors", {})
    name = asked.generation, request.request_id
    begin = cursors.setdefault(name, asked.requests[request.request_id])
    if not request.is_prefill_chunk:
        cursors[name] = request.num_computed_tokens
    rows = [[[p, scheduler.num_updates]] for p in range(begin, request.num_computed_tokens)]
    return AuxRequestOutput(begin, np.array(rows, dtype=np.uint16).reshape(-1, 1, 2))


def described(scheduled):
    cached = scheduled.scheduled_cached_reqs
    lists = (cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, cached.new_block_ids)
    return {
        "tokens": dict(scheduled.num_scheduled_tokens),
        "new": [(r.req_id, r.num_computed_tokens, r.block_ids) for r in scheduled.scheduled_new_reqs],
        "cached": list(zip(*lists, strict=True)),
        "resumed": sorted(cached.resumed_req_ids),
        "gone": (sorted(scheduled.finished_req_ids), sorted(scheduled.preempted_req_ids or ())),
    }


def state(scheduler):
    """All that later steps depend on: of the requests, and of the cache's blocks."""
    counts = ("num_computed_tokens", "num_output_placeholders", "num_tokens", "is_prefill_chunk")
    more = ("num_in_flight_tokens", "num_stale_output_tokens", "async_tokens_to_discard")  # of one version
    manager = scheduler.kv_cache_manager
    return {
        "requests": {
            name: [
                *(r.status.name, list(r.output_token_ids), list(r.block_hashes)),
                *(getattr(r, count, None) for count in counts + more),
            ]
            for name, r in scheduler.requests.items()
        },
        "cached": [dict(kind.num_cached_block) for kind in manager.coordinator.single_type_managers],
        "blocks": [
            {
                name: [block.block_id for block in blocks]
                for name, blocks in kind.req_to_blocks.items()
                if blocks
            }
            for kind in manager.coordinator.single_type_managers
        ],
        "free": manager.block_pool.get_num_free_blocks(),
    }


@pytest.mark.parametrize("seed", range(12))
def test_short_cuts_schedule_and_answer_as_vllm_does(folder, seed):
    if num_void_attribute() is None:
        pytest.skip(f"a request of this vLLM has none of {', '.join(NUM_VOID)}")
    draw = random.Random(seed)
    is_async, num_seqs = seed % 3 != 0, draw.choice([8, 24])
    settings = settings_for(
        folder,
        max_model_len=draw.choice([96, 128]),
        max_num_seqs=num_seqs,
        max_num_batched_tokens=max(num_seqs, draw.choice([32, 64, 256])),
        enable_prefix_caching=seed % 4 != 1,
    )
    blocks = [1000, 60, 90][seed % 3 if is_async else seed // 3 % 3]
    ours, stock = (
        make_scheduler(settings, is_async=is_async, short_cuts=short_cuts, num_blocks=blocks)
        for short_cuts in (True, False)
    )
    assert ours.tokens_per_block == BLOCK and not stock.tokens_per_block
    found = Drive(ours, seed=seed, depth=2 if is_async else 1)
    wanted = Drive(stock, seed=seed, depth=2 if is_async else 1)
    assert found.answers == wanted.answers and len(found.answers) > 20
    for number, (step, expected) in enumerate(zip(found.steps, wanted.steps, strict=True)):
        assert step == expected, number


def test_the_cases_above_hold_what_matters(folder):
    """Preemption, and every event, with steps on their way: seed 1 has 60 blocks for 24 completions."""
    settings = settings_for(folder, max_model_len=128, max_num_seqs=24, max_num_batched_tokens=64)
    scheduler = make_scheduler(settings, is_async=True, short_cuts=True, num_blocks=60)
    found = Drive(scheduler, seed=1, depth=2)
    assert {"abort", "reset under steps", "update"} <= found.seen
    assert any(step["gone"][1] for step, _ in found.steps)
    reasons = {reason for _, reason, *_ in found.answers.values()}
    assert {"stop", "length"} <= reasons


def test_completions_with_rules_of_their_own_take_vllms_way(folder):
    settings = settings_for(folder, max_model_len=128, max_num_seqs=24, max_num_batched_tokens=64)
    scheduler = make_scheduler(settings, is_async=True, short_cuts=True, num_blocks=1000)
    taken = []
    whole = scheduler._update_request_with_output
    scheduler._update_request_with_output = lambda request, *rest, **more: (
        taken.append(request.request_id),
        whole(request, *rest, **more),
    )[1]
    answers = Drive(scheduler, seed=0, depth=2, eventful=False).answers
    assert len(answers) == 40
    for name, (tokens, *_) in answers.items():
        assert taken.count(name) == (len(tokens) if int(name) % 7 == 3 else min(len(tokens), 2)), name


def test_a_sliding_window_is_left_to_vllm(folder):
    """It gives back a block as soon as the window has left it, not at the next one."""
    settings = settings_for(folder, max_model_len=128, max_num_seqs=8, max_num_batched_tokens=64)
    options = {"is_async": True, "short_cuts": True, "num_blocks": 100}
    assert not make_scheduler(settings, window=32, **options).tokens_per_block


def test_an_unknown_vllm_is_left_alone_and_said(folder, monkeypatch, caplog):
    settings = settings_for(folder, max_model_len=128, max_num_seqs=8, max_num_batched_tokens=64)
    monkeypatch.setattr("rollout.vllm.internals.NUM_VOID", ("num_lost",))
    with caplog.at_level("WARNING", logger="rollout.vllm.scheduler"):
        scheduler = make_scheduler(settings, is_async=True, short_cuts=True, num_blocks=100)
    assert not scheduler.tokens_per_block
    assert "has none of num_stale_output_tokens, async_tokens_to_discard: its own code counts" in caplog.text


@pytest.mark.parametrize("seed", [1, 2, 4])
def test_routes_of_a_token_are_of_the_weights_that_sampled_the_next_one(folder, seed):
    """Under preemption, updates and new keys and values, which compute all tokens again."""
    config = settings_for(folder, max_model_len=128, max_num_seqs=24, max_num_batched_tokens=64)
    if not hasattr(config, "aux_output_config"):
        pytest.skip("this vLLM has its routes from blocks of the cache: tests/gpu/test_moe_routes.py")
    config.aux_output_config.enable_return_routed_experts = True
    assert returns_routes(config)
    is_async = seed != 4
    scheduler = make_scheduler(config, is_async=is_async, short_cuts=False, num_blocks=60)
    lengths = {r.request_id: r.num_prompt_tokens for r in requests(40, seed)}
    begun, add = {}, scheduler.add_request

    def counted(request):
        begun[request.request_id] = scheduler.num_updates
        request.sampling_params.routed_experts_prompt_start = request.num_prompt_tokens - 1
        add(request)

    scheduler.add_request = counted
    drive = Drive(scheduler, seed=seed, depth=2 if is_async else 1)
    assert {"update", "abort"} <= drive.seen and len(drive.answers) > 20
    num_updated = 0
    for name, (tokens, reason, _, marks) in drive.answers.items():
        if reason == "abort":
            continue
        versions = [begun[name] + sum(mark <= t for mark in marks) for t in range(len(tokens))]
        expected = [[[lengths[name] - 1 + t, version]] for t, version in enumerate(versions)]
        assert drive.routes[name].tolist() == expected
        num_updated += len(set(versions)) > 1
    assert num_updated > 2
