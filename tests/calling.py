"""A call to an engine from its parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rl.types import Call, Prompt, SamplingParams


def call(
    prompts: Sequence[Prompt],
    *,
    num_completions: int,
    sampling: SamplingParams,
    seeds: Iterable[int],
    with_logprobs: bool = True,
) -> Call:
    return Call(tuple(prompts), num_completions, sampling, tuple(seeds), with_logprobs)


def trace_of(
    steps: list[int], tail_ids: list[int], num_steps: int, pieces: Sequence[str] = ()
) -> dict[str, object]:
    """`facts["trace"]` of a masked diffusion sampler's completion."""
    return {"steps": steps, "tail_ids": tail_ids, "num_steps": num_steps, "pieces": list(pieces)}
