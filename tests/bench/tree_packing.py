"""What packing rows as a tree would save: `python -m tests.bench.tree_packing [--record FOLDER] [RUN ...]`.

Takes the rows that a recorded run trained, from its ledger, and packs them as the trainer does. Beside the
tokens of these forward passes it prints those of a tree, in which what rows have in common is computed once:
of the rows of each episode, and of all rows of a group, the least there can be. `--record` first makes a run:
three steps of "guess the number" by a model of 2 layers whose template drops the thinking of earlier turns.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from os.path import commonprefix
from pathlib import Path

from recipes.grpo import run as train
from rl.batch import pack
from rl.config import Config
from rl.config.read import read_config
from rl.store.ledger import Ledger
from rl.update import pack_rules
from tests.bench.guess_number import WORDS, make_model

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'].split('</think>')[-1] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> <think> {% endif %}"
)


def record(folder: Path) -> Path:
    """A turn has 6 tokens on average, as 4 of the words end it, and a prompt 20."""
    make_model(folder / "model")
    (folder / "template.jinja").write_text(TEMPLATE)
    train(
        {
            "run_dir": str(folder / "run"),
            "model": {
                "name": str(folder / "model"),
                "dtype": "fp32",
                "chat_template": str(folder / "template.jinja"),
            },
            "data": {"source": "recipes.environments.guess:rows", "options": {"num_rows": 8, "high": 4}},
            "sampling": {
                "max_completion_length": 96,
                "stop_token_ids": [i for i, word in enumerate(WORDS) if word.isdigit()],
            },
            "engine": {"name": "transformers"},
            "environment": {
                "name": "guess_number",
                "options": {"high": 4},
                "max_turns": 4,
                "max_turn_length": 24,
                "history": "template",
                "workers": 1,
            },
            "rewards": {"functions": [{"name": "environment"}]},
            "train": {"steps": 3, "prompts_per_step": 8, "group_size": 8, "token_budget": 8192},
            "loss": {"kl_coef": 0.0},
            "checkpoint": {"every": 0},
        }
    )
    return folder / "run"


def tree_size(sequences: Iterable[Sequence[int]]) -> int:
    """Tokens of a tree of the sequences: their different prefixes. Sorted neighbours share the most."""
    found = sorted(sequences)
    return sum(map(len, found)) - sum(len(commonprefix(pair)) for pair in pairwise(found))  # noqa: RUF071


def main(run: Path) -> None:
    config, ledger = read_config(Config, run / "config.yaml"), Ledger(run)
    now = alone = of_episodes = of_groups = num_rows = num_episodes = 0
    for step in range(config.train.steps):
        record = ledger.read(step)
        for batch in pack(record.groups, record.advantages, pack_rules(config)) if record else ():
            now += batch.num_packed_tokens
            groups = defaultdict[int, dict[int, list[list[int]]]](lambda: defaultdict(list))
            for micro_batch in batch.micro_batches:
                for row, (ids, _, _) in zip(micro_batch.rows, micro_batch.sequences(), strict=True):
                    groups[row.group_index][row.index].append(ids.tolist())
            for episodes in groups.values():
                rows = [row for episode in episodes.values() for row in episode]
                alone += sum(map(len, rows))
                prompt = len(commonprefix(rows))  # noqa: RUF071  of lists
                of_episodes += prompt + sum(tree_size(own) - prompt for own in episodes.values())
                of_groups += tree_size(rows)
                num_rows, num_episodes = num_rows + len(rows), num_episodes + len(episodes)
    print(f"{run}: {num_episodes:,} trained episodes of {num_rows / num_episodes:.2f} rows")
    print(f"  {alone:,} tokens row by row, {now:,} as they are packed")
    print(f"  {of_episodes:,} in a tree of each episode behind its group's prompt: {now / of_episodes:.2f}x")
    print(f"  {of_groups:,} in a tree of each group: {now / of_groups:.2f}x")


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:1] == ["--record"]:
        words[:2] = [str(record(Path(words[1])))]
    for folder in words:
        main(Path(folder))
