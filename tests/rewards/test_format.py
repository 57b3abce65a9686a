"""Format rewards: exact on honest completions, 0 for every way round them that is known."""

import pytest
from trl.rewards import think_format_reward

from rewards.format import boxed_format, code_format, is_blank, tag_count, think_answer_format, think_format
from rl.types import Reason


def score(fn, text, **options):
    (reward,) = fn([text], **options)
    assert (reward.reason is Reason.FORMAT) == (reward.score == 0.0)
    return reward.score


THINK_GOOD = [
    "<think>a</think>b",
    "<think>\nlong\nthought\n</think>\n\nThe answer is 3.",
    " <think>1 < 2</think>3",
]
THINK_BAD = {
    "empty block": "<think></think>b",
    "blank block": "<think> \n\t</think>b",
    "zero-width block": "<think>\u200b\ufeff</think>b",
    "hangul filler block": "<think>\u3164</think>b",
    "nothing after": "<think>a</think>",
    "blank after": "<think>a</think> \n",
    "zero-width after": "<think>a</think>\u200b",
    "unclosed": "<think>a",
    "never opened": "a</think>b",
    "closed before opened": "</think><think>a",
    "text before": "hello <think>a</think>b",
    "nested": "<think><think>a</think></think>b",
    "two blocks": "<think>a</think>b<think>c</think>d",
    "second opening": "<think>a<think>b</think>c",
    "second closing": "<think>a</think>b</think>c",
    "wrong case": "<THINK>a</THINK>b",
    "blank in tag": "<think >a</think >b",
    "zero-width in tag": "<think>a</think\u200b>b",
    "full-width": "\uff1cthink\uff1ea\uff1c/think\uff1eb",
    "lookalike beside": "<think>a</think>b<Think>c</Think>",
    "full-width beside": "<think>a\uff1c/think\uff1e</think>b",
    "self-closed": "<think/>a</think>b",
    "empty": "",
}


@pytest.mark.parametrize("text", THINK_GOOD)
def test_one_closed_block_with_an_answer_after_it_is_well_formed(text):
    assert score(think_format, text) == 1.0
    assert think_format([[{"role": "assistant", "content": text}]])[0].score == 1.0


@pytest.mark.parametrize("how", THINK_BAD)
def test_a_broken_think_block_scores_nothing(how):
    assert score(think_format, THINK_BAD[how]) == 0.0


def test_it_is_stricter_than_trl_and_never_laxer():
    ours = [score(think_format, text) for text in THINK_BAD.values()]
    theirs = think_format_reward([[{"content": text}] for text in THINK_BAD.values()])
    assert sum(theirs) >= 5  # empty, blank, nothing after, second closing, ...
    assert sum(ours) == 0


def test_a_template_that_opens_the_block_in_the_prompt_is_an_option():
    assert score(think_format, "a</think>b") == 0.0
    assert score(think_format, "a</think>b", open_in_prompt=True) == 1.0
    assert score(think_format, "<think>a</think>b", open_in_prompt=True) == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nx\n</think>\n<answer>\ny\n</answer>", 1.0),
        ("<think>x</think> <answer>y</answer>\n", 1.0),
        ("<think>\nx\n<answer>y</answer></think>\n<answer>\nz\n</answer>", 0.0),
        ("<think>\nx\n</think>\n<answer>\ny\n</answer><answer>\nz\n</answer>", 0.0),
        ("<think>x<answer>y</answer></think>", 0.0),
        ("<think>x</think><answer>y</answer> and more", 0.0),
        ("<think>x</think> so <answer>y</answer>", 0.0),
        ("<think>x</think><answer> </answer>", 0.0),
        ("<think>x</think><answer>y</answer><ANSWER>", 0.0),
        ("<think>x</think><answer>y", 0.0),
        ("<answer>y</answer><think>x</think>", 0.0),
        ("<think>x</think></answer>y<answer>", 0.0),
    ],
)
def test_think_answer_form_of_r1(text, expected):
    assert score(think_answer_format, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\na\n</think>\n<answer>\nb\n</answer>", 1.0),
        ("<think>\na\n</think>\n<answer>\nb", 0.75),
        ("<think>\na\n</think>\n", 0.5),
        ("<think>\n<think>\n", 0.0),
        ("", 0.0),
    ],
)
def test_tag_count_gives_a_quarter_for_each_tag_that_occurs_once(text, expected):
    assert tag_count([text])[0].score == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{3}", 1.0),
        (r"\boxed{\frac{1}{2}}.", 1.0),
        (r"\boxed{\{1, 2\}}", 1.0),
        (r"\boxed{ \text{yes} }", 1.0),
        (r"<think>\boxed{3}</think> \boxed{4}", 1.0),
        ("3", 0.0),
        (r"\boxed{}", 0.0),
        (r"\boxed{ \, }", 0.0),
        (r"\boxed{\text{ }}", 0.0),
        (r"\boxed{{}}", 0.0),
        (r"\boxed{\frac{1}{2}", 0.0),
        (r"\boxed{3} then \boxed{4", 0.0),
        (r"\boxed{3\}", 0.0),
        (r"<think>\boxed{3}</think> 3", 0.0),
        (r"<think>\boxed{3}", 0.0),
        (r"boxed{3}", 0.0),
        (r"\boxed {5} or \fbox{5}", 1.0),
        (r"\boxed 5", 1.0),
        (r"\boxed{\pi}", 1.0),
        (r"\boxed{?}", 1.0),
        *((rf"\boxed{{{hidden}}}", 0.0) for hidden in (r"\phantom{5}", r"\vphantom{5}", r"\hspace{1cm}")),
        *((rf"\boxed{{{hidden}}}", 0.0) for hidden in (r"\mathbf{ }", r"\displaystyle", "\u3164", "~")),
        (r"% \boxed{5}", 0.0),
    ],
)
def test_boxed_form_needs_balanced_braces_around_something_visible(text, expected):
    assert score(boxed_format, text) == expected


def test_boxed_form_extracts_the_last_box():
    assert boxed_format([r"\boxed{3} no, \boxed{\frac{1}{2}}"])[0].extracted == r"\frac{1}{2}"


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("Here:\n```python\nprint(1)\n```\n", {}, 1.0),
        ("```Python\nx\n```", {}, 1.0),
        ("```\nx\n```", {}, 0.0),
        ("```\nx\n```", {"language": ""}, 1.0),
        ("```cpp\nx\n```", {"language": "cpp"}, 1.0),
        ("```python\n\n```", {}, 0.0),
        ("```python\nx\n", {}, 0.0),
        ("<think>```python\nx\n```</think>\nnone", {}, 0.0),
        ("x = 1", {}, 0.0),
        ("~~~python\nx\n~~~", {}, 1.0),
        ("1. So:\n\n    ```py\n    x\n    ```", {}, 1.0),
        ("```python3.12\nx\n```", {}, 1.0),
        ("````python\nx\n```\ny\n````", {}, 1.0),
        ("```js\nx\n```", {"language": "javascript"}, 1.0),
        ("```python3\nx\n```", {"language": "python3"}, 1.0),
        ("```c99\nx\n```", {"language": "c99"}, 1.0),
        ("```c99\nx\n```", {"language": "cpp"}, 0.0),
        ("```python\nx\n```\n```", {}, 0.0),
        ("x\n```", {"language": ""}, 0.0),
    ],
)
def test_code_form_needs_a_closed_fence_of_the_language(text, options, expected):
    assert score(code_format, text, **options) == expected


def test_blank_is_what_nobody_can_see():
    assert is_blank(" \n\u00ad\u200b\u2060\ufe0f\U000e0041")
    assert not is_blank("\u200b.")


@pytest.mark.timeout(60)  # linear: milliseconds; quadratic: minutes
@pytest.mark.parametrize("fn", [think_format, think_answer_format, tag_count, boxed_format, code_format])
@pytest.mark.parametrize(
    "unit", ["<", "< ", "<think>", "</think>", "{", "\\boxed{", "```\n", "\\", "\u200b<", "＜"]
)
def test_many_hostile_characters_are_graded(fn, unit):
    (reward,) = fn(["<think>a</think>" + unit * (200_000 // len(unit))])
    assert reward.score is not None
