"""What all engines share of a sampling call: checks before it, completions and faults after it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence, Set
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from rl.types import Completion, FinishReason, Group, Prompt, SamplingParams, VersionSpan
from rollout.engine import WEIGHTS_UNKNOWN, Engine, EngineError

Sampled = tuple[dict[tuple[int, int], Completion], dict[int, str]]
"""(index of the prompt, of the completion) -> completion, and index of the prompt -> why it failed."""


def completion(
    token_ids: list[int], logprobs: list[float], reason: FinishReason, spans: list[VersionSpan]
) -> Completion:
    """A completion without its text."""
    return Completion(token_ids, logprobs, [True] * len(token_ids), reason, spans)


def version_spans(versions: Sequence[int], ends: Sequence[int]) -> list[VersionSpan]:
    """Spans of tokens by policy version: `versions[k]` sampled the tokens before index `ends[k]`."""
    spans: list[VersionSpan] = []
    for version, (first, last) in zip(versions, pairwise([0, *ends]), strict=True):
        if spans and spans[-1].policy_version == version:
            spans[-1] = VersionSpan(version, spans[-1].num_tokens + last - first)
        elif last > first:
            spans.append(VersionSpan(version, last - first))
    return spans


def completion_routes(rows: np.ndarray | None, num_tokens: int) -> np.ndarray | None:
    """Experts of each completion token, [tokens, layers, K] of int8 where they fit; -1: unknown.

    Args:
        rows: experts of the last prompt token and of each completion token except the last, which no model
            call has read. A row comes from the call that sampled the next token, so both have one version.

    Raises:
        EngineError: there are not as many rows as tokens.
    """
    if rows is None or num_tokens == 0:
        return None
    if len(rows) != num_tokens:
        raise EngineError(
            f"the engine gave the experts of {len(rows)} tokens for {num_tokens} sampled ones, but it must "
            f"give as many; use moe.replay=none"
        )
    routes = np.full((num_tokens, *rows.shape[1:]), -1, np.int8 if rows.max(initial=0) < 128 else np.int16)
    routes[:-1] = rows[1:]
    return routes


def aborted() -> Completion:
    return Completion([], [], [], "abort", [])


def decode_texts(tokenizer: Any, completions: Sequence[Completion], stop: Sequence[str] = ()) -> None:
    """Cuts completions at stop strings, and fills in their texts, without end and pad tokens at the end.

    Other special tokens stay: graders look for `<think>` or a channel's name.
    """
    made = [c for c in completions if c.token_ids]
    if not made:
        return
    special = special_ids(tokenizer)
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    ids = [c.token_ids if _cut_at_stop(c, tokenizer, stop) else _without_ends(c, ends, special) for c in made]
    for c, text in zip(made, tokenizer.batch_decode(ids, skip_special_tokens=False), strict=True):
        c.text = text


def _cut_at_stop(c: Completion, tokenizer: Any, stop: Sequence[str]) -> bool:
    """Cuts a completion after the token that completes its first stop string; returns whether it was cut.

    It was sampled up to its end id or length limit, so nothing that the sampler computes depends on text, and
    every engine cuts alike. The string and the rest of that token stay. An aborted one is left as it is.
    """

    def holds(num: int) -> bool:
        text = tokenizer.decode(c.token_ids[:num], skip_special_tokens=False)
        return any(string in text for string in stop)

    if not stop or c.finish_reason == "abort" or not holds(len(c.token_ids)):
        return False
    # The fewest tokens whose text holds one of the strings.
    num_kept = bisect_left(range(len(c.token_ids)), True, lo=1, key=holds)
    ends = [min(end, num_kept) for end in accumulate(span.num_tokens for span in c.version_spans)]
    c.token_ids, c.loss_mask = c.token_ids[:num_kept], c.loss_mask[:num_kept]
    c.behavior_logprobs = c.behavior_logprobs[:num_kept]
    c.routes = None if c.routes is None else c.routes[:num_kept]
    c.version_spans = version_spans([span.policy_version for span in c.version_spans], ends)
    c.finish_reason = "stop"
    return True


def special_ids(tokenizer: Any) -> set[int]:
    """Ids that are special by name, and those that only the vocabulary marks as special."""
    try:
        marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    except NotImplementedError:  # Mistral's own tokenizer
        marked = set()
    return marked | set(tokenizer.all_special_ids)


def _without_ends(c: Completion, ends: Set[int | None], special: Set[int]) -> list[int]:
    """The ids up to the end-of-turn token that stopped the completion, and padding before it."""
    length = len(c.token_ids)
    if c.finish_reason == "stop" and c.token_ids[-1] in special:
        length -= 1
    while length and c.token_ids[length - 1] in ends:
        length -= 1
    return c.token_ids[:length]


def check_weights(engine: Engine) -> None:
    if engine.version == WEIGHTS_UNKNOWN:
        raise EngineError(
            f"the weights of engine {engine.name} are unknown, since an update broke off; update them again"
        )


def prompt_faults(
    prompts: Sequence[Prompt], sampling: SamplingParams, *, vocab_size: int, room: int | None
) -> dict[int, str]:
    """Index -> why this prompt cannot be sampled: no tokens, unknown ids, or no room for the completion."""
    faults = {}
    for index, prompt in enumerate(prompts):
        length = len(prompt.token_ids)
        if length == 0:
            faults[index] = f"prompt {prompt.id} has no tokens"
        elif not 0 <= min(prompt.token_ids) <= max(prompt.token_ids) < vocab_size:
            faults[index] = f"prompt {prompt.id} has ids outside the vocabulary of {vocab_size}"
        elif room is not None and length + sampling.max_completion_length > room:
            faults[index] = (
                f"prompt {prompt.id} has {length} tokens, with max_completion_length="
                f"{sampling.max_completion_length} more than the model's {room} positions"
            )
    return faults


def check_groups(groups: Sequence[Group], faults: Mapping[int, str], timeout_s: float, *, late: bool) -> None:
    """Raises EngineError if no completion of the call is usable; single failures are data."""
    if any(c.finish_reason != "abort" for group in groups for c in group.completions) or not groups:
        return
    if late:
        raise EngineError(
            f"no completion of {len(groups)} prompts was finished within timeout_s={timeout_s:g}; sample "
            "fewer or shorter completions, or raise engine.timeout_s"
        )
    first = next(iter(faults.values()), "the model's logits are not finite")
    raise EngineError(f"all completions of {len(groups)} prompts failed; the first reason: {first}")
