"""A diffusion model as a model of lm-eval (EleutherAI's evaluation harness), which need not be installed.

from lm_eval import simple_evaluate
results = simple_evaluate(model=harness_model(scorer, tokenizer, mask_token_id=...), tasks=["hellaswag"])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rl.diffusion.likelihood import log_likelihoods
from rl.diffusion.model import DiffusionScorer
from rl.diffusion.objectives import Example

Generate = Callable[[Sequence[str], dict[str, Any]], list[str]]
"""Prompts and a request's own arguments (`until`, `max_gen_toks`, ...) to texts; the sampler's."""


class DiffusionHarness:
    """Answers lm-eval's three kinds of requests: log-likelihoods by Algorithm 3, all requests of a call in
    shared rows.

    Args:
        options: of `log_likelihoods`: num_draws (128), scheme, seed, token_budget, reference_batch.
        generate: for tasks that sample; without one they are refused.
        max_length: tokens; a longer context loses its beginning.
    """

    def __init__(
        self,
        scorer: DiffusionScorer,
        tokenizer: Any,
        *,
        mask_token_id: int,
        max_length: int = 4096,
        generate: Generate | None = None,
        **options: Any,
    ) -> None:
        self.scorer, self.tokenizer, self.mask_token_id = scorer, tokenizer, mask_token_id
        self.max_length, self.generate, self.options = max_length, generate, options
        self.tokenizer_name = getattr(tokenizer, "name_or_path", "")
        self.rank, self.world_size = 0, 1

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(bound on log p(continuation | context), False) of each request's (context, continuation).

        A diffusion model has no greedy continuation to compare with, so tasks that count exact matches by
        this second value (LAMBADA's accuracy) must sample instead.
        """
        pairs = [self._split(*request.args) for request in requests]
        return [(value, False) for value in self._score(pairs)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """The bound on log p(text), in pieces of `max_length` tokens that see nothing of each other."""
        pieces, owners = [], []
        for owner, request in enumerate(requests):
            ids = self.tokenizer(request.args[0])["input_ids"]
            for start in range(0, len(ids), self.max_length):
                pieces.append(([], ids[start : start + self.max_length]))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, value in zip(owners, self._score(pieces), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Texts by the sampler, cut at the first of each request's `until`."""
        if self.generate is None:
            raise ValueError(
                "this task samples text and the harness has no sampler; pass generate=, such as one made of "
                "rollout.diffusion"
            )
        texts = []
        for prompt, settings in (request.args for request in requests):
            (text,) = self.generate([prompt], settings)
            until = settings.get("until") or []
            for stop in [until] if isinstance(until, str) else until:
                text = text.split(stop)[0] if stop else text
            texts.append(text)
        return texts

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids on both sides; a context's last spaces belong to the continuation, as in lm-eval."""
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        whole = self.tokenizer(bare + continuation)["input_ids"]
        size = len(self.tokenizer(bare)["input_ids"]) if bare else 0
        return whole[:size], whole[size:]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        examples = []
        for context, continuation in pairs:
            if not continuation or len(continuation) > self.max_length:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens; it needs 1 to {self.max_length} of them"
                )
            context = context[max(0, len(context) + len(continuation) - self.max_length) :]
            ids = torch.tensor([*context, *continuation])
            examples.append(Example(ids, torch.arange(len(ids)) >= len(context)))
        if not examples:
            return []
        return log_likelihoods(
            self.scorer, examples, mask_token_id=self.mask_token_id, **self.options
        ).tolist()


def harness_model(scorer: DiffusionScorer, tokenizer: Any, **settings: Any) -> Any:
    """A `DiffusionHarness` that is also an `lm_eval.api.model.LM`, as `simple_evaluate` demands."""
    try:
        from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("lm-eval is not installed; pip install lm-eval brings it") from None
    adapted = type("DiffusionLM", (DiffusionHarness, LM), {})
    return adapted(scorer, tokenizer, **settings)
