"""Packing: columns, predecessors and shares by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rl.batch import PackRules, idle_micro_batch, pack
from rl.model.packed import Block
from rl.types import Completion, Continuation, Group, Prompt, Reward, ScoredGroup, VersionSpan


def completion(ids, reason="stop", mask=None) -> Completion:
    return Completion(ids, [-0.5] * len(ids), mask or [True] * len(ids), reason, [VersionSpan(0, len(ids))])


def scored(prompt_ids, *completions: Completion) -> ScoredGroup:
    return ScoredGroup(
        Group(Prompt("p", "", tuple(prompt_ids)), list(completions)), [Reward(1.0)] * len(completions)
    )


def rules(budget=1000, **options) -> PackRules:
    return PackRules(
        token_budget=budget, row_weight=lambda n, s, t, m: 1.0 / (s * n) if n else 0.0, **options
    )


def test_columns_and_predecessors_of_a_shared_prompt():
    """Row [10 11 | 1 2 | 3]: tokens 1 and 3 are both predicted from column 1, the last of the prompt."""
    (batch,) = pack([scored([10, 11], completion([1, 2]), completion([3]))], [[1.0, -1.0]], rules())
    (m,) = batch.micro_batches
    assert m.token_ids_N.tolist() == [10, 11, 1, 2, 3]
    assert m.positions_N.tolist() == [0, 1, 2, 3, 2]
    assert m.blocks == (Block(0, 2, (2, 1)),)
    assert m.columns_L.tolist() == [2, 3, 4] and m.targets_L.tolist() == [1, 2, 3]
    assert m.predecessors_L.tolist() == [1, 2, 1]
    assert m.sequence_ids_L.tolist() == [0, 0, 1]
    assert m.advantages_L.tolist() == [1.0, 1.0, -1.0]
    assert m.weights_L.tolist() == [0.25, 0.25, 0.5]


def test_a_group_larger_than_the_budget_repeats_its_prompt():
    """Prompt 2 + completions 3, 3, 3 under a budget of 8: [prompt, c0, c1] and [prompt, c2]."""
    group = scored([8, 9], *(completion([1, 2, 3]) for _ in range(3)))
    (batch,) = pack([group], [[1.0, 1.0, 1.0]], rules(budget=8))
    assert [len(m.token_ids_N) for m in batch.micro_batches] == [8, 5]


def test_tokens_that_the_policy_did_not_choose_are_read_and_not_trained():
    (batch,) = pack([scored([9], completion([1, 2, 3], mask=[True, False, True]))], [[1.0]], rules())
    (m,) = batch.micro_batches
    assert m.token_ids_N.tolist() == [9, 1, 2, 3]
    assert m.columns_L.tolist() == [1, 3] and m.predecessors_L.tolist() == [0, 2]
    assert batch.num_loss_tokens == 2


def test_aborted_completions_are_in_no_denominator_and_truncated_ones_may_be_masked():
    group = scored([9], completion([1]), completion([], "abort"), completion([2, 3], "length"))
    (kept,) = pack([group], [[1.0, 0.0, 1.0]], rules())
    assert (kept.num_sequences, kept.num_loss_tokens) == (2, 3)
    (masked,) = pack([group], [[1.0, 0.0, 1.0]], rules(mask_truncated=True))
    assert (masked.num_sequences, masked.num_loss_tokens) == (2, 1)


def test_counts_are_those_of_all_processes():
    (batch,) = pack(
        [scored([9], completion([1, 2]))], [[1.0]], rules(), sum_over_processes=lambda xs: [2 * x for x in xs]
    )
    assert (batch.num_sequences, batch.num_loss_tokens) == (2, 4)
    assert batch.micro_batches[0].weights_L.tolist() == [0.25, 0.25]


def test_groups_that_do_not_split_into_minibatches_are_refused():
    with pytest.raises(AssertionError, match="no equal minibatches"):
        pack([scored([9], completion([1]))] * 3, [[1.0]] * 3, rules(num_minibatches=2))


def test_mixed_behavior_logprobs_are_refused():
    bare = Completion([1], [], [True], "stop", [VersionSpan(0, 1)])
    with pytest.raises(ValueError, match="all of them or for none"):
        pack([scored([9], completion([1, 2]), bare)], [[1.0, 1.0]], rules())


def test_micro_batches_are_as_few_as_first_fit_needs_and_even(ragged_groups):
    groups, advantages = ragged_groups(num_groups=24)
    rules = PackRules(token_budget=300, row_weight=lambda *_: 1.0, skip_without_signal=False)
    sizes = [len(m.token_ids_N) for m in pack(groups, advantages, rules)[0].micro_batches]
    assert max(sizes) <= 300
    assert len(sizes) <= -(-sum(sizes) // 300) + 1
    assert max(sizes) - min(sizes) <= 60


def test_prompts_that_are_not_shared_count_in_the_budget(ragged_groups):
    """Prompt 4 + completions 2, 2, 2 under a budget of 12: two sequences of 6, and one."""
    group = scored([6, 7, 8, 9], *(completion([1, 2]) for _ in range(3)))
    (batch,) = pack([group], [[1.0, 1.0, 1.0]], rules(budget=12, share_prompts=False))
    assert [m.blocks for m in batch.micro_batches] == [
        (Block(0, 4, (2,)), Block(6, 4, (2,))),
        (Block(0, 4, (2,)),),
    ]
    groups, advantages = ragged_groups(num_groups=24)
    options = {"skip_without_signal": False, "share_prompts": False}
    (batch,) = pack(groups, advantages, rules(budget=300, **options))
    sizes, padded = zip(*(size_of(m) for m in batch.micro_batches), strict=True)
    assert max(padded) <= 300 and len(sizes) > 3
    assert all(4 * size >= 3 * whole for size, whole in zip(sizes, padded, strict=True))
    assert sum(sizes) == sum(
        len(g.prompt.token_ids) + len(c.token_ids) for g in groups for c in g.completions
    )


def size_of(m) -> tuple[int, int]:
    """Tokens of rows with prompts of their own, and of the rectangle that they are padded to."""
    rows = [len(row.prompt.token_ids) + len(row.completion.token_ids) for row in m.rows]
    assert len(m.token_ids_N) == sum(rows)
    return sum(rows), len(rows) * max(rows)


def test_rows_with_prompts_of_their_own_stand_beside_rows_of_about_their_length():
    """Under a budget of 30: 9 8 7 are padded to 27; 6 is less than 3/4 of 9. With an episode of rows of 3 and
    8: 24; a fourth row would make 32, 5 is less than 3/4 of 7.
    """
    group, found = scored([9], *(completion([1] * n) for n in (4, 7, 1, 8, 5, 2, 6))), []
    episode = completion([1, 1])
    episode.continuations.append(Continuation((9, 9), completion([1] * 6)))
    for third in (group.completions[3], episode):
        group.completions[3] = third
        (batch,) = pack([group], [[1.0] * 7], rules(budget=30, share_prompts=False))
        found.append([[block.end - block.start for block in m.blocks] for m in batch.micro_batches])
    assert found == [[[9, 8, 7], [6, 5], [3], [2]], [[8, 3, 8], [7, 6], [5], [3], [2]]]


def test_advantages_may_stand_per_token_and_reach_the_loss_tokens():
    """The second token is a tool's: its advantage counts nowhere."""
    group = scored([9], completion([1, 2, 3], mask=[True, False, True]), completion([4]))
    (batch,) = pack([group], [[[0.5, 9.0, -1.5], 2.0]], rules())
    assert batch.micro_batches[0].advantages_L.tolist() == [0.5, -1.5, 2.0]
    (batch,) = pack([group], [[[0.0, 9.0, 0.0], 2.0]], rules())  # no signal where the policy chose
    assert [row.index for m in batch.micro_batches for row in m.rows] == [1]
    with pytest.raises(AssertionError, match="2 advantages of 3 tokens"):
        pack([group], [[[0.5, 1.0], 2.0]], rules())


def test_further_rows_of_an_episode_stand_behind_prompts_of_their_own():
    """One sequence of 3 loss tokens beside another of one; an advantage for each token of all rows."""
    first = completion([1, 2])
    first.continuations = [Continuation((7, 8), completion([3]))]
    (batch,) = pack([scored([9], first, completion([4]))], [[[0.5, 0.25, -1.0], 2.0]], rules())
    assert (batch.num_sequences, batch.num_loss_tokens) == (2, 4)
    (m,) = batch.micro_batches
    rows = {
        tuple(ids.tolist()): m.sequence_ids_L[m.columns_L == start].item() for ids, _, start in m.sequences()
    }
    assert rows.keys() == {(9, 1, 2), (7, 8, 3), (9, 4)}
    assert rows[9, 1, 2] == rows[7, 8, 3] != rows[9, 4]
    by_token = dict(zip(m.targets_L.tolist(), m.advantages_L.tolist(), strict=True))
    assert by_token == {1: 0.5, 2: 0.25, 3: -1.0, 4: 2.0}
    with pytest.raises(AssertionError, match="2 advantages of 3 tokens"):
        pack([scored([9], first)], [[[0.5, 0.25]]], rules())


def test_rows_of_episodes_that_begin_with_the_groups_prompt_share_it():
    """Prompt [9, 8]; the second row of the first episode is [9, 8, 7 | 3], and 7 is read and not trained.

    Where a further row leaves the prompt at its end, all rows share what is left of it, if that is most.
    """
    first = completion([1, 2])
    first.continuations = [Continuation((9, 8, 7), completion([3]))]
    first.continuations[0].completion.routes = np.full((1, 2, 1), 5)
    group = scored([9, 8], first, completion([4]))
    (batch,) = pack([group], [[[0.5, 0.25, -1.0], 2.0]], rules())
    (m,) = batch.micro_batches
    assert m.blocks == (Block(0, 2, (2, 2, 1)),)
    assert m.token_ids_N.tolist() == [9, 8, 1, 2, 7, 3, 4] and m.positions_N.tolist() == [0, 1, 2, 3, 2, 3, 2]
    assert m.columns_L.tolist() == [2, 3, 5, 6] and m.predecessors_L.tolist() == [1, 2, 4, 1]
    assert m.advantages_L.tolist() == [0.5, 0.25, -1.0, 2.0] and m.sequence_ids_L.tolist() == [0, 0, 0, 1]
    assert m.rows[1].completion.routes[:, 0, 0].tolist() == [-1, 5]
    assert first.continuations[0].completion.token_ids == [3]  # nothing writes to what was sampled
    group.group.prompt = replace(group.group.prompt, token_ids=(9, 8, 6))
    (batch,) = pack([group], [[1.0, 2.0]], rules())
    assert batch.micro_batches[0].token_ids_N.tolist() == [9, 8, 6, 1, 2, 7, 3, 6, 4]
    assert batch.micro_batches[0].columns_L.tolist() == [3, 4, 6, 8]
    group.group.prompt = replace(group.group.prompt, token_ids=(9, 6, 5, 4))
    (batch,) = pack([group], [[1.0, 2.0]], rules())
    assert sorted(b.prompt_length for m in batch.micro_batches for b in m.blocks) == [3, 4, 4]
    group.group.prompt = replace(group.group.prompt, token_ids=(9, 8))
    (batch,) = pack([group], [[1.0, 2.0]], rules(budget=6))  # 2 + 4 tokens of the first, 2 + 1 of the other
    assert [m.blocks for m in batch.micro_batches] == [(Block(0, 2, (2, 2)),), (Block(0, 2, (1,)),)]


def test_rows_of_an_episode_branch_off_the_one_with_the_longest_prompt():
    """Rows [9 8 | 1 2], [9 8 3 4 | 5 1 1 1] and [9 8 3 4 5 6 | 7] of one episode, and [9 8 3 | 1] of another
    one, whose prompt begins alike. The second is a branch of the third: they share 3 4, not the sampled 5.
    """
    first, second = completion([1, 2]), completion([2])
    for prompt, sampled in (((9, 8, 3, 4), [5, 1, 1, 1]), ((9, 8, 3, 4, 5, 6), [7])):
        first.continuations.append(Continuation(prompt, completion(sampled)))
    second.continuations = [Continuation((9, 8, 3), completion([1]))]
    (batch,) = pack([scored([9, 8], first, second)], [[1.0, 2.0]], rules())
    (m,) = batch.micro_batches
    branches = ((2, 0), (2, 2), (2, 0), (4, 0), (4, 0))
    assert m.blocks == (Block(0, 2, (2, 4, 5, 1, 2), branches),)
    assert m.token_ids_N.tolist() == [9, 8, 1, 2, 5, 1, 1, 1, 3, 4, 5, 6, 7, 2, 3, 1]
    assert m.positions_N.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 2, 3, 4, 5, 6, 2, 2, 3]
    assert m.columns_L.tolist() == [2, 3, 4, 5, 6, 7, 12, 13, 15]
    assert m.predecessors_L.tolist() == [1, 2, 9, 4, 5, 6, 11, 1, 14]
    assert [(ids.tolist(), given, start) for ids, given, start in m.sequences()] == [
        ([9, 8, 1, 2], 2, 2),
        ([9, 8, 3, 4, 5, 1, 1, 1], 4, 4),
        ([9, 8, 3, 4, 5, 6, 7], 2, 8),
        ([9, 8, 2], 2, 13),
        ([9, 8, 3, 1], 2, 14),
    ]
    assert m.layout.longest == 8
    (batch,) = pack([scored([9, 8], first, second)], [[1.0, 2.0]], rules(budget=16))  # 18 without branches
    assert [len(m.token_ids_N) for m in batch.micro_batches] == [16]


def test_a_row_knows_its_group_and_its_index_in_it():
    groups = [
        scored([9], completion([1]), completion([], "abort"), completion([2])),
        scored([8], completion([3])),
    ]
    (batch,) = pack(groups, [[1.0, 0.0, 1.0], [1.0]], rules())
    found = {(r.group_index, r.index) for m in batch.micro_batches for r in m.rows}
    assert found == {(0, 0), (0, 2), (1, 0)}


def test_an_idle_micro_batch_has_one_token_of_weight_0():
    m = idle_micro_batch()
    assert (m.columns_L.tolist(), m.predecessors_L.tolist()) == ([1], [0])
    assert m.weights_L.tolist() == m.advantages_L.tolist() == [0.0]
