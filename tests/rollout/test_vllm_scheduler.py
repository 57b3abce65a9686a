"""The scheduler's short cuts change nothing: vLLM's own code per token makes the same steps and answers.

Both schedulers get the same completions and events, and for each token the same number, without a model.
"""

import random

import numpy as np
import pytest
from tiny_llama import make_model, save

from rollout.vllm.internals import NUM_VOID, num_void_attribute, returns_routes
from rollout.vllm.scheduler import LOGPROBS, MARKS, in_parts
from tests.bench.scheduling import BLOCK, make_output, make_request, make_scheduler, settings_for
from tests.vllm_engines import needs_vllm

pytestmark = needs_vllm
END, PART = 2, 64


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
        parts: number of tokens in each answer of a completion.
        held: at every update, how many tokens each completion had brought.
        seen: events that happened.
    """

    def __init__(self, scheduler, *, seed, depth, number=40, eventful=True, waits=False):
        self.scheduler, self.depth, self.eventful, self.waits = scheduler, depth, eventful, waits
        self.draw = random.Random(seed + 1)
        self.waiting = list(requests(number, seed))
        self.on_their_way, self.steps, self.answers, self.seen, self.routes = [], [], {}, set(), {}
        self.parts, self.held = {}, []
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
            waits = self.waits and event < 0.04  # until all that run have ended; else they are kept
            self.scheduler.set_pause_state(PauseState.PAUSED_NEW if waits else PauseState.PAUSED_ALL)
            self.take_all()
            while self.scheduler.has_requests():  # an engine is paused when this has an end
                step = self.scheduler.schedule()
                assert waits or not step.total_num_scheduled_tokens
                self.on_their_way.append((step, sampled(self.scheduler, step)))
                self.take()
            here = self.scheduler.requests
            self.held.append({name: len(said[0]) for name, said in self.answers.items() if name in here})
            if self.draw.random() < 0.5:
                self.scheduler.reset_prefix_cache(reset_running_requests=True)
            self.add(1)
            self.scheduler.set_pause_state(PauseState.UNPAUSED)
            self.seen |= {"update", "a pause that waits"} if waits else {"update"}

    def take_all(self):
        while self.on_their_way:
            self.take()

    def take(self):
        for outputs in self.scheduler.update_from_output(*self.on_their_way.pop(0)).values():
            for output in outputs.outputs:
                self.routes[output.request_id] = output.routed_experts
                ours = output.kv_transfer_params or {}
                tokens, reason, logprobs, marks = self.answers.get(output.request_id, ([], "None", [], []))
                assert reason == "None"
                new = output.new_logprobs
                said = zip(new.logprobs[:, 0], new.sampled_token_ranks, strict=True) if new else ()
                self.answers[output.request_id] = (
                    tokens + list(output.new_token_ids),
                    str(output.finish_reason),
                    logprobs + np.frombuffer(ours.get(LOGPROBS, b""), "f").tolist() + list(said),
                    marks + list(ours.get(MARKS, [])),
                )
                self.parts.setdefault(output.request_id, []).append(len(output.new_token_ids))


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
    assert all(len(parts) == 1 for parts in found.parts.values())
    for number, (step, expected) in enumerate(zip(found.steps, wanted.steps, strict=True)):
        assert step == expected, number


def server_settings(folder, **more):
    fixed = {"max_model_len": 128, "max_num_batched_tokens": 64, "stream_interval": PART}
    return settings_for(folder, **fixed | more)


def scoring_first(stock):
    """vLLM's scheduler with our order: a prompt that is only scored goes first."""

    class ScoringFirst(stock):
        def add_request(self, request):
            super().add_request(request)
            if request.sampling_params.prompt_logprobs is not None:
                self.waiting.remove_request(request)
                self.waiting.prepend_request(request)

    return ScoringFirst


@pytest.mark.parametrize("seed", range(8))
def test_a_server_reports_in_parts_what_vllm_reports_by_token(folder, seed):
    """Tokens, log-probs, ranks and ends are the stock scheduler's, and so is what came before each update."""
    is_async, interval = seed % 3 != 0, [PART, PART, 1, 7][seed % 4]
    settings = server_settings(folder, max_num_seqs=24, stream_interval=interval)
    options = {"is_async": is_async, "num_blocks": [1000, 120][seed % 2]}
    how = {"seed": seed, "depth": 2 if is_async else 1, "waits": seed in (3, 4)}
    found, wanted = (
        Drive(make_scheduler(settings, wrapped=wrapped, **options), **how)
        for wrapped in (in_parts, scoring_first)
    )
    assert found.steps == wanted.steps
    for name, (tokens, reason, *rest) in wanted.answers.items():
        number = len(tokens) if reason != "None" else len(found.answers[name][0])  # its client has hung up
        assert found.answers[name][:2] == (tokens[:number], reason)
        assert found.answers[name][2:] == (rest[0][:number], [])
    assert found.answers.keys() == wanted.answers.keys() and len(found.answers) > 20
    assert found.held == wanted.held and any(found.held)
    assert ("a pause that waits" in found.seen) == how["waits"]
    num_answers, by_token = (sum(map(len, drive.parts.values())) for drive in (found, wanted))
    assert num_answers < by_token or interval == 1  # a pause that waits reports by token


def test_requests_that_want_more_are_answered_by_vllm(folder):
    """Text, log-probs of other tokens: one answer for each token, with all that vLLM says of it."""
    from vllm import SamplingParams

    settings = server_settings(folder, max_num_seqs=8)
    scheduler = make_scheduler(settings, is_async=False, num_blocks=100, wrapped=in_parts)
    wishes = {"plain": {}, "text": {"detokenize": True}, "others": {"logprobs": 3}}
    for name, wish in wishes.items():
        wanted = SamplingParams(
            **{"max_tokens": 30, "ignore_eos": True, "detokenize": False, "logprobs": 0} | wish
        )
        scheduler.add_request(make_request(name, [5, 6], wanted))
    ranks = {name: [] for name in wishes}
    while scheduler.has_requests():
        scheduled = scheduler.schedule()
        for step in scheduler.update_from_output(scheduled, sampled(scheduler, scheduled)).values():
            for output in step.outputs:
                ranks[output.request_id] += [output.new_logprobs.sampled_token_ranks.tolist()]
    assert [len(part) for part in ranks["text"] + ranks["others"]] == [1] * 60
    assert [len(part) for part in ranks["plain"]] == [1, sum(map(len, ranks["plain"])) - 1]


def go_on(scheduler, steps, found):
    """`steps` steps, as many as there are; adds all answers to `found`."""
    while scheduler.has_requests() and (steps := steps - 1) >= 0:
        scheduled = scheduler.schedule()
        for step in scheduler.update_from_output(scheduled, sampled(scheduler, scheduled)).values():
            found += step.outputs
    return sum(len(output.new_token_ids) for output in found)


@pytest.fixture
def alone(folder):
    """`alone(**wish)`: a scheduler with statistics, and one completion of 120 tokens."""
    from vllm import SamplingParams

    def make(**wish):
        settings = server_settings(folder, max_num_seqs=8)

        scheduler = make_scheduler(settings, is_async=True, num_blocks=100, wrapped=in_parts, log_stats=True)
        plain = {"max_tokens": 120, "ignore_eos": True, "detokenize": False}
        scheduler.add_request(make_request("alone", [5, 6], SamplingParams(**plain | wish)))
        return scheduler

    return make


def test_parameters_go_to_a_worker_as_vllm_checks_them(alone):
    """A worker in a process of its own gets them by pickle, and vLLM before 0.32 checks them there again."""
    parameters = alone(stop_token_ids=[END, 5]).requests["alone"].sampling_params
    parameters._verify_args()
    assert parameters.stop_token_ids == [END, 5]


def test_a_part_is_so_many_tokens_after_a_first(alone):
    go_on(alone(), 200, found := [])
    assert [len(output.new_token_ids) for output in found] == [1, PART, 120 - 1 - PART]


def test_log_probs_of_chosen_ids_are_answered(alone):
    """Nobody else wants log-probs, and this one by its ids alone."""
    go_on(alone(logprob_token_ids=[3, 4]), 200, found := [])
    assert len(found) == 120 and all(output.new_logprobs for output in found)


def test_a_pause_that_waits_ends_with_all_tokens_reported(alone):
    """What was preempted waits over it, and over the weights that are loaded meanwhile."""
    from vllm.v1.core.sched.interface import PauseState

    scheduler, found = alone(), []
    go_on(scheduler, 20, found)
    scheduler.reset_prefix_cache(reset_running_requests=True)
    scheduler.set_pause_state(PauseState.PAUSED_NEW)
    assert go_on(scheduler, 50, found) == 20 and not scheduler.has_requests()
    assert len(scheduler.requests) == 1
    scheduler.set_pause_state(PauseState.UNPAUSED)
    assert go_on(scheduler, 200, found) == 120


def test_a_preemption_is_told_before_the_completion_ends(alone):
    """A trainer reads how many there were."""
    scheduler, found = alone(), []
    go_on(scheduler, 20, found)
    scheduler.reset_prefix_cache(reset_running_requests=True)
    assert go_on(scheduler, PART, found) < 120
    kinds = [event.type.name for output in found for event in output.events or ()]
    assert kinds == ["QUEUED", "SCHEDULED", "PREEMPTED", "SCHEDULED"]


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
