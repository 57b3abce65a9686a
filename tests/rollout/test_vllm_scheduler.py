"""The scheduler's short cuts change nothing: vLLM's own code per token makes the same steps and answers.

Both schedulers get the same completions, and for each of their tokens the same number, without a model.
"""

import random

import numpy as np
import pytest
from tiny_llama import make_model, save

from rollout.vllm_scheduler import KNOWN, LOGPROBS, MARKS, known_version
from rollout.vllm_start import vllm_available
from tests.bench.scheduling import BLOCK, make_output, make_request, make_scheduler, settings_for

REASON = vllm_available()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
END = 2


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = save(make_model(0), tmp_path_factory.mktemp("model"))
    return settings_for(folder, max_model_len=128, max_num_seqs=48, max_num_batched_tokens=256)


def requests(number):
    """Completions of 1 to 90 tokens; three of a kind share a prompt, and a few have rules of their own."""
    from vllm import SamplingParams

    draw = random.Random(5)
    for k in range(number):
        longest = draw.choice([1, 2, 30, 90])
        parameters = SamplingParams(
            max_tokens=longest,
            min_tokens=min(20, longest) * (k % 7 == 3),
            stop_token_ids=[END],
            ignore_eos=True,
            detokenize=False,
            logprobs=0 if k % 3 else None,
        )
        prompt = [100 + (k // 3) % 150] * draw.choice([1, 5, BLOCK, 37])
        yield make_request(str(k), prompt, parameters)


def token(name, position):
    """An end one time in 50, whoever asks."""
    return random.Random(f"{name}/{position}").choice([END, *range(3, 52)])


def drive(scheduler, *, depth, events):
    """(what every step was, what every completion came to), with `depth` steps on their way at a time."""
    for request in requests(90):
        scheduler.add_request(request)
    steps, answers, on_their_way = [], {}, []
    for number in range(3000):
        for event in events.get(number, ()):
            while on_their_way:
                take(scheduler, on_their_way.pop(0), answers)
            event(scheduler)
        if not scheduler.has_requests():
            while on_their_way:
                take(scheduler, on_their_way.pop(0), answers)
            return steps, answers
        scheduled = scheduler.schedule()
        steps.append(described(scheduled))
        on_their_way.append((scheduled, sampled(scheduler, scheduled)))
        if len(on_their_way) == depth:
            take(scheduler, on_their_way.pop(0), answers)
    raise AssertionError("the completions came to no end")


def sampled(scheduler, scheduled):
    """What a model runner would answer: no token where a prompt, or what was preempted, is not through."""
    names, tokens = list(scheduled.num_scheduled_tokens), []
    random.Random(len(names)).shuffle(names)  # its rows are in an order of its own
    for name in names:
        request = scheduler.requests[name]
        if request.is_prefill_chunk:
            tokens.append([])
            continue
        tokens.append([token(name, request.num_computed_tokens)])
    return make_output(names, tokens, [-0.01 * (row[0] if row else 0) for row in tokens])


def take(scheduler, step, answers):
    for outputs in scheduler.update_from_output(*step).values():
        for output in outputs.outputs:
            assert output.request_id not in answers
            answers[output.request_id] = (
                list(output.new_token_ids),
                str(output.finish_reason),
                np.frombuffer(output.kv_transfer_params[LOGPROBS], "f").tolist(),
                list(output.kv_transfer_params[MARKS]),
            )


def described(scheduled):
    cached = scheduled.scheduled_cached_reqs
    return {
        "tokens": dict(scheduled.num_scheduled_tokens),
        "new": [(r.req_id, r.num_computed_tokens, r.block_ids) for r in scheduled.scheduled_new_reqs],
        "cached": [
            *zip(
                cached.req_ids,
                cached.num_computed_tokens,
                cached.num_output_tokens,
                cached.new_block_ids,
                strict=True,
            )
        ],
        "resumed": sorted(cached.resumed_req_ids),
        "gone": (sorted(scheduled.finished_req_ids), sorted(scheduled.preempted_req_ids or ())),
    }


def pause(scheduler):
    from vllm.v1.core.sched.interface import PauseState

    scheduler.set_pause_state(PauseState.PAUSED_ALL)


def resume(scheduler):
    from vllm.v1.core.sched.interface import PauseState

    scheduler.set_pause_state(PauseState.UNPAUSED)


def recompute(scheduler):
    assert scheduler.reset_prefix_cache(reset_running_requests=True)


def abort(scheduler):
    from vllm.v1.request import RequestStatus

    scheduler.finish_requests(["4", "40", "89"], RequestStatus.FINISHED_ABORTED)


EVENTS = {8: [abort], 20: [pause, resume], 40: [pause, recompute, resume]}


@pytest.mark.parametrize("num_blocks", [1000, 60], ids=["room for all", "preemption"])
@pytest.mark.parametrize(("is_async", "depth"), [(True, 2), (False, 1)], ids=["async", "sync"])
def test_short_cuts_schedule_and_answer_as_vllm_does(settings, is_async, depth, num_blocks):
    known = known_version()
    if known is None:
        pytest.skip(f"this vLLM is none of {', '.join(KNOWN)}")
    ours = make_scheduler(settings, is_async=is_async, short_cuts=True, num_blocks=num_blocks)
    stock = make_scheduler(settings, is_async=is_async, short_cuts=False, num_blocks=num_blocks)
    assert ours.tokens_per_block == BLOCK and not stock.tokens_per_block
    steps, answers = drive(ours, depth=depth, events=EVENTS)
    expected_steps, expected = drive(stock, depth=depth, events=EVENTS)
    assert answers == expected
    assert len(answers) == 87 and {len(marks) for *_, marks in answers.values()} == {0, 1, 2}
    for number, (step, wanted) in enumerate(zip(steps, expected_steps, strict=True)):
        assert step == wanted, number
    preempted = sum(bool(step["gone"][1]) for step in steps)
    assert preempted > 1 if num_blocks == 60 else preempted == 1  # the one is for new keys and values


def test_completions_with_rules_of_their_own_take_vllms_way(settings):
    scheduler = make_scheduler(settings, is_async=True, short_cuts=True, num_blocks=1000)
    taken = []
    whole = scheduler._update_request_with_output
    scheduler._update_request_with_output = lambda request, *rest, **more: (
        taken.append(request.request_id),
        whole(request, *rest, **more),
    )[1]
    _, answers = drive(scheduler, depth=2, events={})
    plain = [name for name in answers if int(name) % 7 != 3]
    for name, (tokens, *_) in answers.items():
        assert taken.count(name) == (min(len(tokens), 2) if name in plain else len(tokens)), name


def test_an_unknown_vllm_is_left_alone_and_said(settings, monkeypatch, caplog):
    monkeypatch.setattr("rollout.vllm_scheduler.KNOWN", {"0.1": "x"})
    with caplog.at_level("WARNING", logger="vllm.cohort"):
        scheduler = make_scheduler(settings, is_async=True, short_cuts=True, num_blocks=100)
    assert not scheduler.tokens_per_block
