"""What packing rows as a tree saves: `python -m tests.bench.tree_packing [--record FOLDER] [RUN ...]`.

Takes the rows that a recorded run trained, from its ledger, and packs them as the trainer does. Prints the
tokens of these forward passes, where rows of an episode branch off each other. Beside them: tokens if rows
shared no more than the prompt of their group, and if all that rows of a group have in common were computed
once, the least there can be.

`--record` first makes runs of three steps with Qwen3's chat template, which drops the thinking of turns
before the last message of a user, and keeps it before answers of tools. The model is a chain of words made by
hand, so that it thinks for 200 tokens on average (deviation 100) and says 40. An episode has 3 to 6 turns.
"""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import log
from os.path import commonprefix
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import chat_template_utils

from recipes.grpo import run as train
from rl.batch import pack
from rl.config import Config
from rl.config.read import read_config
from rl.store.ledger import Ledger
from rl.update import pack_rules
from rollout.environment import Environment, Episode, Reply, Turn

TEMPLATE = Path(chat_template_utils.__file__).parent / "chat_templates" / "qwen3.jinja"
PHASES, SAID, WORDS = 4, 40, 16  # thinking of 4 phases of 50 tokens, as each ends with probability 1 / 50
TALKS = {"hints": ("user", 30, 100), "user": ("user", 30, 500), "tool": ("tool", 30, 500)}


class Telling(Environment, Episode):
    """Answers with words, and ends after 3 to 6 turns with a reward drawn from what was said."""

    repeatable, tools = True, ()

    def __init__(self, talk: str) -> None:
        self.role, *self.lengths = TALKS[talk]

    def open(self, row: Mapping[str, Any], seed: int, state: Any = None) -> Episode:
        self.draw = random.Random(seed)
        return self

    def step(self, turn: Turn) -> Reply:
        draw = random.Random(turn.text)
        if turn.number >= 2 and draw.random() < [0.25, 0.33, 0.5, 1.0][turn.number - 2]:
            return Reply((), draw.random(), done=True, state={})
        words = " ".join(f"w{draw.randrange(WORDS)}" for _ in range(draw.randint(*self.lengths)))
        return Reply(({"role": self.role, "content": words},), state={})


def rows(num_rows: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    return [{"prompt": " ".join(f"w{draw.randrange(WORDS)}" for _ in range(300))} for _ in range(num_rows)]


def make_model(folder: Path) -> None:
    """A Llama whose layers add nothing, so that logits depend on the state of the last token alone."""
    states = [*(f"t{i}" for i in range(PHASES)), "a"]
    words = {f"{x}{j}": state for state, x in enumerate([*states, "w"]) for j in range(WORDS)}
    begin, end, header = "<think>\n", "\n</think>\n\n", "<|im_start|>assistant\n"
    rest = ["<pad>", "<unk>", "<|im_end|>", "<|im_start|>user\n", "\n", "<tool_response>", "</tool_response>"]
    tokens = [*rest, header, begin, end, *words, *(f" {word}" for word in words)]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    pattern = r"<\|im_start\|>\w+\n|<think>\n|\n</think>\n\n|</?tool_response>|\n| ?\w+"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<|im_end|>"
    ).save_pretrained(folder)
    of_state = {state: [tokens.index(f" {w}") for w, s in words.items() if s == state] for state in range(5)}
    kind = dict.fromkeys(tokens, PHASES + 4) | {w: s for w, s in words.items() if s <= PHASES}
    kind |= {f" {w}": s for w, s in words.items() if s <= PHASES} | {header: 5, begin: 6, end: 7}
    goes: dict[int, list[tuple[list[int], float]]] = {
        s: [(of_state[s], 1 - 1 / 50), (of_state[s + 1] if s + 1 < PHASES else [tokens.index(end)], 1 / 50)]
        for s in range(PHASES)
    }
    goes |= {PHASES: [(of_state[PHASES], 1 - 1 / SAID), ([tokens.index("<|im_end|>")], 1 / SAID)]}
    goes |= {5: [([tokens.index(begin)], 1.0)], 6: [(of_state[0], 1.0)], 7: [(of_state[PHASES], 1.0)]}
    size = 16
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=size, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=8192, bos_token_id=None,
        eos_token_id=tokens.index("<|im_end|>"), pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        layer = model.model.layers[0]
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size)[[kind[t] for t in tokens]])
        model.lm_head.weight.fill_(-30.0 / size**0.5)
        for state, ways in goes.items():
            for ids, share in ways:
                model.lm_head.weight[ids, state] = log(share / len(ids)) / size**0.5
    model.save_pretrained(folder)


def record(folder: Path, talk: str) -> Path:
    train(
        {
            "run_dir": str(folder / talk),
            "model": {"name": str(folder / "model"), "dtype": "fp32", "chat_template": str(TEMPLATE)},
            "data": {"source": "tests.bench.tree_packing:rows", "options": {"num_rows": 12}},
            "sampling": {"max_completion_length": 6000},
            "engine": {"name": "transformers"},
            "environment": {
                "name": "tests.bench.tree_packing:Telling",
                "options": {"talk": talk},
                "max_turns": 6,
                "max_turn_length": 1000,
                "history": "template",
                "workers": 1,
            },
            "rewards": {"functions": [{"name": "environment"}]},
            "train": {"steps": 3, "prompts_per_step": 4, "group_size": 8, "token_budget": 16384},
            "optimizer": {"lr": 1e-9},
            "loss": {"kl_coef": 0.0},
            "checkpoint": {"every": 0},
        }
    )
    return folder / talk


def tree_size(sequences: Iterable[Sequence[int]]) -> int:
    """Tokens of a tree of the sequences: their different prefixes. Sorted neighbours share the most."""
    found = sorted(sequences)
    return sum(map(len, found)) - sum(len(commonprefix(pair)) for pair in pairwise(found))  # noqa: RUF071


def main(run: Path) -> None:
    config, ledger = read_config(Config, run / "config.yaml"), Ledger(run)
    packed = alone = behind = least = num_rows = num_episodes = 0
    for step in range(config.train.steps):
        record = ledger.read(step)
        for batch in pack(record.groups, record.advantages, pack_rules(config)) if record else ():
            packed += sum(len(m.token_ids_N) for m in batch.micro_batches)
            groups = defaultdict[int, list[list[int]]](list)
            for m in batch.micro_batches:
                behind += sum(block.prompt_length for block in m.blocks)
                behind += sum(len(row.completion.token_ids) for row in m.rows)
                num_rows, num_episodes = num_rows + len(m.rows), num_episodes + m.num_sequences
                for row, (ids, _, _) in zip(m.rows, m.sequences(), strict=True):
                    groups[row.group_index].append(ids.tolist())
            alone += sum(len(ids) for rows in groups.values() for ids in rows)
            least += sum(map(tree_size, groups.values()))
    print(f"{run}: {num_episodes:,} trained episodes of {num_rows / num_episodes:.2f} rows")
    print(f"  {alone:,} tokens row by row, {behind:,} after the prompts of their groups")
    print(
        f"  {packed:,} as they are packed: {behind / packed:.2f}x; {least:,} at least: {behind / least:.2f}x"
    )


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:1] == ["--record"]:
        make_model(Path(words[1]) / "model")
        words[:2] = [str(record(Path(words[1]), talk)) for talk in TALKS]
    for folder in words:
        main(Path(folder))
