"""A pass of the largest size before step 0, so that a run that does not fit fails at once."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from rl.batch import PackRules, pack
from rl.causal import CausalPolicy
from rl.config import Config
from rl.model.loading import num_ids
from rl.model.varlen_plan import MOST_KEYS
from rl.plan.memory import GIB, OVERHEAD_BYTES, takes_share
from rl.policy import Reference
from rl.teacher import Teacher
from rl.types import Completion, Continuation, Group, Prompt, Reward, ScoredGroup, VersionSpan

Scored = tuple[list[ScoredGroup], Sequence[Sequence[float]]]


def probe(
    policy: CausalPolicy,
    config: Config,
    *,
    rules: PackRules,
    reference: Reference | None,
    teacher: Teacher | None = None,
) -> int:
    """Does two passes over a full micro-batch of the longest completions, the second while gradients of the
    first are held, and one over each other of the `largest`; returns the peak in bytes. No weight, moment or
    generator is changed.

    Raises:
        ValueError: they do not fit, alone or beside the engine that will start; names settings to try.
    """
    device, budget = policy.device, config.token_budget
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    vocabulary = num_ids(policy.model)
    packed = [pack(*groups, rules)[0] for groups in largest(config, rules, vocabulary)]
    first, *others = (policy.prepare(batch, draw=0)[0] for batch in packed)
    try:
        copies = 0 if config.memory.optimizer_on_host is True else 2
        moments = [torch.empty_like(p) for _, p in policy.trainable() for _ in range(copies)]
        for prepared in (first, first, *others):
            if reference is not None:
                reference.logprobs(prepared)
            ids_LK = None if teacher is None else teacher.score(prepared).ids_LK
            scores = policy.score(prepared, ids_LK=ids_LK)
            loss = scores.logprobs_L.sum() + config.loss.entropy_coef * scores.entropy_L.sum()
            if scores.logprobs_LK is not None and scores.rest_L is not None:
                loss = loss + scores.logprobs_LK.sum() + scores.rest_L.sum()
            policy.backward(loss, last=False)
            del scores, loss
        held = torch.cuda.max_memory_allocated(device)
        del moments
    except torch.OutOfMemoryError:
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        raise ValueError(
            f"train.token_budget={budget} with completions of {config.sampling.max_completion_length} tokens "
            f"does not fit into {free / GIB:.0f} GiB; use train.token_budget={budget // 2}, "
            "model.gradient_checkpointing=true or model.lora (cohort plan CONFIG shows what fits)"
        ) from None
    finally:
        for _, parameter in policy.trainable():
            parameter.grad = None
        torch.cuda.empty_cache()
    _check_beside_engine(config, held, torch.cuda.mem_get_info(device)[1])
    return held


def _check_beside_engine(config: Config, held: int, total: int) -> None:
    share = config.engine.gpu_share if takes_share(config) else 0.0
    if config.memory.engine_sleeps is True:
        share = min(share, 2 * OVERHEAD_BYTES / total)  # what a sleeping engine keeps
    left = total - held - OVERHEAD_BYTES
    if share * total > left:
        raise ValueError(
            f"a full micro-batch of train.token_budget={config.token_budget} holds {held / GIB:.1f} GiB, and "
            f"with engine.gpu_memory_utilization={share:g} the engine takes {share * total / GIB:.1f} of "
            f"{total / GIB:.0f}; use engine.gpu_memory_utilization={max(left, 0) / total:.2f} or less, or a "
            "smaller train.token_budget"
        )


def largest(config: Config, rules: PackRules, vocabulary: int) -> Iterator[Scored]:
    """Groups of full micro-batches, one of the first: the longest prompt, as many of the longest completions
    as fit, and a shorter one in the remaining room.

    In the second, completions are so short that they copy about `MOST_KEYS` keys for each column. Rows of
    trees copy no more. Rows without shared prompts are one more instead, so wide that they fill the budget.
    The third is an episode of several rows, if it exceeds the budget.
    """
    draw, rows = random.Random(0), config.rows_of_episode
    length, prompt_length = config.sampling.max_completion_length, config.data.max_prompt_length
    shared, copied = (prompt_length, 0) if rules.share_prompts else (0, prompt_length)
    room, short = max(rules.token_budget - shared, 0), -(-shared // (MOST_KEYS - 1))
    count, left = divmod(room, copied + length)
    ids = [draw.randrange(vocabulary) for _ in range(max(prompt_length, length))]

    def row(n: int) -> Completion:
        return Completion(ids[:n], [0.0] * n, [True] * n, "stop", [VersionSpan(0, n)])

    def group(answers: list[Completion], given: int = prompt_length) -> Scored:
        made = Group(Prompt("probe", "", tuple(ids[:given])), answers)
        return [ScoredGroup(made, [Reward(0.0)] * len(answers))], [[1.0] * len(answers)]

    rest = [row(left - copied)] if count and left > copied else []
    yield group([row(length)] * max(1, count) + rest)
    if copied and count and (width := room // (count + 1)) > 1:
        given = min(copied, width - 1)
        yield group([row(width - given)] * (count + 1), given)
    if 0 < short < length:
        yield group([row(short)] * max(1, room // short))
    if rows > 1 and rows * (copied + length) > room:
        further = Continuation(tuple(ids[:prompt_length]), row(length))
        yield group([replace(row(length), continuations=[further] * (rows - 1))])
