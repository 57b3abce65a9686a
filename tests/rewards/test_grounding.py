"""Intersection over union of boxes and masks, against areas counted by hand."""

import json

import pytest

from rewards.grounding import box_iou, mask_iou
from rl.types import Reason


def box(text, gold, **options):
    (reward,) = box_iou([text], [gold], **options)
    return reward.score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("[0, 0, 10, 10]", 1.0),
        ("the box is [5, 0, 15, 10].", 50 / 150),  # half of each is shared: 50 of 100 + 100 - 50
        ("[10, 0, 20, 10]", 0.0),  # they touch
        ("[20, 20, 30, 30]", 0.0),  # apart in both directions
        ("[0, 0, 5, 5]", 25 / 100),
        ("<think>[0, 0, 10, 10]</think><answer>(0, 0, 10.0, 5)</answer>", 0.5),
        ("[0, 0, 10, 10] or rather [0, 0, 10, 5]", 0.5),  # the last one counts
        ("[10, 10, 0, 0]", 0.0),
        ("[0, 0, 10]", 0.0),
        ("<think>[0, 0, 10, 10]", 0.0),
        ("no box", 0.0),
    ],
)
def test_box_iou(text, score):
    assert box(text, [0, 0, 10, 10]) == pytest.approx(score)


def test_boxes_by_corner_and_size():
    assert box("[5, 5, 10, 10]", [5, 5, 10, 10], form="xywh") == 1.0
    assert box("[0, 0, 4, 4]", [2, 2, 4, 4], form="xywh") == pytest.approx(4 / 28)  # 2 x 2 of 16 + 16 - 4


@pytest.mark.parametrize("gold", [[0, 0, 0, 10], [1, 2, 3], "abc", None])
def test_a_box_in_the_dataset_without_area_is_a_bad_gold(gold):
    (reward,) = box_iou(["[0, 0, 1, 1]"], [gold])
    assert (reward.score, reward.reason) == (None, Reason.BAD_GOLD)


# 3 rows, 4 columns; column by column: 3 zeros, then columns 1 and 2 set, then 3 zeros
GOLD = {"size": [3, 4], "counts": [3, 6, 3]}


def mask(answer, gold=GOLD):
    (reward,) = mask_iou([answer if isinstance(answer, str) else json.dumps(answer)], [gold])
    return reward.score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (GOLD, 1.0),
        ({"size": [3, 4], "counts": [3, 3, 6]}, 0.5),  # column 1 only: 3 of 6
        ({"size": [3, 4], "counts": [0, 12]}, 0.5),  # all 12: 6 of 12
        ({"size": [3, 4], "counts": [12]}, 0.0),
        ([[1, 0], [3, 0], [3, 3], [1, 3]], 1.0),  # the same columns as a polygon
        (
            [[1, 0], [3, 0], [3, 1.4], [1, 1.4]],
            1 / 3,
        ),  # row 0 only (centre 0.5; that of row 1 is 1.5): 2 of 6
        ([[-9, -9], [99, -9], [99, 99], [-9, 99]], 0.5),  # clipped to the image
        # centres with c + r + 1 < 3.9: 3 + 2 + 1 cells of columns 0, 1, 2; 3 are shared, 6 + 6 - 3 in all
        ([[0, 0], [3.9, 0], [0, 3.9]], 3 / 9),
        ("```json\n[[1, 0], [3, 0], [3, 3], [1, 3]]\n```", 1.0),
        ("<answer>[[1, 0], [3, 0], [3, 3], [1, 3]]</answer>", 1.0),
        ({"size": [4, 3], "counts": [3, 6, 3]}, 0.0),
        ({"size": [3, 4], "counts": [3, 6]}, 0.0),
        ({"size": [3, 4], "counts": [3, -6, 15]}, 0.0),
        ([[0, 0], [1, 1]], 0.0),
        ([[0, 0], [1, 1], [1e99, 0]], 0.0),
        ([[0, 0], [1, 1], ["x", 0]], 0.0),
        ("[[[[", 0.0),
        ("the mask", 0.0),
    ],
)
def test_mask_iou(answer, score):
    assert mask(answer) == pytest.approx(score)


@pytest.mark.parametrize(
    "gold", [{"size": [3, 4], "counts": [12]}, {"size": [3, 4], "counts": [1]}, None, [[0, 0]]]
)
def test_a_mask_in_the_dataset_that_is_empty_or_broken_is_a_bad_gold(gold):
    (reward,) = mask_iou([json.dumps(GOLD)], [gold])
    assert (reward.score, reward.reason) == (None, Reason.BAD_GOLD)


@pytest.mark.timeout(60)
def test_hostile_answers_are_bounded():
    for answer in (
        "[" * 100_000,
        "[1," * 50_000,
        json.dumps([[i % 7, i] for i in range(100_000)]),
        "{" * 100_000,
    ):
        assert mask(answer) == 0.0
        assert box(answer, [0, 0, 1, 1]) == 0.0
