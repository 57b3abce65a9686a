"""Rows become prompts whose ids are rendered once; bad rows get a sentence."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from rl.model.messages import messages_of
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
        ([{"prompt": [{"role": "user"}]}], {}, "message 0 (user) has no content; give it a text"),
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


def test_parts_of_text_are_joined(tokenizer):
    parts = [{"type": "text", "text": "w1"}, {"type": "text", "text": "w2", "image": None}, "w3"]
    (prompt,) = render(tokenizer, [{"prompt": [{"role": "user", "content": parts}]}])
    assert prompt.text == "<user> w1\nw2\nw3 <eos> <assistant> "
    assert prompt.messages == ({"role": "user", "content": "w1\nw2\nw3"},)
    # a model trained on such rows without rewards has read the same text
    assert messages_of([{"role": "user", "content": parts}], "row 0") == list(prompt.messages)


def test_keys_that_a_table_fills_up_with_none_do_not_reach_the_template(tokenizer):
    """As parquet gives them: `'tool_calls' in message` holds in the template of Llama 3.1."""
    calls = [
        {"type": "function", "function": {"name": "w4", "arguments": {"x": 1, "y": None}}},
        {"type": "function", "function": {"name": "w5", "arguments": {"x": None, "y": 2}}},
    ]
    chat = [
        {"role": "user", "content": "w1", "tool_calls": None, "name": None},
        {"role": "assistant", "content": None, "tool_calls": calls, "name": None},
        {"role": "tool", "content": "w2", "tool_calls": None, "name": "w4"},
    ]
    (prompt,) = render(tokenizer, [{"prompt": chat}], max_prompt_length=40)
    first, second = (
        {"type": "function", "function": {"name": n, "arguments": a}}
        for n, a in (("w4", {"x": 1}), ("w5", {"y": 2}))
    )
    assert prompt.messages == (
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "", "tool_calls": [first, second]},
        {"role": "tool", "content": "w2", "name": "w4"},
    )
    assert prompt.messages == tuple(messages_of(chat, "row 0"))  # and in the trainer without rewards


@pytest.mark.parametrize(
    ("part", "fault"),
    [
        ({"type": "image", "image": "x.png"}, "has a part of type 'image'"),
        ({"type": "image_url", "image_url": {"url": "x"}}, "has a part of type 'image_url'"),
        ({"type": "text", "text": None}, r"is list, not text or parts of text \({'type': 'text'"),
        (7, r"is list, not text or parts of text \(7\)"),
    ],
)
def test_a_part_that_is_not_text_is_refused_by_its_row(tokenizer, part, fault):
    fine = [{"role": "user", "content": "w1"}]
    rows = [{"prompt": fine}, {"prompt": [*fine, {"role": "user", "content": [part, {"text": "w2"}]}]}]
    with pytest.raises(ValueError, match=f"train row 1: message 1: the content {fault}"):
        render(tokenizer, rows)


def test_a_chat_that_ends_with_the_assistant_is_refused_or_continued(tokenizer):
    begun = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]
    rows = [{"prompt": begun}, {"prompt": begun[:1]}]
    with pytest.raises(ValueError, match=r"train row 0: .*gold answer.*data\.continue_final_message=true"):
        render(tokenizer, rows)
    texts = [p.text for p in render(tokenizer, rows, continue_final_message=True)]
    assert texts == ["<user> w1 <eos> <assistant> w2 w3", "<user> w1 <eos> <assistant> "]
    calls = [*begun[:1], {"role": "assistant", "content": None, "tool_calls": [{"name": "w4"}]}]
    with pytest.raises(ValueError, match="no text to go on with"):
        render(tokenizer, [{"prompt": calls}], continue_final_message=True)


def test_a_template_for_text_is_refused_for_messages(tokenizer):
    rows = [{"prompt": [{"role": "user", "content": "w1"}]}]
    with pytest.raises(ValueError, match=r"train row 0: data\.template wraps prompts that are text"):
        render(tokenizer, rows, template="w0 {prompt}")


def test_rows_that_are_too_long_are_named_all_at_once_or_dropped(tokenizer):
    rows = [{"prompt": "w1 " * (40 if i % 2 else 2)} for i in range(24)]
    with pytest.raises(ValueError) as caught:
        render(tokenizer, rows)
    said = (
        "12 of 24 rows of train have more than data.max_prompt_length=16 tokens: row 1 (43), 3 (43), 5 (43)"
    )
    assert str(caught.value).startswith(said)
    assert "19 (43) and 2 more; raise data.max_prompt_length to 43, or " in str(caught.value)
    notes = []
    kept = render(tokenizer, rows, too_long="drop", note=notes.append)
    assert [p.id for p in kept[:3]] == ["train/000000", "train/000002", "train/000004"] and len(kept) == 12
    assert len(notes) == 1 and notes[0].startswith("12 of 24 rows of train have")
    with pytest.raises(ValueError, match=r"1 of 1 rows .* raise data\.max_prompt_length to 43$"):
        render(tokenizer, rows[1:2], too_long="drop")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("$A", ["w1", "w2"]),
        ("<user> $A", ["<user>", "w1", "w2"]),
        ("$A <eos>", ["w1", "w2"]),
        ("<user> $A <eos>", ["<user>", "w1", "w2"]),
    ],
)
def test_plain_text_has_one_begin_token_and_no_end_token(tiny_model_dir, pattern, expected):
    """As the tokenizers of Llama (a begin token), T5 (an end token) and others (both) add them."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.bos_token = "<user>"  # any token of the tiny vocabulary
    special = [("<user>", 3), ("<eos>", 1)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=pattern, special_tokens=special)
    (prompt,) = render(tokenizer, [{"prompt": "w1 w2"}], chat=False)
    assert tokenizer.convert_ids_to_tokens(list(prompt.token_ids)) == expected
    (given,) = render(tokenizer, [{"prompt": "<user> w1 w2"}], chat=False)  # it has one already
    assert tokenizer.convert_ids_to_tokens(list(given.token_ids)) == ["<user>", "w1", "w2"]
    (ended,) = render(tokenizer, [{"prompt": "w1 w2 <eos>"}], chat=False)  # the row's own
    assert tokenizer.convert_ids_to_tokens(list(ended.token_ids)) == [*expected, "<eos>"]


def test_a_chat_template_that_writes_the_begin_token_gets_no_second(tiny_model_dir):
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.bos_token, tokenizer.chat_template = "<user>", "{{ bos_token }} {{ messages[0]['content'] }}"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<user> $A", special_tokens=[("<user>", 3)]
    )
    (prompt,) = render(tokenizer, [{"prompt": "w1"}])
    assert tokenizer.convert_ids_to_tokens(list(prompt.token_ids)) == ["<user>", "w1"]


@pytest.mark.parametrize("name", ["system_prompt", "chat_template_kwargs"])
def test_keys_of_a_chat_are_refused_for_plain_text(tokenizer, name):
    option = {name: "w9" if name == "system_prompt" else {"m": 1}}
    with pytest.raises(ValueError, match=f"train row 0: data.{name} does nothing"):
        render(tokenizer, [{"prompt": "w1"}], chat=False, **option)
    chat = [{"role": "user", "content": "w1"}]
    assert len(render(tokenizer, [{"prompt": chat}], chat=False, **option)) == 1


def test_a_role_that_is_misspelt_is_refused_as_in_fine_tuning(tokenizer):
    with pytest.raises(ValueError, match="train row 0: message 0 has the role 'usr'; did you mean 'user'"):
        render(tokenizer, [{"prompt": [{"role": "usr", "content": "w1"}]}])


def test_an_assistants_message_without_words_or_calls_is_refused(tokenizer):
    chat = [{"role": "user", "content": "w1"}, {"role": "assistant"}, {"role": "user", "content": "w2"}]
    with pytest.raises(ValueError, match="train row 0: message 1 of the assistant has no text and no tool"):
        render(tokenizer, [{"prompt": chat}])


def test_any_part_with_a_text_is_text(tokenizer):
    parts = [{"type": "input_text", "text": "w1"}, {"type": "text", "text": "w2"}]
    (prompt,) = render(tokenizer, [{"prompt": [{"role": "user", "content": parts}]}])
    assert prompt.messages == ({"role": "user", "content": "w1\nw2"},)
