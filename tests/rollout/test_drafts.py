"""Drafts of speculation replayed on recorded completions (`tests.bench.drafts`)."""

from __future__ import annotations

import numpy as np
import pytest

from tests.bench.drafts import MAX_DRAFT, accepted, seconds

PROMPT = [1, 2, 3]


def test_own_drafts_continue_the_longest_match_of_the_last_two_tokens() -> None:
    """The text is 1 2 3 | 4 5 1 2 3 4 5 9. Before the second 3 the draft is 3 4 5 1, of which 3 are right."""
    found = accepted(PROMPT, [[4, 5, 1, 2, 3, 4, 5, 9]], 0, [])
    assert found["own"].tolist() == [0, 0, 0, 0, 3, 2, 1, 0]
    assert found["all"].tolist() == found["own"].tolist()
    assert found["siblings"].tolist() == found["earlier"].tolist() == [0] * 8


def test_of_siblings_only_what_was_sampled_by_then_is_known_and_of_earlier_epochs_all() -> None:
    """The other completion begins 4 5 6 7, as this one does after 0 0; then it stops at 7."""
    mine, other = [0, 0, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7]
    siblings = accepted(PROMPT, [mine, other], 0, [])["siblings"]
    # After 2 3, at token 4 of this completion, the other has given its 4 tokens.
    assert siblings.tolist() == [0, 0, 0, 0, 4, 3, 2, 1]
    shorter = accepted(PROMPT, [mine[2:], other], 0, [])["siblings"]
    # After 2 3 it has given two; a token later three.
    assert shorter.tolist() == [0, 0, 2, 2, 2, 1]
    assert accepted(PROMPT, [other], 0, [other])["earlier"].tolist() == [4, 3, 2, 1]


def test_of_equally_long_matches_the_more_frequent_token_is_drafted() -> None:
    earlier = [[4, 7], [4, 8], [4, 8]]
    assert accepted(PROMPT, [[4, 8]], 0, earlier)["earlier"].tolist() == [2, 1]
    assert accepted(PROMPT, [[4, 7]], 0, earlier)["earlier"].tolist() == [1, 0]


def test_replayed_drafts_are_accepted_as_often_as_rejection_sampling_accepts_them() -> None:
    """Rejection sampling accepts the draft token x with probability p(x), else draws from p without x. Tokens
    of a fixed p = (0.6, 0.3, 0.1) and drafts 0 0 0 ... give 1 + 0.6 + 0.36 tokens a step for k = 2.
    """
    draw, p = np.random.default_rng(0), np.array([0.6, 0.3, 0.1])
    right = draw.choice(3, size=40_000, p=p) == 0
    taken = np.where(right[:-1], np.where(right[1:], 2, 1), 0)  # of the two drafts from each position
    steps = seconds([taken], 2, 1, "roofline", 0.0) / 2.4e-3
    sampled, num_sampled = 0, 0
    for _ in range(20_000):
        for _ in range(2):
            sampled += 1
            if draw.random() >= p[0]:
                break
        else:
            sampled += 1
        num_sampled += 1
    assert len(taken) / steps == pytest.approx(1.96, abs=0.02)
    assert sampled / num_sampled == pytest.approx(1.96, abs=0.02)


def test_a_burst_takes_the_steps_that_drafts_leave() -> None:
    """8 tokens, and drafts of 2 of which both are right: steps of 3, 3 and 2 tokens, 2.4 ms each."""
    burst = [np.array([2] * 8)]
    assert seconds(burst, 0, 0, "roofline", 0.0) == pytest.approx(8 * 2.4e-3)
    assert seconds(burst, 2, 1, "roofline", 0.5) == pytest.approx(3 * 2.9e-3)
    assert seconds(burst * 2, 2, 1, "measured", 0.5) == pytest.approx(8 * 2.4e-3)  # two run: no drafts
    assert MAX_DRAFT == 8
