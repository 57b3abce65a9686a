"""Grounding rewards: intersection over union between a box or mask in the answer and the dataset's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rewards.completion import completion_text
from rewards.gym import find_answer
from rl.types import Reason, Reward

NUMBER = r"\s*(-?\d{1,9}(?:\.\d{1,9})?)\s*"
FOUR_NUMBERS = re.compile(rf"[\[(]{NUMBER},{NUMBER},{NUMBER},{NUMBER}[\])]")
FENCE = re.compile(r"^```[a-z]*\n(.*?)\n?```$", re.DOTALL)
MAX_SIDE, MAX_POINTS = 8192, 500
Box = tuple[float, float, float, float]
Runs = list[tuple[int, int]]


def box_iou(
    completions: Sequence[Any], box: Sequence[Any], *, form: str = "xyxy", **columns: Any
) -> list[Reward]:
    """Intersection over union of the last four numbers in brackets in the answer and of the column `box`.

    Args:
        form: "xyxy" (two corners) or "xywh" (corner, width, height), of both boxes and in the same units. A
            box without area scores 0 in an answer and is a bad gold in the dataset.
    """
    if form not in ("xyxy", "xywh"):
        raise ValueError(f"box_iou: form={form!r} must be xyxy or xywh")
    return [_grade_box(completion_text(c), gold, form) for c, gold in zip(completions, box, strict=True)]


def _grade_box(text: str, gold: Any, form: str) -> Reward:
    try:
        target = _corners([float(value) for value in gold], form)
    except (TypeError, ValueError) as error:
        return Reward(None, Reason.BAD_GOLD, f"the dataset's box {gold!r:.60}: {error}")
    try:
        found = FOUR_NUMBERS.findall(find_answer(text))
        if not found:
            return Reward(0.0, Reason.NO_ANSWER, "no four numbers in brackets")
        guess = _corners([float(value) for value in found[-1]], form)
    except ValueError as error:
        return Reward(0.0, Reason.FORMAT, str(error))
    width = min(target[2], guess[2]) - max(target[0], guess[0])
    height = min(target[3], guess[3]) - max(target[1], guess[1])
    shared = max(width, 0.0) * max(height, 0.0)
    score = shared / (_area(target) + _area(guess) - shared)
    return Reward(score, Reason.SCORED, extracted=str(list(guess)))


def _corners(numbers: Sequence[float], form: str) -> Box:
    if len(numbers) != 4:
        raise ValueError("a box is four numbers")
    a, b, c, d = numbers
    box = (a, b, c, d) if form == "xyxy" else (a, b, a + c, b + d)
    if not (box[2] > box[0] and box[3] > box[1]):
        raise ValueError(f"a box without area: {list(numbers)} as {form}")
    return box


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def mask_iou(completions: Sequence[Any], mask: Sequence[Any], **columns: Any) -> list[Reward]:
    """Intersection over union, in 0..1, of the mask in the answer and the column `mask`.

    `mask`: uncompressed COCO run lengths {"size": [height, width], "counts": [...]}, column by column, zeros
    first. The answer is in <answer> tags, or is everything after the think block, with or without a code
    fence. It has the same form, or lists the corners of a polygon [[x, y], ...] in pixels. A pixel belongs to
    the polygon if its centre does (even-odd rule).
    """
    return [_grade_mask(completion_text(c), gold) for c, gold in zip(completions, mask, strict=True)]


def _grade_mask(text: str, gold: Any) -> Reward:
    try:
        size, target = _decoded(gold)
        if not target:
            raise ValueError("no pixel is set")
    except ValueError as error:
        return Reward(None, Reason.BAD_GOLD, f"the dataset's mask: {error}")
    try:
        answer = find_answer(text)
        given = json.loads(FENCE.sub(r"\1", answer))
        if isinstance(given, Mapping):
            its_size, guess = _decoded(given)
            if its_size != size:
                raise ValueError(f"size {list(its_size)}, the mask has {list(size)}")
        else:
            guess = _filled(given, *size)
    except (ValueError, RecursionError) as error:
        return Reward(0.0, Reason.FORMAT, str(error)[:200])
    shared = _overlap(target, guess)
    union = _num_pixels(target) + _num_pixels(guess) - shared
    return Reward(shared / union, Reason.SCORED, extracted=answer[:200])


def _decoded(mask: Any) -> tuple[tuple[int, int], Runs]:
    """((height, width), [(start, end), ...]): the runs of pixels that are set, numbered column by column."""
    if not isinstance(mask, Mapping) or not all(isinstance(mask.get(k), list) for k in ("size", "counts")):
        raise ValueError('a mask is {"size": [height, width], "counts": [run lengths]}')
    size, counts = mask["size"], mask["counts"]
    if len(size) != 2 or not all(type(n) is int and 0 <= n <= MAX_SIDE**2 for n in [*size, *counts]):
        raise ValueError("size and counts must be whole numbers")
    if max(size) > MAX_SIDE or sum(counts) != size[0] * size[1]:
        raise ValueError(f"counts add up to {sum(counts)}, not to {size[0]} x {size[1]}")
    runs, at = [], 0
    for index, count in enumerate(counts):
        if index % 2 and count:
            runs.append((at, at + count))
        at += count
    return (size[0], size[1]), runs


def _filled(points: Any, height: int, width: int) -> Runs:
    """The runs of a polygon's pixels, found by scan lines along columns."""
    if not isinstance(points, list) or not 3 <= len(points) <= MAX_POINTS:
        form = f"a list of 3 to {MAX_POINTS} points [x, y]"
        raise ValueError(f"a polygon is {form}, or a mask with size and counts")
    for point in points:
        if not isinstance(point, list) or len(point) != 2 or not all(type(n) in (int, float) for n in point):
            raise ValueError(f"a point of a polygon is [x, y], not {point!r:.40}")
        if not all(abs(n) <= MAX_SIDE for n in point):
            raise ValueError(f"the point {point!r:.40} lies outside +-{MAX_SIDE}")
    runs: Runs = []
    for x in range(width):
        crossings = sorted(_crossings(points, x + 0.5))
        for top, bottom in zip(crossings[::2], crossings[1::2], strict=True):
            start, end = max(_first_centre(top), 0), min(_first_centre(bottom), height)
            if end > start:
                runs.append((x * height + start, x * height + end))
    return runs


def _first_centre(y: float) -> int:
    """The first row whose centre (row + 0.5) lies at or below y."""
    return -int((0.5 - y) // 1)


def _crossings(points: Sequence[Sequence[float]], x: float) -> Iterable[float]:
    for (x1, y1), (x2, y2) in zip(points, [*points[1:], points[0]], strict=True):
        if (x1 <= x) != (x2 <= x):
            yield y1 + (x - x1) * (y2 - y1) / (x2 - x1)


def _num_pixels(runs: Runs) -> int:
    return sum(end - start for start, end in runs)


def _overlap(a: Runs, b: Runs) -> int:
    i = j = shared = 0
    while i < len(a) and j < len(b):
        shared += max(0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] <= b[j][1]:
            i += 1
        else:
            j += 1
    return shared
