"""Rows in TRL's formats become prompts and answers, each tokenised once, and end as their policy says."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rl.config.diffusion import EosConfig, TextConfig
from rl.diffusion.text import Encoded, encode_rows, padded_examples, padded_length, padding_ids
from tests.diffusion.conftest import MASK

NUM_ROWS = 93
USER = {"role": "user", "content": "w1"}


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def encode(rows, tokenizer, **settings):
    return encode_rows(rows, TextConfig(source="rows.jsonl", **settings), tokenizer)[0]


def words(tokenizer, ids) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens([int(i) for i in ids]))


def test_trl_formats_give_the_same_example(tokenizer):
    chat = [{"role": "user", "content": "What is w1 ?"}], [{"role": "assistant", "content": "w7 w8"}]
    formats = [
        [{"prompt": "What is w1 ?", "completion": "w7 w8"}],
        [{"prompt": chat[0], "completion": chat[1]}],
        [{"messages": [*chat[0], *chat[1]]}],
    ]
    for rows in formats:
        (found,) = encode(rows, tokenizer)
        assert words(tokenizer, found.prompt) == "<user> What is w1 ? <eos> <assistant>"
        assert words(tokenizer, found.answer) == "w7 w8 <eos>"
    (plain,) = encode(formats[0], tokenizer, chat=False)
    assert words(tokenizer, plain.prompt) == "What is w1 ?"
    assert words(tokenizer, plain.answer) == "w7 w8 <eos>"
    (named,) = encode(
        [{"question": "w1", "answer": "w2"}], tokenizer, prompt_column="question", completion_column="answer"
    )
    assert words(tokenizer, named.answer) == "w2 <eos>"


def test_every_assistant_turn_is_an_example_that_sees_nothing_after_it(tokenizer):
    turns = ["w1", "w2", "w3", "w4"]
    messages = [
        {"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(turns)
    ]
    first, second = encode([{"messages": messages}], tokenizer, system_prompt=None)
    assert words(tokenizer, first.prompt) == "<user> w1 <eos> <assistant>"
    assert words(tokenizer, first.answer) == "w2 <eos>"
    assert (
        words(tokenizer, second.prompt) == "<user> w1 <eos> <assistant> w2 <eos> <user> w3 <eos> <assistant>"
    )
    assert words(tokenizer, second.answer) == "w4 <eos>"


def test_what_a_template_writes_behind_the_end_of_a_turn_is_no_answer(tokenizer):
    """LLaDA-8B-Base's template ends every chat with a header for the next answer."""
    always = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <eos> {% endfor %}<assistant> "
    shipped, tokenizer.chat_template = tokenizer.chat_template, always
    try:
        (found,) = encode([{"prompt": "w1", "completion": "w2"}], tokenizer)
        assert words(tokenizer, found.prompt) == "<user> w1 <eos> <assistant>"
        assert words(tokenizer, found.answer) == "w2 <eos>"
        tokenizer.chat_template = "{{ messages[0]['content'] }} <eos> {{ messages | length }}"
        with pytest.raises(ValueError, match="row 0: the chat template changes what it is given"):
            encode([{"prompt": "w1", "completion": "w2"}], tokenizer)
        tokenizer.chat_template = None
        with pytest.raises(ValueError, match=r"no chat template.*data.chat=false"):
            encode([{"prompt": "w1", "completion": "w2"}], tokenizer)
    finally:
        tokenizer.chat_template = shipped


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\\n' + m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {  # template, end-of-turn token, what it does to an answer
    "chatml": (CHATML, "<|im_end|>", lambda text: text),
    "chatml that thinks": (
        CHATML.replace(
            "m['content']",
            "('<think>\\n\\n</think>\\n\\n' if loop.last and m.role == 'assistant' else '') + m['content']",
        ),
        "<|im_end|>",
        lambda text: "<think>\n\n</think>\n\n" + text,
    ),
    "llama 3": (
        "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|eot_id|>",
        str.strip,
    ),
    "header behind every answer": (
        "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }} <|end|>\n{% endfor %}[assistant] ",
        "<|end|>",
        lambda text: text.strip() + " ",
    ),
}
ANSWERS = [
    "d",
    "e",
    "m",
    "end",
    "|",
    "<",
    ">",
    "t",
    "think",
    "assistant",
    " padded\n",
    "def f():\n    end\n\nend",
]


def byte_tokenizer(template: str, end: str) -> PreTrainedTokenizerFast:
    """Bytes as tokens, so that nothing of an answer is lost, and the template's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    names = ["<|im_start|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, additional_special_tokens=names)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_whose_text_is_also_in_the_template_is_cut_at_its_own_end(name):
    template, end, shown = TEMPLATES[name]
    tokenizer = byte_tokenizer(template, end)
    for text in ANSWERS:
        (found,) = encode([{"prompt": text, "completion": text}], tokenizer)
        assert tokenizer.decode(found.answer) == shown(text) + end, text
        assert str(tokenizer.decode(found.prompt)).endswith(
            ("assistant\n", "<|end_header_id|>\n\n", "[assistant] ")
        )
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}] * 2
        assert [tokenizer.decode(e.answer) for e in encode([{"messages": turns}], tokenizer)][1:] == [
            shown(text) + end
        ]


def test_text_is_joined_and_cut(tokenizer):
    rows = [{"text": "w1 w2 w3"}, {"text": "w4"}, {"text": "w5 w6"}]
    pieces = encode(rows, tokenizer, max_length=4)
    assert [words(tokenizer, p.answer) for p in pieces] == ["w1 w2 w3 <eos>", "w4 <eos> w5 w6", "<eos>"]
    assert all(len(p.prompt) == 0 for p in pieces)


def test_the_first_token_of_a_shifted_model_is_never_masked(tokenizer):
    """Nothing is left of it that could predict it: without a prompt it is given, as a prompt would be."""
    rows = [{"text": "w1 w2 w3"}, {"text": "w4"}, {"text": "w5 w6"}]
    config = TextConfig(source="rows.jsonl", max_length=4)
    pieces, _ = encode_rows(rows, config, tokenizer, shift=True)
    assert [(words(tokenizer, p.prompt), words(tokenizer, p.answer)) for p in pieces] == [
        ("w1", "w2 w3 <eos>"),
        ("w4", "<eos> w5 w6"),  # the last piece is one token: nothing of it may be masked
    ]
    bare = TextConfig(source="rows.jsonl", chat=False)
    rows = [{"prompt": "", "completion": "w1 w2"}, {"prompt": "w1", "completion": "w2"}]
    first, second = encode_rows(rows, bare, tokenizer, shift=True)[0]
    assert (words(tokenizer, first.prompt), words(tokenizer, first.answer)) == ("w1", "w2 <eos>")
    assert (words(tokenizer, second.prompt), words(tokenizer, second.answer)) == ("w1", "w2 <eos>")


def padding(config: EosConfig, tokenizer) -> list[int]:
    return padding_ids(config, tokenizer, num_rows=NUM_ROWS, mask_token_id=MASK)


def ended(tokenizer, **settings) -> list[str]:
    batch = [
        Encoded(np.array([20, 21]), np.array([30, 1])),
        Encoded(np.array([22]), np.array([31, 32, 33, 34, 1])),
    ]
    config = EosConfig(**settings)
    examples = padded_examples(batch, config, padding(config, tokenizer))
    longest = max(map(len, batch))
    assert [len(e.token_ids_T) for e in examples] == [padded_length(len(b), config, longest) for b in batch]
    for encoded, example in zip(batch, examples, strict=True):
        prompt = len(encoded.prompt)
        assert example.maskable_T.tolist() == [False] * prompt + [True] * (len(example.token_ids_T) - prompt)
        assert example.token_ids_T[: len(encoded)].tolist() == [*encoded.prompt, *encoded.answer]
    return [words(tokenizer, e.token_ids_T[len(b) :]) for b, e in zip(batch, examples, strict=True)]


def test_end_policies_pad_with_tokens_of_the_answer(tokenizer):
    assert ended(tokenizer, policy="single") == ["", ""]
    assert ended(tokenizer, policy="batch_max") == ["<eos> <eos>", ""]
    assert ended(tokenizer, policy="multiple", multiple=4) == ["", "<eos> <eos>"]
    rainbow = {"policy": "rainbow", "rainbow_tokens": ["w78", 84]}
    assert ended(tokenizer, **rainbow) == ["w78 w79", ""]
    with pytest.raises(ValueError, match=r"eos.rainbow_tokens: <x> not in the vocabulary"):
        ended(tokenizer, policy="rainbow", rainbow_tokens=["<x>"])
    for outside in (NUM_ROWS, 99999, -1):
        with pytest.raises(
            ValueError, match=rf"{outside} is not among the model's 93 vocabulary rows; use ids from 0"
        ):
            ended(tokenizer, policy="rainbow", rainbow_tokens=["w78", outside])
    assert ended(tokenizer, policy="rainbow", rainbow_tokens=[NUM_ROWS - 1])[1] == ""
    with pytest.raises(ValueError, match=r"eos.rainbow_tokens has the mask token \(id 3\)"):
        ended(tokenizer, policy="rainbow", rainbow_tokens=["w78", MASK])
    with pytest.raises(ValueError, match=r"list them in eos.rainbow_tokens"):
        EosConfig(policy="rainbow")


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        (
            {"question": "w1"},
            {},
            r"has the columns 'question', but 'prompt' and 'completion' or 'messages' or",
        ),
        ({"prompt": "w1", "completion": ""}, {}, "row 0: the answer is empty"),
        ({"prompt": "w1", "completion": ""}, {"chat": False}, "row 0: the answer is empty"),
        ({"prompt": "w1", "completion": " \n"}, {}, "row 0: the answer is empty"),
        ({"prompt": "w1", "completion": " \n"}, {"chat": False}, "row 0: the answer is empty"),
        ({"prompt": "w1", "completion": None}, {}, "row 0: the answer is empty"),
        ({"prompt": "w1", "completion": None}, {"chat": False}, "row 0: the answer is empty"),
        ({"prompt": [USER], "completion": []}, {}, "row 0: the answer is empty"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, {}, "row 0: the answer is empty"),
        (
            {"messages": [USER, {"role": "assistant", "content": [{}]}]},
            {},
            "the answer's content is list, not",
        ),
        ({"messages": [{"role": "assistant", "content": "w1"}]}, {}, "row 0: the chat begins with an answer"),
        ({"prompt": "w1", "completion": 3}, {}, "'prompt' is str and 'completion' is int; make both text"),
        ({"prompt": [], "completion": "w1"}, {}, "'prompt' is list and 'completion' is str; make both text"),
        ({"messages": [USER]}, {}, "no message has the role 'assistant'"),
        (
            {"prompt": "w1", "completion": "w2 " * 30},
            {"max_length": 20},
            r"4 \+ 31 tokens, more than data.max",
        ),
        ({"prompt": "w1", "completion": "w2 " * 30}, {"max_length": 20, "too_long": "drop"}, "no example of"),
        ({"text": 3}, {}, "'text' is int, not text"),
    ],
)
def test_rows_that_cannot_be_used_get_a_sentence(tokenizer, row, settings, message):
    with pytest.raises(ValueError, match=message):
        encode([row], tokenizer, **settings)


@pytest.mark.parametrize("name", ["prompt", "completion", "text"])
def test_the_mask_token_in_a_text_is_found_with_its_row(tokenizer, name):
    row = {"text": "w1 w2"} if name == "text" else {"prompt": "w1", "completion": "w2"}
    config, mask = TextConfig(source="rows.jsonl"), tokenizer.convert_tokens_to_ids("w3")
    rows = [row, row | {name: "w1 w3"}]
    with pytest.raises(ValueError, match=rf"row 1 of rows.jsonl contains the mask token \(id {mask}\)"):
        encode_rows(rows, config, tokenizer, mask_token_id=mask)


def test_long_examples_can_be_dropped(tokenizer):
    rows = [{"prompt": "w1", "completion": "w2 " * n} for n in (3, 30, 5)]
    config = TextConfig(source="rows.jsonl", max_length=20, too_long="drop")
    kept, dropped = encode_rows(rows, config, tokenizer)
    assert (len(kept), dropped) == (2, 1)
    assert MASK not in kept[0].answer


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
ASSISTANT = {"role": "assistant", "content": "w2"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [{"content": "w1"}, ASSISTANT]},
            r"row 1 of rows.jsonl: 'messages': message 0 has no role \(it has 'content'\); give it one",
        ),
        ({"messages": [USER, {"role": None, "content": "w2"}]}, "message 1 has no role"),
        (
            {"messages": [{"from": "human", "value": "w1"}]},
            r"message 0 has no role \(it has 'from', 'value'\)",
        ),
        (
            {"messages": [{"role": "User", "content": "w1"}, ASSISTANT]},
            "the role 'User'; did you mean 'user'",
        ),
        ({"messages": [USER, {"role": "asistant", "content": "w"}]}, "did you mean 'assistant'"),
        ({"messages": "w1 w2"}, "row 1 of rows.jsonl: 'messages': 'w1 w2' is str, not a list of messages"),
        ({"messages": {"role": "user"}}, "is dict, not a list of messages"),
        ({"messages": ["w1", "w2"]}, "message 0 is str 'w1'; write {'role': 'user', 'content': 'text'}"),
        (
            {"messages": [{"role": "user", "content": 3}, ASSISTANT]},
            "message 0: the content is int, not text",
        ),
        (
            {"messages": [{"role": "user", "content": {"text": "w1"}}, ASSISTANT]},
            "the content is dict, not text",
        ),
        ({"messages": [{"role": "user"}, ASSISTANT]}, r"message 0 \(user\) has no content; give it a text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}, ASSISTANT]},
            r"content has a part of type 'image', but a text model reads only text; leave the row",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": None}]}]},
            "a tool call is {}; write",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": "weather"}]},
            "a tool call is 'weather'; write",
        ),
        ({"prompt": [{"content": "w1"}], "completion": [ASSISTANT]}, "'prompt': message 0 has no role"),
        ({"prompt": [USER], "completion": [{"content": "w1"}]}, "'completion': message 0 has no role"),
        (
            {"prompt": [USER], "completion": [USER]},
            "must begin and end with a message of the role 'assistant'",
        ),
        ({"prompt": [USER], "completion": [ASSISTANT, USER]}, "not 'assistant' and 'user'"),
    ],
)
def test_messages_that_are_none_are_named_with_row_and_remedy(tokenizer, row, message):
    good = (
        {"prompt": [USER], "completion": [ASSISTANT]} if "prompt" in row else {"messages": [USER, ASSISTANT]}
    )
    with pytest.raises(ValueError, match=message):
        encode([good, row], tokenizer)


def test_content_in_parts_of_text_is_one_text(tokenizer):
    """A table gives every part and message the keys of all others, without values."""
    parts = [{"type": "text", "text": "w1 ", "image": None}, {"type": "text", "text": "w2", "image": None}]
    rows = [
        {"messages": [{"role": "user", "content": parts, "name": None, "tool_calls": None}, ASSISTANT]},
        {
            "prompt": [{"role": "user", "content": parts}],
            "completion": [{"role": "assistant", "content": parts}],
        },
    ]
    first, second = (encode([row], tokenizer)[0] for row in rows)
    assert (
        words(tokenizer, first.prompt) == words(tokenizer, second.prompt) == "<user> w1 w2 <eos> <assistant>"
    )
    assert words(tokenizer, first.answer) == "w2 <eos>"
    assert words(tokenizer, second.answer) == "w1 w2 <eos>"


CALLING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<call>"
    "{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("content", [None, "", "Let me look."])
def test_a_call_of_a_tool_is_an_answer_where_the_template_writes_it(content):
    """Arguments that only other rows of the table have are not part of it."""
    tokenizer = byte_tokenizer(CALLING, "<|im_end|>")
    call = {"function": {"name": "weather", "arguments": {"city": "Rome", "unit": None}}}
    messages = [
        {"role": "user", "content": "Weather in Rome?", "tool_calls": None},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_calls": None},
        {"role": "assistant", "content": "It rains.", "tool_calls": None},
    ]
    first, second = encode([{"messages": messages}], tokenizer)
    called = f'{content or ""}<call>weather {{"city": "Rome"}}</call><|im_end|>'
    assert tokenizer.decode(first.answer) == called
    assert tokenizer.decode(second.prompt).endswith(
        f"<|im_start|>assistant\n{called}\n<|im_start|>tool\nrain<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(second.answer) == "It rains.<|im_end|>"


@pytest.mark.parametrize("content", [None, "w2"])
def test_a_call_that_the_template_leaves_out_is_refused(tokenizer, content):
    call = {"role": "assistant", "content": content, "tool_calls": [CALL]}
    tool = {"role": "tool", "content": "w3"}
    for row in ({"messages": [USER, call]}, {"prompt": [USER, call, tool], "completion": [ASSISTANT]}):
        with pytest.raises(
            ValueError, match=r"row 0: a message calls weather, but the chat template does not"
        ):
            encode([row], tokenizer)


def test_what_the_template_refuses_is_named_with_its_row():
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('users first') }}{% endif %}" + CALLING
    tokenizer = byte_tokenizer(strict, "<|im_end|>")
    rows = [
        {"messages": [USER, ASSISTANT]},
        {"messages": [{"role": "system", "content": "w"}, USER, ASSISTANT]},
    ]
    with pytest.raises(
        ValueError, match=r"row 1: the chat template refuses the messages \(users first\); change"
    ):
        encode(rows, tokenizer)
    tokenizer.chat_template = CALLING.replace("m.content", "m.content + m.missing.key")
    with pytest.raises(ValueError, match="row 0: the chat template refuses the messages"):
        encode(rows, tokenizer)
