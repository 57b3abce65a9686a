"""Only the prompts that a run consumes are rendered, and nothing else is different."""

from __future__ import annotations

import json
import random
import re

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from recipes.grpo import main
from recipes.tasks import many
from recipes.tasks.many import SomePrompts, train_prompts
from recipes.tasks.prompts import make_prompts
from rl.config.read import load_config
from rl.store.ledger import Ledger
from rl.store.rows import read_rows

ROWS = [{"prompt": f"What is w{i} ?", "answer": f"w{i}", "n": i} for i in range(30)]
LONG = {"prompt": "w1 w2 w3 " * 24, "answer": "w1", "n": 0}  # 72 words, 75 tokens with the template's
WIDE = {"prompt": "boxed" * 30, "answer": "w1", "n": 0}  # one word of 150 bytes


@pytest.fixture
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture
def prompts(config_file, tokenizer):
    """(prompts of many rows, of few rows, what was noted each time) of the same rows."""

    def prompts_(rows, *overrides, heldout=()):
        config = load_config(config_file, ["data.max_prompt_length=60", *overrides])
        said, found = ([], []), []
        for notes, limit in zip(said, (3, 1000), strict=True):
            given = {"template_file": None, "note": notes.append}
            shown = make_prompts(config.data, heldout, tokenizer, "heldout", **given) if heldout else []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(many, "MANY", limit)
                found.append(train_prompts(config, rows, shown, tokenizer, **given))
        return *found, *said

    return prompts_


def test_the_prompts_and_their_order_are_those_of_few_rows(prompts):
    rows = [*ROWS[:9], WIDE, *ROWS[9:]]
    some, all_of_them, *_ = prompts(rows, "train.steps=2", "train.prompts_per_step=3")
    assert isinstance(some, SomePrompts) and isinstance(all_of_them, list)
    assert len(some.ready) == 7  # of 2 x 3, and the wide one, whose tokens had to be counted
    assert list(some) == all_of_them and all_of_them[10].id == "train/000010"


def test_long_and_held_out_rows_are_left_out_alike(prompts):
    rows = [*ROWS[:9], LONG, *ROWS[9:], LONG]
    heldout = [{"prompt": "  What is w3 ? ", "answer": "w3"}, {"prompt": "other", "answer": "w1"}]
    some, all_of_them, said, expected = prompts(rows, "data.too_long=drop", heldout=heldout)
    assert said == expected and said[0].startswith("2 of 32 rows of train have more than")
    assert said[1] == "1 of 30 training prompts are held out too: left out"
    assert list(some) == all_of_them and len(some) == 29


@pytest.mark.parametrize(
    ("row", "overrides", "message"),
    [
        (LONG, [], "1 of 31 rows of train have more than data.max_prompt_length=60 tokens: row 30 (75)"),
        ({**ROWS[0], "prompt": " "}, [], "train row 30: the prompt is empty"),
        ({**ROWS[0], "prompt": None}, [], "train row 30: a prompt must be text or a non-empty list"),
        ({**ROWS[0], "n": float("nan")}, [], "train row 30: column 'n' holds float nan"),
        (
            {"prompt": "w1", "answer": "w1"},
            ["data.columns=[n]"],
            "train row 30: data.columns: the dataset has no",
        ),
        ({"answer": "w1"}, [], "train row 30: data.prompt_column: the dataset has no column 'prompt'"),
    ],
)
def test_what_is_wrong_with_a_row_is_refused_before_the_run_although_none_would_consume_it(
    prompts, row, overrides, message
):
    with pytest.raises(ValueError, match=re.escape(message)):
        prompts([*ROWS, row], "train.steps=1", "train.prompts_per_step=1", *overrides)


def test_where_all_rows_are_held_out_the_run_is_refused(prompts):
    with pytest.raises(ValueError, match="every training prompt is among evaluation"):
        prompts(ROWS[:5], heldout=ROWS[:5])


def test_a_template_that_looks_at_the_text_and_messages_are_rendered_whole(prompts, tokenizer):
    chats = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    assert isinstance(prompts(chats)[0], list)
    tokenizer.chat_template = "{% if '7' in messages[0]['content'] %}w1{% endif %}" + tokenizer.chat_template
    assert isinstance(prompts(ROWS)[0], list)


def test_a_run_and_its_continuation_are_the_same(config_file, monkeypatch):
    """Six steps of two prompts, of eight rows: into the second epoch; stopped after two, and resumed."""
    found = []
    for limit in (3, 1000):
        monkeypatch.setattr(many, "MANY", limit)
        run = config_file.parent / f"run{limit}"
        words = [str(config_file), f"run_dir={run}", "data.max_prompt_length=60", "checkpoint.every=1"]
        assert main([*words, "train.steps=2"]) == 0
        assert main([*words, "train.steps=6"]) == 0
        inputs = json.loads((run / "inputs.json").read_text())
        asked = [g.group.prompt for s in range(6) for g in (Ledger(run).read_all(s) or [])[0].groups]
        rewards = [(row["step"], row["reward/mean"]) for row in read_rows(run / "metrics.jsonl")]
        found.append((asked, rewards, inputs))
    assert found[0] == found[1] and len(found[0][0]) == 12


def test_a_prompt_has_no_more_tokens_than_its_frame_and_its_bytes():
    """Any text in any frame, by a tokenizer of bytes that merges: text may touch what stands around it."""
    frames = [
        ("", ""),
        ("<s>user\nSay ", "\n\nput it into a \\box{}.</s>"),
        ("what is the sum of the  ", "s"),
    ]
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = ["the the and the user what is the sum of these words"] * 40 + [
        f for pair in frames for f in pair
    ]
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    draw, words = random.Random(0), ["the", " ", "\n", "s", "w", "\\box", "é", "user", "1"]
    for before, after in frames:
        cost = many.frame_tokens(before, after, tokenizer)
        for _ in range(300):
            text = "".join(draw.choices(words, k=draw.randrange(9)))
            found = tokenizer(before + text + after, add_special_tokens=False)["input_ids"]
            assert len(found) <= cost + len(text.encode())
