"""The text that graders see: special tokens stay, and only what ends or pads a completion is left out."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoTokenizer

from rewards.format import think_format
from rl.types import Completion, Prompt, SamplingParams
from rollout.calls import completion, decode_texts
from rollout.transformers import TransformersEngine
from tests.calling import call

EOS, THINK, CLOSE = 1, 15, 16  # in the tiny vocabulary <pad> is 0 and w10, w11 are 15, 16


@pytest.fixture(scope="module")
def thinking_folder(tiny_model_dir, tmp_path_factory):
    """The tiny model, with <think> and </think> as special tokens, as in many reasoning models."""
    folder = tmp_path_factory.mktemp("thinking") / "model"
    shutil.copytree(tiny_model_dir, folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for old, new in (("w10", "<think>"), ("w11", "</think>")):
        vocabulary[new] = vocabulary.pop(old)
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"].append({"id": vocabulary[new], "content": new, "special": True, **flags})
    file.write_text(json.dumps(tokenizer))
    return folder


def text_of(tokenizer, ids, reason="stop") -> Completion:
    c = completion(ids, [0.0] * len(ids), reason, [0])
    decode_texts(tokenizer, [c])
    return c


@pytest.mark.parametrize(
    ("ids", "reason", "text"),
    [
        ([THINK, 5, CLOSE, 6, EOS], "stop", "<think>w0</think>w1"),
        ([5, 6, 4], "stop", "w0w1"),  # <assistant>, a special token that the model's config ends with
        ([5, 6, 4], "length", "w0w1<assistant>"),
        ([5, EOS, 6, 0, 0], "length", "w0<eos>w1"),  # padding follows the text
        ([5, 6], "stop", "w0w1"),  # a stop id that is a word
        ([EOS], "stop", ""),
    ],
)
def test_only_end_and_pad_tokens_are_left_out_of_a_text(thinking_folder, ids, reason, text):
    c = text_of(AutoTokenizer.from_pretrained(thinking_folder), ids, reason)
    assert (c.text, c.token_ids) == (text, ids)


def test_think_format_sees_tags_that_are_special_tokens(thinking_folder):
    c = text_of(AutoTokenizer.from_pretrained(thinking_folder), [THINK, 5, CLOSE, 6, EOS])
    assert think_format([c.text])[0].score == 1.0


def test_an_engine_hands_special_tokens_on_to_its_readers(thinking_folder):
    tokenizer = AutoTokenizer.from_pretrained(thinking_folder)
    engine = TransformersEngine(thinking_folder, tokenizer)
    prompts = [Prompt(str(i), "", (5 + i,)) for i in range(8)]
    sampling = SamplingParams(16, temperature=2.0, stop_token_ids=(EOS,))
    groups = engine.generate(call(prompts, num_completions=8, sampling=sampling, seeds=range(8)))
    found = [c for group in groups for c in group.completions]
    assert sum(THINK in c.token_ids for c in found) > 5
    for c in found:
        assert (c.text.count("<think>"), c.text.count("</think>")) == (
            c.token_ids.count(THINK),
            c.token_ids.count(CLOSE),
        )
        assert not c.text.endswith("<eos>")
