"""Engines give the experts of every token, and runs replay them: also one that was killed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rl.moe.replay import recorder
from rl.moe.routers import find_routers
from rl.types import Prompt, SamplingParams
from rollout.calls import completion_routes
from rollout.engine import EngineError
from rollout.transformers import TransformersEngine
from tests.calling import call
from tests.rl.moe.tiny import live_routes, load, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_dir):
    return save("qwen3_moe", tmp_path_factory.mktemp("moe"), tiny_model_dir)


@pytest.mark.parametrize("cache", ["shared", "own", "none"])
def test_the_transformers_engine_gives_the_experts_of_each_token(folder, cache):
    policy, _ = load(folder)
    engine = TransformersEngine(folder, policy.tokenizer, recorder=policy.recorder)
    assert engine.cache == "shared"
    engine.cache = cache
    prompts = [Prompt("a", "", (5, 6, 7)), Prompt("b", "", tuple(range(8, 24)))]
    sampling = SamplingParams(temperature=0.9, max_completion_length=9, stop_token_ids=tuple(range(30, 45)))
    groups = engine.generate(call(prompts, num_completions=3, sampling=sampling, seeds=[0, 1]))
    lengths = set()
    for group in groups:
        for completion in group.completions:
            expected = live_routes(policy, group.prompt.token_ids, completion.token_ids)
            assert completion.routes.dtype == np.int8
            assert np.array_equal(np.sort(completion.routes), np.sort(expected))
            lengths.add(len(completion.token_ids))
    assert len(lengths) > 2 and min(lengths) < 9


def test_a_stop_string_cuts_the_routes_too(folder):
    policy, _ = load(folder)
    engine = TransformersEngine(folder, policy.tokenizer, recorder=policy.recorder)
    text = policy.tokenizer.decode([9])
    sampling = SamplingParams(temperature=2.0, max_completion_length=30, stop=(text,))
    (group,) = engine.generate(
        call([Prompt("a", "", (5, 6))], num_completions=8, sampling=sampling, seeds=[0])
    )
    assert min(len(c.token_ids) for c in group.completions) < 30
    assert all(len(c.routes) == len(c.token_ids) for c in group.completions)


def test_rows_of_other_tokens_are_refused():
    rows = np.arange(24).reshape(4, 3, 2)
    found = completion_routes(rows, 4)
    assert found[:-1].tolist() == rows[1:].tolist() and (found[-1] == -1).all()
    assert completion_routes(rows + 200, 4).dtype == np.int16
    assert completion_routes(None, 4) is None
    with pytest.raises(EngineError, match="experts of 4 tokens for 5 sampled ones"):
        completion_routes(rows, 5)


def test_a_recorder_marks_dense_layers_as_missing(tiny_model_dir, tmp_path):
    policy, _ = load(save("deepseek_v3", tmp_path, tiny_model_dir))
    with policy.in_rows(), recorder(policy.model, find_routers(policy.model))(1) as found:
        policy.model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    assert found[0].shape == (1, 1, 4, 2)
    assert (found[0][0, 0, 0] == -1).all() and (found[0][0, 0, 1:] >= 0).all()
