"""Packs groups and advantages into micro-batches of a token budget, with shared prompts and no padding.

A token's column is the token itself. `predecessors_L` says which column a causal policy predicts it from (the
last prompt token for the first token of every completion). So the shift happens once, here, and a
bidirectional policy ignores it. Nothing writes to a batch once it is packed.

Weights are global: every token carries its share of the loss of the whole optimizer step, over all processes.
So sums over micro-batches and processes are exact, however the work is cut.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os.path import commonprefix

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rl.model.packed import Block, Layout, branches_of, even_bins, padded_bins
from rl.model.varlen_plan import whole_numbers
from rl.types import Advantage, Completion, Prompt, ScoredGroup

SumOverProcesses = Callable[[list[float]], list[float]]
IDLE = Prompt("idle", "", (0,))
"""The prompt of rows that only keep collective model calls in step, and count nowhere."""


@dataclass(frozen=True)
class Row:
    """A row to train on: a completion, or one of several rows of an episode.

    Attributes:
        group_index, index: its episode, which counts as one sequence in denominators and sequence losses.
        weight, part: weight of each of its loss tokens; number of the row within its episode.
        num_episode_tokens: loss tokens of all rows of the episode.
        num_context: tokens with which the completion begins that are the end of the row's own prompt.
    """

    prompt: Prompt
    completion: Completion
    group_index: int
    index: int
    advantage: Advantage
    weight: float = 0.0
    in_loss: bool = True
    part: int = 0
    num_episode_tokens: int = 0
    num_context: int = 0

    @property
    def episode(self) -> tuple[int, int]:
        return self.group_index, self.index

    @property
    def num_loss_tokens(self) -> int:
        return sum(self.completion.loss_mask) if self.in_loss else 0

    @property
    def loss_advantages(self) -> list[float]:
        """One per loss token."""
        a, mask = self.advantage, self.completion.loss_mask
        if isinstance(a, float | int):
            return [float(a)] * sum(mask)
        return [value for value, counts in zip(a, mask, strict=True) if counts]


@dataclass
class MicroBatch:
    """The input of a forward pass: N packed tokens, L of them in the loss, from S whole episodes.

    Attributes:
        token_ids_N, positions_N: the packed row; positions restart at a prompt and run on in completions.
        blocks: prompts and their completions, in column order.
        columns_L, predecessors_L: column of each loss token, and of the token it is predicted from.
        sequence_ids_L: which of the S episodes a loss token belongs to, 0..S-1.
        weights_L: a token's share of the step's loss.
        behavior_logprobs_L: the engine's log-probs, or None if the call did not ask for them.
        rows: the rows in column order, for a policy that needs more than the packed row.
    """

    token_ids_N: Int[Tensor, " N"]
    positions_N: Int[Tensor, " N"]
    blocks: tuple[Block, ...]
    columns_L: Int[Tensor, " L"]
    predecessors_L: Int[Tensor, " L"]
    sequence_ids_L: Int[Tensor, " L"]
    advantages_L: Float[Tensor, " L"]
    weights_L: Float[Tensor, " L"]
    behavior_logprobs_L: Float[Tensor, " L"] | None
    num_sequences: int
    rows: tuple[Row, ...] = field(default=(), repr=False)

    @property
    def targets_L(self) -> Int[Tensor, " L"]:
        return self.token_ids_N[self.columns_L]

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.blocks, self.token_ids_N.device)

    def sequences(self) -> Iterator[tuple[Int[Tensor, " T"], int, int]]:
        """For each row: its ids, how many of them it shares with others, and its own first column."""
        ids = self.token_ids_N
        for block in self.blocks:
            for shared, own in block.columns:
                given = [ids[block.start : block.completion_start], ids[shared.start : shared.stop]]
                row = torch.cat([*given, ids[own.start : own.stop]])
                yield row, len(row) - len(own), own.start

    def to(self, device: torch.device) -> MicroBatch:
        tensors = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


@dataclass
class Batch:
    """What one optimizer step trains on: the micro-batches of this process, and counts over all processes.

    Attributes:
        num_sequences: completions in the denominators, rows without signal included.
        num_loss_tokens: loss tokens of these completions.
    """

    micro_batches: list[MicroBatch]
    num_sequences: float
    num_loss_tokens: float


@dataclass(frozen=True)
class PackRules:
    """How a step is packed.

    Attributes:
        row_weight: (loss tokens of the row, sequences of the step, loss tokens of the step, loss tokens of an
            average step of this batch) -> weight of each of the row's loss tokens.
        skip_without_signal: leave out rows with advantage 0 (right only without KL and entropy terms).
        mask_truncated: completions cut by the length limit have no loss tokens.
        share_prompts: completions of a group share one copy of the prompt. Else each has its own, which
            counts in the budget, and so does padding: for a policy that cannot pack rows.
    """

    token_budget: int
    row_weight: Callable[[int, float, float, float], float]
    num_minibatches: int = 1
    skip_without_signal: bool = True
    mask_truncated: bool = False
    share_prompts: bool = True


def idle_micro_batch() -> MicroBatch:
    """One token of weight 0 after a prompt of one token: a forward pass that changes nothing."""
    row = Row(IDLE, Completion([0], [0.0], [True], "stop", []), 0, 0, 0.0)
    return micro_batch_of([[row]])


def pack(
    groups: Sequence[ScoredGroup],
    advantages: Sequence[Sequence[Advantage]],
    rules: PackRules,
    *,
    sum_over_processes: SumOverProcesses = list,
    minibatch_of: Sequence[int] | None = None,
) -> list[Batch]:
    """One Batch per optimizer step of a pass. Minibatch m takes the m-th contiguous share of the groups, or
    those that `minibatch_of` assigns to it.

    Aborted and empty completions are in no denominator. A sequence above the budget gets its own micro-batch.
    """
    assert minibatch_of or len(groups) % rules.num_minibatches == 0, "no equal minibatches (check_processes)"
    share = len(groups) // rules.num_minibatches
    minibatch_of = [i // share for i in range(len(groups))] if minibatch_of is None else minibatch_of
    rows = list(_rows(groups, advantages, rules))
    parts = [[r for r in rows if minibatch_of[r.group_index] == m] for m in range(rules.num_minibatches)]
    mine = ((sum(r.part == 0 for r in rows), sum(r.num_loss_tokens for r in rows)) for rows in parts)
    counts = sum_over_processes([float(n) for pair in mine for n in pair])
    tokens_per_step = sum(counts[1::2]) / rules.num_minibatches
    pairs = zip(counts[::2], counts[1::2], strict=True)
    return [
        _batch(rows, rules, num_sequences=num, num_tokens=tokens, tokens_per_step=tokens_per_step)
        for rows, (num, tokens) in zip(parts, pairs, strict=True)
    ]


def _rows(
    groups: Sequence[ScoredGroup], advantages: Sequence[Sequence[Advantage]], rules: PackRules
) -> Iterator[Row]:
    for i, (group, of_group) in enumerate(zip(groups, advantages, strict=True)):
        others = [c.prompt_token_ids for made in group.completions for c in made.continuations]
        shared = commonprefix([group.prompt.token_ids, *others])  # noqa: RUF071  of tuples
        is_shared = rules.share_prompts and others and 2 * len(shared) > len(group.prompt.token_ids)
        for g, (completion, advantage) in enumerate(zip(group.completions, of_group, strict=True)):
            if completion.finish_reason != "abort" and completion.token_ids:
                number = sum(len(row.token_ids) for row in completion.rows)
                is_one = isinstance(advantage, float | int)
                assert is_one or len(advantage) == number, f"{len(advantage)} advantages of {number} tokens"
                in_loss = not (rules.mask_truncated and completion.finish_reason == "length")
                of_episode = {"in_loss": in_loss, "num_episode_tokens": completion.num_sampled * in_loss}
                further = (c.prompt_token_ids for c in completion.continuations)
                prompts = [group.prompt, *(replace(group.prompt, token_ids=ids) for ids in further)]
                begin = 0
                for part, (prompt, row) in enumerate(zip(prompts, completion.rows, strict=True)):
                    end = begin + len(row.token_ids)
                    own = advantage if is_one else advantage[begin:end]
                    made = Row(prompt, row, i, g, own, part=part, **of_episode)
                    yield _behind(replace(prompt, token_ids=shared), made) if is_shared else made
                    begin = end


def _behind(prompt: Prompt, row: Row) -> Row:
    """The row with `prompt`, with which its own prompt begins; the rest of that becomes context."""
    context = list(row.prompt.token_ids[len(prompt.token_ids) :])
    own, advantage, number = row.completion, row.advantage, len(context)
    longer = replace(own, token_ids=context + own.token_ids, loss_mask=[False] * number + own.loss_mask)
    if own.behavior_logprobs:
        longer.behavior_logprobs = [0.0] * number + own.behavior_logprobs
    if own.routes is not None:
        longer.routes = np.pad(own.routes, ((number, 0), (0, 0), (0, 0)), constant_values=-1)
    if not isinstance(advantage, float | int):
        advantage = [0.0] * number + list(advantage)
    return replace(row, prompt=prompt, completion=longer, advantage=advantage, num_context=number)


def _batch(
    rows: list[Row], rules: PackRules, *, num_sequences: float, num_tokens: float, tokens_per_step: float
) -> Batch:
    teaching = {row.episode for row in rows if not rules.skip_without_signal or any(row.loss_advantages)}
    numbers = num_sequences, num_tokens, tokens_per_step
    kept = [
        replace(row, weight=rules.row_weight(row.num_episode_tokens, *numbers))
        for row in rows
        if row.num_loss_tokens and row.episode in teaching
    ]
    return Batch([*map(micro_batch_of, _bins(_parcels(kept, rules), rules))], num_sequences, num_tokens)


def _parcels(rows: list[Row], rules: PackRules) -> list[list[list[Row]]]:
    """Blocks that belong into one micro-batch: one by one, but all of an episode with several prompts."""
    episodes: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        episodes.setdefault(row.episode, []).append(row)
    single, several = list[list[Row]](), list[list[Row]]()
    for own in episodes.values():
        is_single = rules.share_prompts and len({row.prompt.token_ids for row in own}) == 1
        (single if is_single else several).append(own)
    blocks = _blocks(single, rules.token_budget)
    return [*([block] for block in blocks), *([[row] for row in own] for own in several)]


def _blocks(episodes: list[list[Row]], token_budget: int) -> list[list[Row]]:
    """Episodes of one group side by side, cut where their rows and the prompt would exceed the budget."""
    blocks, size, current = list[list[Row]](), 0, None
    for rows in episodes:
        prompt, length = rows[0].prompt.token_ids, sum(_block_of(rows).completion_lengths)
        if (rows[0].group_index, prompt) != current or size + length > token_budget:
            blocks.append([])
            size, current = len(prompt), (rows[0].group_index, prompt)
        blocks[-1] += rows
        size += length
    return blocks


def _bins(parcels: list[list[list[Row]]], rules: PackRules) -> list[list[list[Row]]]:
    """Parcels of each micro-batch: filled evenly, or rows without shared prompts side by side."""
    widths = [[_block_of(rows).end for rows in parcel] for parcel in parcels]
    if rules.share_prompts:
        bins = even_bins([*map(sum, widths)], rules.token_budget)
    else:
        bins = padded_bins([(max(own), len(own)) for own in widths], rules.token_budget)
    return [[block for i in bin_ for block in parcels[i]] for bin_ in bins]


def _block_of(rows: list[Row], start: int = 0) -> Block:
    lengths = [len(row.completion.token_ids) for row in rows]
    contexts = [row.completion.token_ids[: row.num_context] for row in rows]
    branches = branches_of([row.episode for row in rows], contexts)
    return Block.of(start, len(rows[0].prompt.token_ids), lengths, branches)


def micro_batch_of(bin_: list[list[Row]]) -> MicroBatch:
    token_ids, positions, columns, predecessors, sequence_ids = (list[int]() for _ in range(5))
    advantages, weights, behavior = (list[float]() for _ in range(3))
    blocks: list[Block] = []
    numbers: dict[tuple[int, int], int] = {}
    for rows in bin_:
        prompt = rows[0].prompt.token_ids
        block = _block_of(rows, start=len(token_ids))
        blocks.append(block)
        token_ids += prompt
        last_prompt_column = len(token_ids) - 1
        positions += range(len(prompt))
        for row, (shared, own) in zip(rows, block.columns, strict=True):
            ids, given, columns_T = row.completion.token_ids, len(shared), [*shared, *own]
            scored = [t for t, counts in enumerate(row.completion.loss_mask) if counts]
            columns += [columns_T[t] for t in scored]
            predecessors += [columns_T[t - 1] if t else last_prompt_column for t in scored]
            sequence_ids += [numbers.setdefault(row.episode, len(numbers))] * len(scored)
            advantages += row.loss_advantages
            weights += [row.weight] * len(scored)
            if row.completion.behavior_logprobs:
                behavior += [row.completion.behavior_logprobs[t] for t in scored]
            token_ids += ids[given:]
            positions += range(len(prompt) + given, len(prompt) + len(ids))
    if behavior and len(behavior) != len(columns):
        raise ValueError(
            "some completions of a batch lack behavior log-probs; ask the engine for all of them or for none"
        )
    return MicroBatch(
        token_ids_N=whole_numbers(token_ids),
        positions_N=whole_numbers(positions),
        blocks=tuple(blocks),
        columns_L=whole_numbers(columns),
        predecessors_L=whole_numbers(predecessors),
        sequence_ids_L=whole_numbers(sequence_ids),
        advantages_L=_numbers(advantages),
        weights_L=_numbers(weights),
        behavior_logprobs_L=_numbers(behavior) if behavior else None,
        num_sequences=len(numbers),
        rows=tuple(row for rows in bin_ for row in rows),
    )


def _numbers(values: list[float]) -> Float[Tensor, " N"]:
    exact = torch.frombuffer(array("d", values), dtype=torch.float64) if values else torch.empty(0)
    return exact.to(torch.get_default_dtype())
