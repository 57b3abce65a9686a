"""Work by predicted cost: by hand on small numbers, and an exchange among processes that are lists."""

from __future__ import annotations

import json

import pytest
import torch

from rl.batch import PackRules, pack
from rl.store.ledger import Ledger
from rl.together import CONTEXT_COST, divide, exchange, predicted_cost, shared_out
from rl.types import Completion, Continuation, Group, Prompt, Reward, ScoredGroup, VersionSpan


@pytest.fixture(autouse=True)
def undetermined():
    """Recipes that ran before leave deterministic kernels on, with which nothing moves."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(before)


def group_of(name: str, prompt: int, *lengths: int) -> ScoredGroup:
    made = [
        Completion(list(range(5, 5 + n)), [-0.1] * n, [True] * n, "stop", [VersionSpan(0, n)])
        for n in lengths
    ]
    return ScoredGroup(Group(Prompt(name, "", (1,) * prompt), made), [Reward(0.5)] * len(made))


def rules(**options: object) -> PackRules:
    return PackRules(100, lambda *numbers: 1.0, **options)  # type: ignore[arg-type]


def test_a_groups_cost_is_its_tokens_and_their_attention():
    group = group_of("a", 10, 4, 6, 20)
    attention = 4 * (10 + 2) + 6 * (10 + 3)
    assert predicted_cost(group, [1.0, -1.0, 0.0], rules()) == pytest.approx(20 + CONTEXT_COST * attention)
    # Where each row has a copy of its prompt, and rows without signal are computed too.
    all_rows = 60 + CONTEXT_COST * (attention + 20 * (10 + 10))
    copied = rules(share_prompts=False, skip_without_signal=False)
    assert predicted_cost(group, [1.0, -1.0, 0.0], copied) == pytest.approx(all_rows)
    assert predicted_cost(group, [0.0, 0.0, 0.0], rules()) == 0
    assert predicted_cost(group, [[0.0] * 4, [0.0] * 5 + [1.0], 0.0], rules()) < 10 + 6 * 1.1
    # Further rows of 2 tokens after prompts of 25 and 20: they share 10 of them with the group, or none.
    further = Completion([5, 6], [-0.1] * 2, [True] * 2, "stop", [VersionSpan(0, 2)])
    group.completions[0].continuations = [Continuation((1,) * n, further) for n in (25, 20)]
    for given, tokens in ((rules(), 14 + 10 + 15 + 10), (rules(share_prompts=False), 14 + 20 + 25 + 20)):
        expected = tokens + CONTEXT_COST * (attention + 2 * (25 + 1) + 2 * (20 + 1))
        assert predicted_cost(group, [1.0, -1.0, 0.0], given) == pytest.approx(expected)
    group.completions[0].finish_reason = "abort"
    assert predicted_cost(group, [1.0, 0.0, 0.0], rules()) == 0


def test_groups_move_from_the_fullest_to_the_emptiest_while_that_helps():
    assert shared_out([[5.0, 5.0], [5.0, 5.0]]) == [[0, 0], [1, 1]]
    # 20 and 10: moving the 5 makes 15 and 15.
    assert shared_out([[9.0, 5.0, 6.0], [4.0, 6.0]]) == [[0, 1, 0], [1, 1]]
    # 30, 3 and 3: nothing halves 27 better than 14; then 16, 17 and 3: 7 of them, and no more.
    owners = shared_out([[16.0, 14.0], [3.0], [1.0, 2.0]])
    assert owners == [[0, 1], [2], [2, 2]]
    assert shared_out([[100.0], [1.0]]) == [[0], [1]]  # a single group stays where it is
    assert shared_out([[0.0, 0.0], [0.0, 0.0]]) == [[0, 0], [1, 1]]


class Member:
    """One of several processes whose gathers are known beforehand, in order."""

    def __init__(self, rank: int, size: int, gathered: list[list[object]]) -> None:
        self.rank, self.size, self.gathered = rank, size, gathered
        self.said: list[object] = []

    def gather(self, mine: object) -> list[object]:
        self.said.append(json.loads(json.dumps(mine)))
        return self.gathered.pop(0) if self.gathered else [None] * self.size


def test_what_travels_arrives_as_it_was_and_in_its_minibatch(tmp_path):
    hands = [
        [group_of("a", 3, 4, 5), group_of("b", 2, 9, 9)],
        [group_of("c", 1, 1), group_of("d\ud800", 6, 2)],
    ]
    weights = [[[1.0, [0.5] * 5], [1.0, 2.0]], [[3.0], [4.0]]]
    owners = [[1, 0], [1, 0]]
    said = []
    for rank in (0, 1):
        member = Member(rank, 2, [])
        with pytest.raises(TypeError):  # nobody answers yet: what it sends is what counts
            exchange(hands[rank], weights[rank], owners=owners[rank], num_minibatches=2, team=member)  # type: ignore[arg-type]
        said.append(member.said[0])
    first, second = (
        exchange(hands[r], weights[r], owners=owners[r], num_minibatches=2, team=Member(r, 2, [[*said]]))  # type: ignore[arg-type]
        for r in (0, 1)
    )
    assert first == ([hands[0][1], hands[1][1]], [[1.0, 2.0], [4.0]], [1, 1])
    assert second == ([hands[0][0], hands[1][0]], [[1.0, [0.5] * 5], [3.0]], [0, 0])
    batches = pack(first[0], first[1], rules(num_minibatches=2), minibatch_of=first[2])
    assert [len(batch.micro_batches) for batch in batches] == [0, 1]
    assert [row.prompt.id for row in batches[1].micro_batches[0].rows].count("b") == 2
    ledger = Ledger(tmp_path, 0, 2)
    given = {"cursor_before": 0, "cursor_after": 2, "policy_version": 0, "advantages": weights[0]}
    path = ledger.write(0, hands[0], trained_by=owners[0], **given)
    import gzip

    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    assert [line.get("trained_by") for line in lines] == [None, 1, 0]
    record = ledger.read(0)
    assert record is not None and record.groups == hands[0]


def test_each_minibatch_is_shared_out_by_itself_and_alone_nothing_moves():
    everybody = [[9.0, 1.0, 1.0, 1.0], [1.0, 2.0, 1.0, 1.0]]
    member = Member(0, 2, [everybody])
    assert divide(everybody[0], 2, member) == [0, 1, 0, 0]  # type: ignore[arg-type]
    assert divide([1.0, 2.0], 1, Member(0, 1, [])) == [0, 0]  # type: ignore[arg-type]
