"""The sampler behind the Engine protocol, and traces on their way through the ledger."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from rl.diffusion.model import load_diffusion_model
from rl.store.ledger import Ledger
from rl.types import Prompt, Reward, SamplingParams, ScoredGroup
from rollout.diffusion.engine import DiffusionEngine
from rollout.diffusion.steps import DenoisingParams
from rollout.engine import EngineError
from tests.calling import call

MASK, ENDS = 2, tuple(range(20, 40))


@pytest.fixture(scope="module")
def engine(tiny_model_dir):
    model = load_diffusion_model(str(tiny_model_dir), mask_token_id=MASK)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    return DiffusionEngine(model, tokenizer, DenoisingParams(8, block_length=4, steps=4), max_num_seqs=5)


def prompts(*lengths: int) -> list[Prompt]:
    return [Prompt(f"p{n}", "", tuple(50 + i for i in range(n))) for n in lengths]


def generate(engine, prompts, seeds, *, n=3, length=8, **sampling):
    params = SamplingParams(length, stop_token_ids=ENDS, **sampling)
    return engine.generate(call(prompts, num_completions=n, sampling=params, seeds=seeds))


def test_completions_end_at_end_tokens_and_keep_their_trace(engine):
    engine.version = 7
    groups = generate(engine, prompts(2, 5, 3), [1, 2, 3], n=8)
    found = [c for group in groups for c in group.completions]
    assert [len(group.completions) for group in groups] == [8, 8, 8]
    assert {c.finish_reason for c in found} == {"stop", "length"}
    for c in found:
        ends = [t in ENDS for t in c.token_ids]
        assert not any(ends[:-1]) and ends[-1] == (c.finish_reason == "stop")
        assert (
            len(c.behavior_logprobs)
            == len(c.token_ids)
            == sum(c.loss_mask)
            == len(c.facts["trace"]["pieces"])
        )
        assert c.policy_version == 7 and all(p < 0 for p in c.behavior_logprobs)
        assert len(c.facts["trace"]["steps"]) == 8 == len(c.token_ids) + len(c.facts["trace"]["tail_ids"])
        # Two tokens a step: steps 0 and 1 write the first block, 2 and 3 the second, unless the row ended.
        assert c.facts["trace"]["num_steps"] in (2, 4)
        assert sorted(c.facts["trace"]["steps"])[:4] == [0, 0, 1, 1]
        tail = zip(c.facts["trace"]["tail_ids"], c.facts["trace"]["steps"][len(c.token_ids) :], strict=True)
        assert all((token == MASK) == (step == c.facts["trace"]["num_steps"]) for token, step in tail)
    assert any(c.text == "".join(c.facts["trace"]["pieces"]) for c in found)
    assert any(MASK in c.facts["trace"]["tail_ids"] for c in found)


def test_a_completion_depends_on_its_seed_alone(engine):
    together = generate(engine, prompts(2, 5, 3), [1, 2, 3])
    alone = generate(engine, prompts(5), [2], n=2)
    other = generate(engine, prompts(5), [9], n=2)
    for a, b in zip(alone[0].completions, together[1].completions, strict=False):
        assert a.token_ids == b.token_ids and a.facts == b.facts
    assert other[0].completions[0].token_ids != alone[0].completions[0].token_ids
    assert together[0].completions[0].token_ids != together[0].completions[1].token_ids


def test_what_is_submitted_is_collected_with_the_results_of_a_call(engine):
    asked, sampling = prompts(2, 5), SamplingParams(8, stop_token_ids=ENDS)
    engine.submit(call(asked, num_completions=3, sampling=sampling, seeds=[1, 2]))
    assert engine.in_flight == 6
    assert engine.collect(timeout_s=1.0) == generate(engine, asked, [1, 2])
    assert engine.in_flight == 0 and engine.collect(timeout_s=1.0) == []


def test_the_steps_of_a_block_stay_with_another_length_and_temperature_0_is_greedy(engine):
    greedy = generate(engine, prompts(3), [1], n=2, length=16, temperature=0.0)[0].completions
    assert greedy[0].token_ids == greedy[1].token_ids
    assert len(greedy[0].facts["trace"]["steps"]) == 16
    (group,) = engine.generate(call(prompts(3), num_completions=1, sampling=SamplingParams(16), seeds=[0]))
    assert group.completions[0].facts["trace"]["num_steps"] == 8


def test_failures_are_data_until_nothing_is_left(engine):
    bad = [Prompt("masked", "", (50, MASK)), Prompt("long", "", (50,) * 600), *prompts(2)]
    groups = generate(engine, bad, [1, 2, 3])
    aborts = [[c.finish_reason == "abort" for c in group.completions] for group in groups]
    assert aborts == [[True] * 3, [True] * 3, [False] * 3]
    with pytest.raises(EngineError, match=r"prompt masked contains the mask token \(id 2\)"):
        generate(engine, bad[:1], [1])
    engine.timeout_s = 0.0
    with pytest.raises(EngineError, match="no completion of 1 prompts was finished within timeout_s=0"):
        generate(engine, prompts(2), [1])
    engine.timeout_s = 600.0


def test_what_the_sampler_cannot_do_is_refused(engine):
    with pytest.raises(ValueError, match=r"draws from the whole distribution; use top_p=1\.0"):
        generate(engine, prompts(2), [1], top_p=0.9)
    with pytest.raises(ValueError, match="gen_length=10 is not divisible by block_length=4"):
        generate(engine, prompts(2), [1], length=10)


def test_traces_come_back_from_the_ledger(engine, tmp_path):
    groups = [ScoredGroup(g, [Reward(0.0)] * 3) for g in generate(engine, prompts(2, 5), [1, 2])]
    ledger = Ledger(tmp_path)
    ledger.write(0, groups, cursor_before=0, cursor_after=2, policy_version=0)
    step = ledger.read(0)
    assert step is not None and step.groups == groups
    groups[0].completions[1].facts = {}
    ledger.write(1, groups, cursor_before=2, cursor_after=4, policy_version=0)
    step = ledger.read(1)
    assert step is not None and step.groups[0].completions[1].facts == {}
