"""Rows become prompts whose ids are rendered once; bad rows get a sentence."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from rollout.chat import end_token_ids, render_prompts


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def render(tokenizer, rows, **options):
    settings = {"prefix": "train", "prompt_column": "prompt", "max_prompt_length": 16} | options
    return render_prompts(rows, tokenizer, **settings)


def test_text_and_messages_render_to_the_same_ids(tokenizer):
    text, chat = render(
        tokenizer,
        [
            {"prompt": "w1 w2", "answer": "3", "tests": {"a": 1}},
            {"prompt": [{"role": "user", "content": "w1 w2"}], "answer": "3", "tests": {"a": 1}},
        ],
    )
    assert text.text == chat.text == "<user> w1 w2 <eos> <assistant> "
    assert text.token_ids == chat.token_ids
    assert tokenizer.convert_ids_to_tokens(list(text.token_ids)) == [
        "<user>",
        "w1",
        "w2",
        "<eos>",
        "<assistant>",
    ]
    assert text.columns == {"answer": "3", "tests": {"a": 1}}
    assert (text.id, chat.id) == ("train/000000", "train/000001")


def test_system_prompt_template_and_plain_text(tokenizer):
    (prompt,) = render(tokenizer, [{"prompt": "w1"}], system_prompt="w9", template="w0 {prompt}")
    assert prompt.text == "<system> w9 <eos> <user> w0 w1 <eos> <assistant> "
    (plain,) = render(tokenizer, [{"prompt": "w1"}], chat=False, template="w0 {prompt}")
    assert plain.text == "w0 w1" and plain.messages == ()


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "has no rows"),
        ([{"question": "w1"}], {}, "no column 'prompt'; it has 'question'"),
        ([{"prompt": "w1", "solution": 1}], {"columns": ["soluton"]}, "did you mean 'solution'?"),
        ([{"prompt": "w1 " * 40}], {}, "raise data.max_prompt_length to"),
        ([{"prompt": 7}], {}, "must be text or a non-empty list of messages"),
        ([{"prompt": ""}], {"chat": False}, "is empty"),
        ([{"prompt": "w1"}, {"prompt": " "}], {}, "train row 1: the prompt is empty; remove the row"),
        (
            [{"prompt": "w1"}, {"answer": "2"}],
            {},
            "train row 1: data.prompt_column: the dataset has no column",
        ),
        ([{"prompt": [{"role": "user"}]}], {}, "messages with role and content, not list [{'role': 'user'}]"),
        ([{"prompt": "w1", "seen": {1, 2}}], {}, "column 'seen' holds set {1, 2}"),
        (
            [{"prompt": "w1", "x": float("nan")}],
            {},
            "name only the columns that graders need in data.columns",
        ),
    ],
)
def test_bad_rows_are_refused_with_cause_and_remedy(tokenizer, rows, options, message):
    with pytest.raises(ValueError) as caught:
        render(tokenizer, rows, **options)
    assert message in str(caught.value)


def test_a_missing_chat_template_is_an_error_only_for_chats(tiny_model_dir):
    bare = AutoTokenizer.from_pretrained(tiny_model_dir)
    bare.chat_template = None
    with pytest.raises(ValueError, match=r"data\.chat=false for plain text"):
        render(bare, [{"prompt": "w1"}])
    assert render(bare, [{"prompt": "w1"}], chat=False)[0].text == "w1"


def test_end_ids_are_collected_from_tokenizer_model_and_config(tokenizer):
    class Generation:
        eos_token_id = (7, 1)

    assert end_token_ids(tokenizer, (9,), Generation()) == (1, 7, 9)
    assert end_token_ids(tokenizer) == (tokenizer.eos_token_id,)


def test_a_template_that_refuses_a_chat_says_so_with_the_row(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match=r"train row 0: the chat template refuses .*\(no system role\)"):
        render(tokenizer, [{"prompt": "w1"}])


def test_only_the_named_columns_need_to_be_json(tokenizer):
    (prompt,) = render(tokenizer, [{"prompt": "w1", "seen": {1}, "answer": "2"}], columns=["answer"])
    assert prompt.columns == {"answer": "2"}
