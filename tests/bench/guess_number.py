"""Does a policy learn to use what it is told? `python -m tests.bench.guess_number [FOLDER] [STEPS]`.

A model of 2 layers from random weights guesses a number from 1 to 4 in two turns, and hears "higher" or
"lower". No policy without feedback succeeds more often than 2 / 4; the best with feedback does in 3 / 4.
Prints the share of episodes that succeed in the first and last 20 steps, with intervals clustered by prompt.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from recipes.evaluation.statistics import share_interval
from recipes.grpo import run
from rl.store.ledger import Ledger
from tests.conftest import SPECIAL, word_tokenizer

LOW, HIGH, TURNS, LAST = 1, 4, 2, 20
WORDS = [
    *SPECIAL,
    *map(str, range(LOW, HIGH + 1)),
    "higher",
    "lower",
    "say",
    "a",
    "number",
    "Guess",
    "it",
    ".",
]


def make_model(folder: Path, words: Sequence[str] = WORDS) -> None:
    """A model of 2 layers with random weights, whose tokens are these words."""
    tokenizer = word_tokenizer(folder, words)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def main(folder: Path, steps: int) -> None:
    make_model(folder / "model")
    numbers = [WORDS.index(str(n)) for n in range(LOW, HIGH + 1)]
    config = {
        "run_dir": str(folder / "run"),
        "model": {"name": str(folder / "model"), "dtype": "fp32"},
        "data": {"source": "recipes.environments.guess:rows", "options": {"num_rows": 8}},
        # A number ends a turn.
        "sampling": {"max_completion_length": 32, "stop_token_ids": numbers},
        "engine": {"name": "transformers"},
        "environment": {
            "name": "guess_number",
            "options": {"low": LOW, "high": HIGH},
            "max_turns": TURNS,
            "max_turn_length": 2,
            "workers": 1,
        },
        "rewards": {"functions": [{"name": "environment"}]},
        "train": {"steps": steps, "prompts_per_step": 32, "group_size": 8, "token_budget": 8192},
        "advantage": {"name": "rloo", "credit": "turns"},
        "loss": {"kl_coef": 0.0, "entropy_coef": 0.0},
        "optimizer": {"lr": 3e-3},
        "checkpoint": {"every": 0},
    }
    run(config)
    ledger = Ledger(folder / "run")
    for last in (range(LAST), range(steps - LAST, steps)):
        groups = [g for step in last for g in ledger.read(step).groups]  # pyright: ignore[reportOptionalMemberAccess]
        shares = [sum(r.score or 0.0 for r in g.rewards) / len(g.rewards) for g in groups]
        number = len(shares) * len(groups[0].rewards)
        low, high = share_interval(shares, number)
        print(
            f"steps {last.start + 1} to {last.stop}: {sum(shares) / len(shares):.1%} of {number} episodes "
            f"succeed (95 % interval {low:.1%} to {high:.1%}); without feedback at most {TURNS / HIGH:.1%}"
        )


if __name__ == "__main__":
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    main(place, int(sys.argv[2]) if len(sys.argv) > 2 else 150)
