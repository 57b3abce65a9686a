"""The command line of `recipes.evaluate_llada`, checked before anything is loaded."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from rollout.diffusion.steps import CACHES, REMASKING, DenoisingParams

SAMPLER = ("gen_length", "block_length", "steps", "temperature", "remasking", "threshold", "cfg_scale")
SAMPLER += ("cache", "refresh_every")
WORDS = {
    "model.mask_token": "--mask-token",
    "model.shift": "--shift",
    "model.dtype": "--dtype",
    "model.name=": "MODEL ",
    "model.chat_template": "the tokenizer's chat template",
    "data.max_length": "--max-length",
    "data.chat=false": "--no-chat",
    "name yours with data.prompt_column and data.completion_column": "rename yours",
    "data.source=": "the file ",
}
"""What a config calls it -> what this command calls it."""


def arguments(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m recipes.evaluate_llada", description=description)
    add = parser.add_argument
    add("model", help="folder, hub name or built-in name")
    add("--perplexity", type=Path, metavar="FILE", help='rows {"text"} or {"prompt", "completion"}')
    add("--choices", type=Path, metavar="FILE", help='rows {"prompt", "choices": [...], "answer": index}')
    add("--generate", type=Path, metavar="FILE", help='rows {"prompt"}, or {"prompt", "answer"} to grade')
    add("--lm-eval", metavar="TASK,TASK", help="tasks of lm-eval (pip install lm-eval==0.4.13)")
    add("--lm-eval-path", type=Path, metavar="FOLDER", help="YAML files of tasks of your own")
    add("--chat", action=argparse.BooleanOptionalAction, help="default: if there is a chat template")
    add("--limit", type=positive, metavar="N", help="use the first N rows of every file and task")
    add("--seed", type=not_negative, default=0, help="of masks and samples")
    add("--num-draws", type=positive, help="masks per example; default: 128, and 4 for --perplexity")
    add("--max-length", type=positive, default=1024, help="tokens per piece of text for --perplexity")
    add("--token-budget", type=positive, default=8192, help="packed tokens of one forward pass")
    add("--show", type=not_negative, default=3, metavar="N", help="how many completions to print")
    add("--dtype", choices=("fp32", "bf16"), help="default: bf16 on a GPU")
    add("--mask-token", help="token or id; default: the checkpoint's own, else a spare vocabulary row")
    add(
        "--shift",
        action=argparse.BooleanOptionalAction,
        help="the left neighbour predicts a token (Dream); default: as the checkpoint says",
    )
    add_sampler_options(parser)
    a = parser.parse_args(argv)
    if not (a.perplexity or a.choices or a.generate or a.lm_eval):
        parser.error("nothing to do; give --perplexity, --choices, --generate or --lm-eval")
    return a


def add_sampler_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("sampling, for --generate and --lm-eval").add_argument
    add("--gen-length", type=positive, default=128, help="tokens of a completion at most")
    add("--block-length", type=positive, default=32, help="columns that are filled before the next ones")
    add("--steps", type=positive, help="model calls per completion; default: one per token")
    add("--temperature", type=float, default=0.0, help="0: the most likely token")
    add("--remasking", choices=REMASKING, default="low_confidence", help="which tokens of a step are kept")
    add("--threshold", type=float, help="keep all tokens of higher confidence; default: the schedule")
    add("--cfg-scale", type=float, default=0.0, help="scale of classifier-free guidance; 0: none")
    add("--cache", choices=CACHES, default="none", help="keys and values that are kept between steps")
    add("--refresh-every", type=not_negative, default=0, help="steps; 1: exact, 0: only when a block begins")


def denoising_params(a: argparse.Namespace) -> DenoisingParams:
    """How canvases are filled.

    Raises:
        ValueError: options do not fit each other; the message has their command-line names.
    """
    try:
        return DenoisingParams(**{name: getattr(a, name) for name in SAMPLER})
    except ValueError as error:
        named = rf"\b({'|'.join(SAMPLER)})\b"
        said = re.sub(named, lambda found: f"--{found[1].replace('_', '-')}", str(error))
        raise ValueError(said) from None


def in_options(sentence: str) -> str:
    """A sentence of the library with this command's options in place of a config's keys."""
    sentence = re.sub(r"mask_token_id=(-?\d+) \(model.mask_token\)", r"--mask-token \1", sentence)
    for key, word in WORDS.items():
        sentence = sentence.replace(key, word)
    return sentence


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def not_negative(text: str) -> int:
    if (number := int(text)) < 0:
        raise ValueError(text)
    return number
