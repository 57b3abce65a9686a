"""A diffusion model for lm-eval (EleutherAI's evaluation harness), which need not be installed.

from lm_eval import simple_evaluate
results = simple_evaluate(model=harness_model(scorer, tokenizer, mask_token_id=...), tasks=["hellaswag"])
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rl.diffusion.likelihood import log_likelihoods
from rl.diffusion.model import DiffusionScorer, is_shifted
from rl.diffusion.objectives import Example
from rl.model.loading import context_length

Generate = Callable[[Sequence[list[int]], dict[str, Any]], list[str]]
"""The sampler: (token ids of prompts, their common settings `until`, `max_gen_toks`, ...) -> texts."""


class DiffusionHarness:
    """Answers lm-eval's three kinds of requests. Log-likelihoods are computed by Algorithm 3, with all
    requests of a call in shared rows.

    Args:
        max_length: most tokens; a longer context loses its beginning. Default: the model's positions.
        generate: the sampler for tasks that sample; without it they are refused.
        gen_length: tokens that `generate` adds to a prompt.
        options: of `log_likelihoods`: num_draws (128), scheme, seed, token_budget, reference_batch.

    Raises:
        ValueError: `max_length` is beyond the model's positions, or `gen_length` leaves no room for a prompt.
    """

    def __init__(
        self,
        scorer: DiffusionScorer,
        tokenizer: Any,
        *,
        mask_token_id: int,
        max_length: int | None = None,
        generate: Generate | None = None,
        gen_length: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()  # LM's, in `harness_model`
        limit = context_length(scorer.model.config) or sys.maxsize
        self.max_length = limit if max_length is None else max_length
        if not 1 <= self.max_length <= limit:
            raise ValueError(f"max_length={max_length}: the model has {limit} positions; use 1 to {limit}")
        if gen_length >= self.max_length:
            raise ValueError(
                f"gen_length={gen_length} leaves no room for a prompt within {self.max_length} tokens; "
                "lower it"
            )
        self.scorer, self.tokenizer, self.mask_token_id = scorer, tokenizer, mask_token_id
        self.generate, self.gen_length, self.options = generate, gen_length, options
        # With the shifted alignment a text's first token has no neighbour that predicts it.
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self._start = [start] if is_shifted(scorer.model) else []

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        return (self.tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as text; without a generation prompt, the model will continue its last message."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(bound on log p(continuation | context), False) of each request's (context, continuation).

        A diffusion model has no greedy continuation to compare with, so tasks that count exact matches by
        this second value (LAMBADA's accuracy) must sample instead.

        Raises:
            ValueError: a continuation has no tokens, or more than `max_length`.
        """
        pairs = []
        for index, request in enumerate(requests):
            context, continuation = encode_pair(self.tokenizer, *request.args)
            context = context or self._start
            room = self.max_length - len(continuation)
            if not continuation or room < len(self._start):
                raise ValueError(
                    f"request {index}: the continuation has {len(continuation)} tokens, but a model with "
                    f"{self.max_length} positions takes 1 to {self.max_length - len(self._start)}; leave "
                    f"this document out: {request.args[1][:60]!r}"
                )
            pairs.append((context, continuation, room))
        self._tell_cut(sum(len(context) > room for context, _, room in pairs), len(pairs))
        return [(v, False) for v in self._score([(last(c, room), rest) for c, rest, room in pairs])]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """The bound on log p(text), in pieces of `max_length` tokens that do not see each other."""
        pieces, owners = [], []
        size = self.max_length - len(self._start)
        for owner, request in enumerate(requests):
            ids = encode(self.tokenizer, request.args[0])
            for start in range(0, len(ids), size):
                pieces.append((self._start, ids[start : start + size]))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, value in zip(owners, self._score(pieces), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Texts by the sampler, cut at the first of each request's `until`. It samples requests with equal
        settings together.
        """
        if self.generate is None:
            raise ValueError(
                "this task samples text, but the harness has no sampler; pass generate=, such as one made "
                "with rollout.diffusion"
            )
        prompts = [encode(self.tokenizer, request.args[0]) for request in requests]
        room = self.max_length - self.gen_length
        self._tell_cut(sum(len(ids) > room for ids in prompts), len(prompts))
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            settings = json.dumps(request.args[1], sort_keys=True, default=str)
            groups.setdefault(settings, []).append(index)
        texts = [""] * len(requests)
        for members in groups.values():
            settings = requests[members[0]].args[1]
            found = self.generate([last(prompts[i], room) for i in members], settings)
            for index, text in zip(members, found, strict=True):
                texts[index] = cut_at(text, settings.get("until") or [])
        return texts

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        examples = []
        for index, (context, continuation) in enumerate(pairs):
            ids = torch.tensor([*context, *continuation])
            if self.mask_token_id in ids:
                raise ValueError(
                    f"request {index} contains the mask token (id {self.mask_token_id}), which the model "
                    f"could not tell from a mask; leave this document out: "
                    f"{self.tokenizer.decode(continuation[:20])!r}"
                )
            examples.append(Example(ids, torch.arange(len(ids)) >= len(context)))
        found = log_likelihoods(self.scorer, examples, mask_token_id=self.mask_token_id, **self.options)
        return found.tolist()

    def _tell_cut(self, num_cut: int, total: int) -> None:
        if num_cut:
            warnings.warn(
                f"{num_cut} of {total} requests do not fit into {self.max_length} tokens; their contexts "
                "lose their beginning",
                stacklevel=3,
            )


def harness_model(scorer: DiffusionScorer, tokenizer: Any, **settings: Any) -> Any:
    """A `DiffusionHarness` that is also an `lm_eval.api.model.LM`, as `simple_evaluate` demands."""
    try:
        from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"lm-eval cannot be imported ({error}); pip install lm-eval==0.4.13 brings it and what it needs"
        ) from None
    adapted = type("DiffusionLM", (DiffusionHarness, LM), {})
    return adapted(scorer, tokenizer, **settings)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids. A text that already begins with the beginning-of-text token (a chat) gets no second one."""
    begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    return tokenizer(text, add_special_tokens=not begun)["input_ids"]


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of both; a context's trailing spaces belong to the continuation, as in lm-eval."""
    bare = context.rstrip()
    whole = encode(tokenizer, context + continuation)
    size = len(encode(tokenizer, bare)) if bare else 0
    return whole[:size], whole[size:]


def last(ids: list[int], room: int) -> list[int]:
    """The last `room` ids."""
    return ids[max(0, len(ids) - room) :]


def cut_at(text: str, until: str | Sequence[str]) -> str:
    """The text up to the first stop string."""
    for stop in [until] if isinstance(until, str) else until:
        text = text.split(stop)[0] if stop else text
    return text
