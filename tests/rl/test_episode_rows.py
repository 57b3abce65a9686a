"""Episodes in the loss: masks, several rows with one reward, and credit by turn that is not biased."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from rl.advantages import compute_advantages, group_outcome, turn_advantages
from rl.batch import pack
from rl.causal import CausalPolicy
from rl.config import AdvantageConfig
from rl.config.read import load_config
from rl.record import grader_faults
from rl.types import (
    Completion,
    Continuation,
    Group,
    Prompt,
    Reason,
    Reward,
    ScoredGroup,
    Segment,
    VersionSpan,
)
from rl.update import pack_rules, update_policy
from tests.scoring import alone

SHAPE = [("sampled", 4), ("scaffold", 2), ("tool", 3), ("scaffold", 1), ("sampled", 5)]


def row(shape, *, first: int = 5, reason="stop") -> Completion:
    total = sum(number for _, number in shape)
    mask = [origin == "sampled" for origin, number in shape for _ in range(number)]
    ids = [5 + (first + 7 * t) % 90 for t in range(total)]
    logprobs = [-4.0 - 0.01 * t if m else 0.0 for t, m in enumerate(mask)]
    made = Completion(ids, logprobs, mask, reason, [VersionSpan(0, total)])
    made.segments = [Segment(origin, number) for origin, number in shape]
    return made


def episode(first: int, *further: int) -> Completion:
    made = row(SHAPE, first=first)
    made.continuations = [
        Continuation(tuple(range(10 + n, 17 + n)), row([("sampled", 3 + n % 4)], first=n)) for n in further
    ]
    return made


def load(folder, *overrides):
    config = load_config(
        None,
        [f"model.name={folder}", "model.dtype=fp32", "loss.kl_coef=0", "train.token_budget=64", *overrides],
    )
    policy = CausalPolicy(config.model, Accelerator(cpu=True), temperature=1.0)
    policy.settle_attention()
    return policy, config


def gradients(policy, config, groups, advantages, *, packed: bool = True):
    """The gradient of a step, and its batches."""
    policy.set_packed(packed)
    optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.0)
    batches = pack(groups, advantages, pack_rules(config, share_prompts=policy.shares_prompts))
    found = {}
    finish = policy.finish_gradients

    def keep(max_norm):
        found.update({name: p.grad.clone() for name, p in policy.trainable() if p.grad is not None})
        return finish(max_norm)

    policy.finish_gradients = keep
    update_policy(policy, optimizer, batches, config.loss, world=alone(policy))
    policy.finish_gradients = finish
    return found, batches


def plain_gradients(folder, rows, weights):
    """d/dw of -sum_r weight_r sum_t A log p(t), by transformers alone; rows: (prompt, completion, A)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    total = torch.zeros(())
    for (prompt, completion, advantage), weight in zip(rows, weights, strict=True):
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        logprobs = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        chosen = logprobs.gather(-1, ids[0, len(prompt) :, None])[:, 0]
        total = total - weight * advantage * chosen[torch.tensor(completion.loss_mask)].sum()
    total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    scale = max(g.abs().max() for g in expected.values())
    assert scale > 1e-3
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("packed", [True, False])
def test_an_episode_of_several_rows_has_the_gradient_of_its_rows_with_one_reward(tiny_model_dir, packed):
    """loss.name=grpo: mean over 3 episodes of the mean over an episode's sampled tokens."""
    policy, config = load(tiny_model_dir, "loss.sampler_correction=null")
    prompt = Prompt("p", "", (5, 6, 7))
    completions = [episode(1), episode(2, 1, 2), episode(3, 3)]
    group = ScoredGroup(Group(prompt, completions), [Reward(1.0)] * 3)
    advantages = [0.5, -1.5, 2.0]
    found, (batch,) = gradients(policy, config, [group], [advantages], packed=packed)
    assert batch.num_sequences == 3 and batch.num_loss_tokens == 9 + (9 + 4 + 5) + (9 + 6)
    rows, weights = [], []
    for completion, advantage in zip(completions, advantages, strict=True):
        parts = [(prompt.token_ids, completion)]
        parts += [(c.prompt_token_ids, c.completion) for c in completion.continuations]
        number = sum(sum(c.loss_mask) for _, c in parts)
        rows += [(ids, c, advantage) for ids, c in parts]
        weights += [1 / (3 * number)] * len(parts)
    assert_same(found, plain_gradients(tiny_model_dir, rows, weights))


@pytest.mark.parametrize("packed", [True, False])
def test_rows_that_share_the_groups_prompt_have_the_same_gradient(tiny_model_dir, packed):
    """Further rows that go on from the prompt, and not as the first row did."""
    policy, config = load(tiny_model_dir, "loss.sampler_correction=null")
    prompt = Prompt("p", "", (5, 6, 7))
    completions = [episode(1), episode(2, 1, 2)]
    completions[1].continuations = [
        replace(c, prompt_token_ids=(5, 6, 7, *c.prompt_token_ids)) for c in completions[1].continuations
    ]
    group = ScoredGroup(Group(prompt, completions), [Reward(1.0)] * 2)
    found, (batch,) = gradients(policy, config, [group], [[0.5, -1.5]], packed=packed)
    if packed:  # 15 and 15 + (7 + 4) + (7 + 5) tokens after one prompt
        assert sum(len(m.token_ids_N) for m in batch.micro_batches) == 3 + 15 + 15 + 11 + 12
    rows = [(prompt.token_ids, completions[0], 0.5), (prompt.token_ids, completions[1], -1.5)]
    rows += [(c.prompt_token_ids, c.completion, -1.5) for c in completions[1].continuations]
    number = 9 + sum(sum(c.completion.loss_mask) for c in completions[1].continuations)
    assert_same(found, plain_gradients(tiny_model_dir, rows, [1 / (2 * 9), *[1 / (2 * number)] * 3]))


def test_tokens_of_scaffold_and_tools_have_no_gradient(tiny_model_dir):
    """Those at the end of a row are seen by no later token: others in their place change no bit of it."""
    policy, config = load(tiny_model_dir)
    prompt = Prompt("p", "", (5, 6, 7))
    tail = [*SHAPE, ("scaffold", 1), ("tool", 4)]
    ends = []
    for ids in ([11, 12, 13, 14, 15], [80, 81, 82, 83, 84]):
        completion = row(tail)
        completion.token_ids[-5:] = ids
        group = ScoredGroup(Group(prompt, [completion]), [Reward(1.0)])
        found, (batch,) = gradients(policy, config, [group], [[1.0]])
        (micro_batch,) = batch.micro_batches
        assert len(micro_batch.columns_L) == 9
        ends.append(found)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    group = ScoredGroup(Group(prompt, [row(SHAPE)]), [Reward(1.0)])
    _, (batch,) = gradients(policy, config, [group], [[1.0]])
    (micro_batch,) = batch.micro_batches
    logprobs = policy.score(policy.prepare(batch, draw=0)[0]).logprobs_L
    sampled = [t for t, m in enumerate(row(SHAPE).loss_mask) if m]
    assert micro_batch.columns_L.tolist() == [3 + t for t in sampled] and len(logprobs) == 9


@pytest.mark.parametrize("name", ["gspo", "grpo"])
def test_a_loss_of_sequences_takes_whole_episodes(tiny_model_dir, name):
    """Rows of an episode are in one micro-batch and one sequence, however small the token budget."""
    overrides = ["loss.sampler_correction={level: sequence}", f"loss.name={name}", "train.token_budget=16"]
    _, config = load(tiny_model_dir, *overrides)
    group = ScoredGroup(
        Group(Prompt("p", "", (5, 6, 7)), [episode(1, 4, 5), episode(2, 6)]), [Reward(1.0)] * 2
    )
    (batch,) = pack([group], [[1.0, -1.0]], pack_rules(config))
    assert [m.num_sequences for m in batch.micro_batches] == [1, 1]
    for micro_batch in batch.micro_batches:
        assert micro_batch.sequence_ids_L.unique().tolist() == [0]
        assert len({row.episode for row in micro_batch.rows}) == 1
    assert sorted(len(m.rows) for m in batch.micro_batches) == [2, 3]


def test_a_cut_or_failed_episode_counts_as_one():
    cut = episode(1, 2)
    cut.finish_reason = "length"
    failed = Completion([], [], [], "abort", [])
    failed.facts = {"fault": "the server is down"}
    gone = Completion([], [], [], "abort", [])
    group = ScoredGroup(
        Group(Prompt("p", "", (5,)), [cut, failed, gone]),
        [Reward(0.0), *[Reward(None, Reason.INFRA_ERROR, "x")] * 2],
    )
    rules = pack_rules(load_config(None, ["loss.mask_truncated=true"]))
    (batch,) = pack([group], [[1.0, 0.0, 0.0]], rules)
    assert (batch.num_sequences, batch.num_loss_tokens, batch.micro_batches) == (1, 0, [])
    faults, num_graded = grader_faults([group])
    assert (len(faults), num_graded) == (1, 2)


def scored(*turns, reason="stop"):
    """A group of episodes with these rewards of turns, one token a turn and one between two."""
    completions = []
    for rewards in turns:
        shape = [("sampled", 1), ("tool", 1)] * (len(rewards) - 1) + [("sampled", 1)]
        completions.append(row(shape, reason=reason))
    rewards = [Reward(math.fsum(r or 0 for r in t), turns=t) for t in turns]
    return ScoredGroup(Group(Prompt("p", "", (5,)), completions), rewards)


def test_credit_by_turn_is_the_return_to_go_less_the_mean_of_the_others():
    """Returns: (3, 2), (1), (0, -1): A of the first is 3 - (1 + 0) / 2 and 2 - (0 - 1) / 2, of the second
    1 - (3 + 0) / 2, of the third 0 - (3 + 1) / 2 and -1 - (2 + 0) / 2.
    """
    group = scored((1.0, 2.0), (1.0,), (1.0, -1.0))
    expected = [[2.5, 0.0, 2.5], [-0.5], [-2.0, 0.0, -2.0]]
    assert turn_advantages(group) == expected
    config = AdvantageConfig(name="rloo", credit="turns")
    assert compute_advantages([group], config=config, weights={}) == [expected]
    group.completions[1].finish_reason = "abort"
    assert turn_advantages(group) == [[3.0, 0.0, 3.0], 0.0, [-3.0, 0.0, -3.0]]
    assert turn_advantages(scored((1.0,), (1.0,))) == [[0.0], [0.0]]
    several = scored((1.0, 2.0), (0.0,))
    (first, _) = several.completions
    first.continuations = [Continuation((1, 2), row([("sampled", 2)]))]
    with pytest.raises(ValueError, match=r"has 3 turns and .* as their rewards"):
        turn_advantages(several)
    several.rewards[0] = Reward(4.0, turns=(1.0, 2.0, 1.0))
    assert turn_advantages(several) == [[4.0, 0.0, 3.0, 1.0, 1.0], [-4.0]]


def test_credit_by_turn_needs_what_it_can_use():
    with pytest.raises(ValueError, match=r"use advantage.name=rloo and aggregate=sum with it, not grpo"):
        AdvantageConfig(credit="turns")


P, Q, STOPPED, LATER = 0.4, 0.7, 0.5, (0.6, 0.2)


def expected_gradient(advantages_fn) -> tuple[float, float]:
    """E[1/G sum_i sum_t A_t d log pi] by enumeration of three episodes of the toy: stop at once for 0.5; or
    go on (probability P), and then the second turn pays 0.6 (probability Q) or 0.2.
    """
    outcomes = [
        (1 - P, (STOPPED,), (-P, 0.0)),
        (P * Q, (0.0, LATER[0]), (1 - P, 1 - Q)),
        (P * (1 - Q), (0.0, LATER[1]), (1 - P, -Q)),
    ]  # probability, rewards of turns, d log pi / d logit of each turn's action
    totals = [0.0, 0.0]
    for three in itertools.product(outcomes, repeat=3):
        probability = math.prod(p for p, _, _ in three)
        for (_, rewards, scores), per_turn in zip(
            three, advantages_fn([r for _, r, _ in three]), strict=True
        ):
            for t in range(len(rewards)):
                totals[t] += probability * per_turn[t] * scores[t] / 3
    return totals[0], totals[1]


def test_credit_by_turn_is_not_biased_where_the_policy_decides_when_to_stop():
    """True gradients: P (1 - P) (E[second turn] - 0.5) < 0 for the decision to go on, since 0.7 * 0.6 +
    0.3 * 0.2 = 0.48 < 0.5; P Q (1 - Q) (0.6 - 0.2) for the second turn.

    Rewards of a turn less the mean of those that have it (biased, verl issue 7244): going on costs its mean
    reward, and the gradient is far more negative.
    """
    truth = (
        P * (1 - P) * (Q * LATER[0] + (1 - Q) * LATER[1] - STOPPED),
        P * Q * (1 - Q) * (LATER[0] - LATER[1]),
    )

    def ours(turns):
        return [per_token[::2] for per_token in turn_advantages(scored(*turns))]

    assert expected_gradient(ours) == pytest.approx(truth, abs=1e-12)

    def by_turn_number(turns):
        centred = []
        for rewards in turns:
            own = []
            for t, reward in enumerate(rewards):
                those = [r[t] for r in turns if len(r) > t]
                own.append(reward - sum(those) / len(those))
            centred.append([sum(own[t:]) for t in range(len(own))])
        return centred

    biased = expected_gradient(by_turn_number)
    assert biased[0] < 3 * truth[0] < 0


def test_a_group_with_equal_sums_can_teach_by_turn():
    """Returns (1, 0) and (1, 1): the second turn has advantages -1 and 1."""
    group = scored((1.0, 0.0), (0.0, 1.0))
    assert turn_advantages(group) == [[0.0, 0.0, -1.0], [0.0, 0.0, 1.0]]
    by_turn = AdvantageConfig(name="rloo", credit="turns")
    assert group_outcome(group, config=by_turn, weights={"environment": 1.0}) == "mixed"
    assert group_outcome(group, config=AdvantageConfig(), weights={"environment": 1.0}) == "all_right"
