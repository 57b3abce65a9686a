"""A small real engine whose policy says given texts, and a byte-level tokenizer with tokens of a template."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rl.types import Completion, Group, VersionSpan
from rollout.calls import decode_texts
from rollout.fingerprint import HeldTensor

TOKEN = re.compile(r"<[|｜\w][^<>\s'\"{}]{0,40}>|\[/?[A-Z_]{2,20}\]")


def byte_tokenizer(template: str, *, end: str = "", extra: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Bytes as tokens, and what looks like a token of the template as one more each."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    special = sorted({*TOKEN.findall(template), *extra, *([end] if end else [])} | {"<bos>", "<eos>"})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token=end or "<eos>", pad_token="<eos>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = template
    return tokenizer


class ScriptEngine:
    """Says `say(seed)` in each turn, and ends it as a model would.

    Attributes:
        sent: (name of the prompt, its ids) of every turn that was sampled.
        seeds: of every turn.
    """

    name = "script"
    runs_alone = held_while_training = sleeps_while_training = False

    def __init__(self, tokenizer: Any, say: Callable[[int], str], *, fails: Sequence[str] = ()) -> None:
        self.tokenizer, self.say, self.fails = tokenizer, say, fails
        self.version, self.sent, self.seeds, self.waves = 0, [], [], []
        self.tensors = {"w": HeldTensor((1,), torch.float32, torch.device("cpu"), "w")}
        self._calls = []
        self.aborted: list[str] = []

    @property
    def in_flight(self):
        return sum(len(call.prompts) for call in self._calls)

    def submit(self, call):
        self._calls.append(call)
        self.waves.append(len(call.prompts))

    def collect(self, *, timeout_s):
        calls, self._calls = self._calls, []
        return [
            Group(prompt, [self._turn(prompt, seed, call)])
            for call in calls
            for prompt, seed in zip(call.prompts, call.seeds, strict=True)
        ]

    def _turn(self, prompt, seed, call):
        self.sent.append((prompt.id, prompt.token_ids))
        self.seeds.append(seed)
        if any(part in prompt.id for part in self.fails):
            return Completion([], [], [], "abort", [])
        ids = self.tokenizer(self.say(seed), add_special_tokens=False)["input_ids"]
        ids.append(call.sampling.stop_token_ids[0])
        most = call.sampling.max_completion_length
        reason = "stop" if len(ids) <= most else "length"
        ids = ids[:most]
        draw = random.Random(seed)
        logprobs = [-draw.random() for _ in ids] if call.with_logprobs else []
        spans = [VersionSpan(self.version, len(ids))]
        completion = Completion(ids, logprobs, [True] * len(ids), reason, spans)
        decode_texts(self.tokenizer, [completion])
        return completion

    def abort(self, prompts):
        self.aborted += [prompt.id for prompt in prompts]

    def hold(self, *, release=False):
        pass

    def update_weights(self, weights, *, version):
        self.version = version

    def adopt(self, version):
        self.version = version

    def fingerprints(self):
        return {"w": 1}

    def prompt_logprobs(self, token_ids):
        return [0.0] * (len(token_ids) - 1)

    def close(self):
        pass


class NoJournal:
    """Remembers nothing."""

    def find(self, key):
        return None

    def append(self, entries):
        pass

    def begin(self, version):
        pass
