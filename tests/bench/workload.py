"""Workload W, which both trainers of `tests.bench.grpo_vs_trl` run: model, prompts, reward.

Random weights of Qwen2.5's shapes; random prompts of equal length; the first `STOP_SHARE` of the
vocabulary ends a completion, so that lengths are geometric; rewards are random, so that every group has
spread. What is learnt is nothing, what is measured is time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

STOP_SHARE = 512 / 151936
BYTES_AT = 1000
SHAPES = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512},
    "0.5b": {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "intermediate_size": 4864,
    },
    "1.5b": {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "intermediate_size": 8960,
    },
    "3b": {
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "intermediate_size": 11008,
    },
    "7b": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "intermediate_size": 18944,
    },
}


@dataclass(frozen=True)
class Workload:
    """What a step samples: `prompts` x `group` completions; lengths in tokens.

    Args:
        trl_micro_batch: rows of a micro-batch of TRL's trainer; Cohort's follow from a token budget.
    """

    shape: str = "1.5b"
    prompts: int = 32
    group: int = 8
    prompt_length: int = 200
    max_length: int = 1024
    steps: int = 5
    lora: int = 0
    trl_micro_batch: int = 16

    @property
    def vocabulary(self) -> int:
        return 4096 if self.shape == "tiny" else 151936

    @property
    def stop_ids(self) -> list[int]:
        return list(range(int(STOP_SHARE * self.vocabulary) or 1))

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        for option in fields(Workload):
            flag = f"--{option.name.replace('_', '-')}"
            parser.add_argument(flag, type=type(option.default), default=option.default)

    @staticmethod
    def of(arguments: argparse.Namespace) -> Workload:
        return Workload(**{option.name: getattr(arguments, option.name) for option in fields(Workload)})

    def export(self) -> None:
        """To the subprocesses of this one."""
        os.environ["COHORT_WORKLOAD"] = json.dumps(asdict(self))

    @staticmethod
    def current() -> Workload:
        return Workload(**json.loads(os.environ["COHORT_WORKLOAD"]))


def now() -> float:
    """Seconds, when all work on the device is done."""
    from tests.bench.clock import synchronize

    synchronize()
    return time.perf_counter()


def write_model(folder: Path, workload: Workload) -> Path:
    """Model and tokenizer; a byte is one token, so a text of n ASCII letters has n tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    size = workload.vocabulary
    names = [f"<t{i}>" for i in range(size - 3)] + ["<pad>", "<end>", "<unk>"]
    for n, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())):
        names[BYTES_AT + n] = character
    plain = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=size,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        rope_theta=1e6,
        bos_token_id=size - 2,
        eos_token_id=size - 2,
        pad_token_id=size - 3,
        **SHAPES[workload.shape],
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # 12 GiB of a 3b, beside what the caller measures
    return folder


def prompt_texts(workload: Workload, count: int = 512) -> list[str]:
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return ["".join(draw.choices(letters, k=workload.prompt_length)) for _ in range(count)]


def rows(**_: Any) -> list[dict[str, str]]:
    """The same prompts as rows of a dataset."""
    return [{"prompt": text} for text in prompt_texts(Workload.current())]


def texts(**_: Any) -> list[dict[str, str]]:
    """Prompts, and answers that fill 2,048 tokens in the longest rows."""
    draw, longest = random.Random(1), 2000 - Workload.current().prompt_length
    letters = "abcdefghijklmnopqrstuvwxyz"
    sizes = [longest if i % 4 == 0 else draw.randint(1, longest) for i in range(512)]
    answers = ["".join(draw.choices(letters, k=size)) for size in sizes]
    prompts = prompt_texts(Workload.current())
    return [{"prompt": p, "completion": a} for p, a in zip(prompts, answers, strict=True)]


def coin(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """A random reward, as TRL's side of the benchmark draws it."""
    return [random.random() for _ in completions]
