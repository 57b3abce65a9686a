"""The largest micro-batches of episodes of several rows, in the plan and in the trial before step 0."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from rl.batch import MicroBatch, pack
from rl.config import Config
from rl.config.read import load_config, replaced
from rl.model import packed
from rl.plan.memory import GIB, Card, plan_memory
from rl.plan.probe import largest
from rl.plan.search import fit
from rl.plan.sizes import ModelSize
from rl.types import Completion, Continuation, Group, Prompt, Reward, ScoredGroup, VersionSpan
from rl.update import pack_rules
from tests.rl.cpu_kernels import KERNELS
from tests.saved_tensors import bytes_kept

P, C, ROWS = 6, 16, 4
SHAPE = LlamaConfig(
    vocab_size=200,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def config_of(budget: int, *words: str) -> Config:
    episodes = f"environment={{name: gym, max_turns: {ROWS}, history: template}}"
    base = [f"data.max_prompt_length={P}", f"sampling.max_completion_length={C}", "model.dtype=fp32"]
    return load_config(None, [*base, episodes, f"train.token_budget={budget}", *words])


def row(n: int) -> Completion:
    return Completion([7] * n, [0.0] * n, [True] * n, "stop", [VersionSpan(0, n)])


def drawn(seed: int) -> ScoredGroup:
    """Episodes of up to ROWS rows of up to C tokens after the prompt; contexts begin one another, or not."""
    draw, answers = random.Random(seed), []
    prompt = tuple(draw.randrange(9) for _ in range(draw.randint(1, P)))
    for _ in range(draw.randint(1, 4)):
        answers.append(row(draw.randint(1, C)))
        chain = [draw.randrange(9) for _ in range(C)]
        for _ in range(draw.randint(0, ROWS - 1)):
            context = chain if draw.random() < 0.7 else [draw.randrange(9) for _ in range(C)]
            number = draw.randint(0, C - 1)
            own = row(draw.randint(1, C - number))
            answers[-1].continuations.append(Continuation((*prompt, *context[:number]), own))
    return ScoredGroup(Group(Prompt("p", "", prompt), answers), [Reward(0.0)] * len(answers))


def keys(batch: MicroBatch) -> int:
    """That one attention call copies."""
    plan = batch.layout.varlen()
    copied = [x.seen_S for x in (plan.own, *plan.crossings) if x.seen_S is not None]
    return max(map(len, copied), default=0)


def tried(config: Config) -> list[MicroBatch]:
    return [
        batch
        for groups in largest(config, pack_rules(config), 200)
        for one in pack(*groups, pack_rules(config))
        for batch in one.micro_batches
    ]


@pytest.mark.parametrize("budget", [24, 60, 150])
def test_no_micro_batch_of_episodes_is_larger_than_those_that_are_tried(budget):
    config = config_of(budget)
    most_tokens, most_keys = 0, 0
    for seed in range(40):
        groups = [drawn(4 * seed + i) for i in range(4)]
        for batch in pack(groups, [[1.0] * len(g.rewards) for g in groups], pack_rules(config)):
            most_tokens = max([most_tokens, *(len(m.token_ids_N) for m in batch.micro_batches)])
            most_keys = max([most_keys, *map(keys, batch.micro_batches)])
    assert most_tokens > 0.7 * max(budget, P + C) and most_keys > most_tokens
    assert most_tokens <= max(len(m.token_ids_N) for m in tried(config))
    assert most_keys <= max(map(keys, tried(config)))


def test_trials_are_those_by_hand():
    """A prompt of 6. After it, 9 completions of 16 have 150 columns, and 48 of 3, which see 9 columns each; a
    whole episode has 6 + 4 x 16.
    """
    (long, short), (_, _, whole) = tried(config_of(150)), tried(config_of(60))
    assert [(len(m.token_ids_N), keys(m)) for m in (long, short, whole)] == [
        (150, 6 + 9 * (6 + 16)),
        (150, 6 + 48 * (6 + 3)),
        (70, 6 + 4 * (6 + 16)),
    ]
    alone = replaced(config_of(60), {"environment.history": "append"})
    assert [len(m.token_ids_N) for m in tried(alone)] == [60, 60]


@pytest.mark.parametrize("budget", [24, 150])
def test_the_plan_covers_what_the_largest_micro_batch_of_episodes_keeps(budget):
    """On a CPU by the code of GPUs: attention in one varlen call, which keeps no copies of keys."""
    model = LlamaForCausalLM(SHAPE)
    model.set_attn_implementation(packed.PACKED)
    config = config_of(budget)
    kept = 0
    for m in tried(config):
        given = {"position_ids": m.positions_N[None], "cohort_layout": replace(m.layout, kernels=KERNELS)}
        kept = max(kept, bytes_kept(model, "fp32", len(m.token_ids_N), **given))
    size = ModelSize.of(SHAPE, fused_layers=False, dtype="fp32")
    plan = plan_memory(size, config, Card("a GPU", 8 * GIB), P + C)
    (planned,) = (part.bytes for part in plan.parts if part.name == "activations")
    assert kept / 1.1 <= planned <= 1.1 * kept


def test_a_plan_for_episodes_holds_a_whole_one_whatever_the_budget():
    """512 rows of 16 tokens after a prompt of 6."""
    config = config_of(24, "train.prompts_per_step=1", "train.group_size=2")
    config = replaced(config, {"train.token_budget": "auto", "environment.max_turns": 512})
    found = fit(ModelSize.of(SHAPE, fused_layers=False), config, Card("a GPU", 24 * GIB), P + C)
    assert found is not None and found["train.token_budget"] >= 6 + 512 * 16


@pytest.mark.parametrize("budget", [16, 25, 60, 65, 100, 1_000])
@pytest.mark.parametrize(("prompt", "answer"), [(6, 16), (40, 2), (20, 20)])
def test_no_padded_batch_is_larger_than_those_that_are_tried(budget, prompt, answer):
    """All numbers of rows and widths that a batch can have, to within a token of each row."""
    words = [f"data.max_prompt_length={prompt}", f"sampling.max_completion_length={answer}"]
    config = load_config(None, [*words, f"train.token_budget={budget}"])
    rules, longest = pack_rules(config, share_prompts=False), prompt + answer
    firsts = [pack(*groups, rules)[0].micro_batches[0] for groups in largest(config, rules, 200)]
    rows = range(1, budget // 2 + 1)
    most, number = max((n * min(longest, budget // n), n) for n in rows)
    assert most - number < max(len(m.blocks) * m.layout.longest for m in firsts) <= max(budget, longest)
    assert max(m.layout.longest for m in firsts) == longest  # attention holds the square of it
