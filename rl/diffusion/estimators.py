"""Estimates of a completion's log-prob for RL, since a masked diffusion model cannot compute it.

Every estimator draws noised copies of a sequence. They are data, so that old, current and reference policy
see the same masks. From the log-probs of masked tokens it makes one number per loss token:

    one_step   log p(token | prompt, nothing of the completion)                 d1 arXiv:2504.12216, wd1
    elbo       the sequence's ELBO over its length, the same for every token:   ESPO arXiv:2512.03759
               any loss of tokens is then one of sequences
    sandwich   the token's share of the ELBO; where the advantage is negative,  SPG arXiv:2510.09541
               mixed with its share of an upper bound
    trace      log p(token | the canvas at the step that committed it)          TraceRL arXiv:2509.06949,
               with blocks of one column the exact log-prob from left to right  JustGRPO

Only `elbo` and the `trace` of a left-to-right sampler estimate a bound, or the value, of the log-likelihood
without bias. `one_step` is far off by design: it ignores what tokens of a completion say about each other.

Copies see the prompt, the completion and masks for the rest of the canvas. Tokens that the sampler wrote
after the end are not part of the completion; masking averages them out. `trace` shows them as they were.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from rl.batch import MicroBatch, Row
from rl.config.diffusion_rl import EstimatorConfig
from rl.diffusion.elbo import PlanRow, Scorer, pack_plan
from rl.diffusion.objectives import Example, Noised, make_plan, step_generator


@dataclass(frozen=True)
class Plan:
    """The copies of a micro-batch's sequences in packed rows; for each row, `slots` says which of the L loss
    tokens its scored columns are. `idle` rows change nothing; they keep collective model calls in step.
    """

    rows: list[PlanRow]
    slots: list[Int[Tensor, " _"]]
    idle: tuple[PlanRow, ...] = ()


@dataclass(frozen=True)
class Scored:
    """K scored tokens of a plan: log-prob and entropy (nats), weight, and which loss token it is."""

    logprobs_K: Float[Tensor, " K"]
    entropies_K: Float[Tensor, " K"]
    weights_K: Float[Tensor, " K"]
    slots_K: Int[Tensor, " K"]


def draw_plan(
    batch: MicroBatch,
    config: EstimatorConfig,
    *,
    draw: int,
    mask_token_id: int,
    seed: int,
    token_budget: int,
    repeats: Mapping[tuple[int, int], int] | None = None,
) -> Plan:
    """Masks for every sequence of a micro-batch: a function of seed, sequence and `draw` only.

    Args:
        repeats: `count_repeats` of the whole step; default: of this micro-batch.

    Raises:
        ValueError: `trace` lacks the sampler's trace, or a sequence contains the mask token.
    """
    copies: list[Noised] = []
    tables: list[Tensor] = []
    first = 0
    repeats = count_repeats(batch.rows) if repeats is None else repeats
    for index, row in enumerate(batch.rows):
        repeat = repeats[row.group_index, row.index]
        generator = step_generator(seed, _fingerprint(row, repeat, draw))
        drawn = COPIES[config.name](row, config, mask_token_id, generator)
        copies += [replace(copy, example=index) for copy in drawn]
        counts = torch.tensor(row.completion.loss_mask)
        tables.append(counts.cumsum(0) - 1 + first)
        first += int(counts.sum())
    starts = torch.tensor([0, *(len(t) for t in tables[:-1])]).cumsum(0)
    starts -= torch.tensor([len(row.prompt.token_ids) for row in batch.rows])
    table, packed = torch.cat(tables), pack_plan(copies, token_budget)
    slots = [table[starts[p.examples_L] + p.documents.positions_N[p.columns_L]] for p in packed]
    device = batch.token_ids_N.device
    return Plan([p.to(device) for p in packed], [s.to(device) for s in slots])


def count_repeats(rows: Iterable[Row]) -> dict[tuple[int, int], int]:
    """(group, index in it) -> the number of earlier completions of the group that are equal to it."""
    seen: Counter[tuple[int, tuple[int, ...]]] = Counter()
    found = {}
    for row in sorted(rows, key=lambda row: (row.group_index, row.index)):
        key = (row.group_index, tuple(row.completion.token_ids))
        found[row.group_index, row.index], seen[key] = seen[key], seen[key] + 1
    return found


def score(
    scorer: Scorer, plan: Plan, batch: MicroBatch, config: EstimatorConfig, *, temperature: float = 1.0
) -> tuple[Float[Tensor, " L"], Float[Tensor, " L"]]:
    """The estimate of each loss token and the mean entropy of the distributions it was scored under.

    With several rows, the backward pass recomputes each row instead of keeping it. So memory holds one row,
    however many copies a sequence has.
    """

    def of_row(row: PlanRow) -> tuple[Tensor, Tensor]:
        return scorer(row.token_ids_N, row.documents, row.columns_L, row.targets_L, temperature)

    rows = [*plan.rows, *plan.idle]
    many = len(rows) > 1 and torch.is_grad_enabled()
    every = [checkpoint(of_row, row, use_reentrant=False) if many else of_row(row) for row in rows]
    found, idle = every[: len(plan.rows)], every[len(plan.rows) :]
    nothing = sum(0.0 * logprobs.sum() for logprobs, _ in idle)
    scored = Scored(
        torch.cat([logprobs for logprobs, _ in found]),
        torch.cat([entropies for _, entropies in found]),
        torch.cat([row.weights_L for row in plan.rows]),
        torch.cat(plan.slots),
    )
    estimates_L = COMBINE[config.name](scored, batch, config) + nothing
    return estimates_L, _mean_entropies(scored, len(batch.columns_L))


# Copies of one sequence.


def one_step_copies(row: Row, config: EstimatorConfig, mask: int, generator: torch.Generator) -> list[Noised]:
    """Copies with the whole completion masked, and each prompt token with probability `prompt_mask`."""
    ids, scored = _canvas(row, mask), _scored_columns(row)
    masked = partial(_masked_prompt, row=row, config=config, mask=mask, generator=generator)
    copies = []
    for _ in range(config.num_draws):
        noisy = masked(ids).index_fill(0, scored, mask)
        weights = torch.full((len(scored),), 1.0 / config.num_draws)
        copies.append(Noised(0, noisy, scored, ids[scored], weights))
    return copies


def bound_copies(row: Row, config: EstimatorConfig, mask: int, generator: torch.Generator) -> list[Noised]:
    """Copies with coupled masks: each token is scored once per draw, in one of two complementary masks."""
    ids, length = _canvas(row, mask), len(row.prompt.token_ids) + len(row.completion.token_ids)
    maskable = torch.zeros(length, dtype=torch.bool).index_fill(0, _scored_columns(row), True)
    example = Example(ids[:length], maskable)
    plan = make_plan([example], generator, mask_token_id=mask, num_draws=config.num_draws)
    masked = partial(_masked_prompt, row=row, config=config, mask=mask, generator=generator)
    return [replace(copy, token_ids_T=masked(torch.cat([copy.token_ids_T, ids[length:]]))) for copy in plan]


def trace_copies(row: Row, config: EstimatorConfig, mask: int, generator: torch.Generator) -> list[Noised]:
    """A canvas for each step that committed a token of the completion (or for `merge` steps together).

    If there are more than `max_canvases`, that many are drawn, and weigh more. ValueError without a trace.
    """
    trace, prompt = row.completion.facts.get("trace"), list(row.prompt.token_ids)
    if trace is None:
        raise ValueError(
            f"diffusion.estimator.name=trace needs the sampler's commit steps, but a completion of prompt "
            f"{row.prompt.id} has none; sample with the diffusion engine"
        )
    ids = torch.tensor([*prompt, *row.completion.token_ids, *trace["tail_ids"]])
    turns = torch.cat([torch.full((len(prompt),), -1), torch.tensor(trace["steps"]) // config.merge])
    scored = _scored_columns(row)
    canvases = turns[scored].unique()
    weight = 1.0
    if config.max_canvases is not None and len(canvases) > config.max_canvases:
        weight = len(canvases) / config.max_canvases
        canvases = canvases[torch.randperm(len(canvases), generator=generator)[: config.max_canvases]]
    copies = []
    for turn in canvases.tolist():
        columns = scored[turns[scored] == turn]
        noisy = ids.where(turns < turn, mask)
        copies.append(Noised(0, noisy, columns, ids[columns], torch.full((len(columns),), weight)))
    return copies


Copies = Callable[[Row, EstimatorConfig, int, torch.Generator], list[Noised]]
COPIES: dict[str, Copies] = {
    "one_step": one_step_copies,
    "elbo": bound_copies,
    "sandwich": bound_copies,
    "trace": trace_copies,
}


# From scored tokens to one number per loss token.


def summed(scored: Scored, batch: MicroBatch, config: EstimatorConfig) -> Float[Tensor, " L"]:
    """sum of weight * log p over the copies that score a token."""
    return _sums(scored.weights_K * scored.logprobs_K, scored.slots_K, len(batch.columns_L))


def sequence_mean(scored: Scored, batch: MicroBatch, config: EstimatorConfig) -> Float[Tensor, " L"]:
    """ELBO / length of a token's sequence."""
    shares_L = summed(scored, batch, config)
    ids_L, num_sequences = batch.sequence_ids_L, batch.num_sequences
    totals_S = _sums(shares_L, ids_L, num_sequences)
    return (totals_S / ids_L.bincount(minlength=num_sequences).clamp(min=1))[ids_L]


def sandwiched(scored: Scored, batch: MicroBatch, config: EstimatorConfig) -> Float[Tensor, " L"]:
    """sum w log p if the advantage is not negative; else (1 - mix) of it plus mix / beta log sum w p^beta.

    With many draws the second term is an upper bound (Jensen's inequality). With few, the log of a sum is
    too low on average; with one it is log p itself, without beta. SPG masks in blocks, this estimator in all
    of the completion.
    """
    lower_L = summed(scored, batch, config)
    greatest_L = torch.full_like(lower_L, -torch.inf).scatter_reduce(
        0, scored.slots_K, scored.logprobs_K.detach(), "amax"
    )
    powers_K = scored.weights_K * (config.beta * (scored.logprobs_K - greatest_L[scored.slots_K])).exp()
    sums_L = _sums(powers_K, scored.slots_K, len(lower_L))
    upper_L = greatest_L + sums_L.log() / config.beta
    return torch.where(batch.advantages_L < 0, torch.lerp(lower_L, upper_L, config.mix), lower_L)


def traced(scored: Scored, batch: MicroBatch, config: EstimatorConfig) -> Float[Tensor, " L"]:
    """log p at the step that committed the token; the weight multiplies only its gradient.

    A token of a canvas that was not drawn has the sampler's own log-prob, and no gradient. The sampler never
    draws the mask token, but this log p leaves it its probability. Where that is not small, as before any
    training, `loss.sampler_correction` sees the difference.
    """
    behavior_L = batch.behavior_logprobs_L
    values_K = scored.logprobs_K.detach()
    values_K = values_K + scored.weights_K * (scored.logprobs_K - values_K)
    rest_L = values_K.new_zeros(len(batch.columns_L)) if behavior_L is None else behavior_L.to(values_K.dtype)
    return rest_L.index_put((scored.slots_K,), values_K)


Combine = Callable[[Scored, MicroBatch, EstimatorConfig], Tensor]
COMBINE: dict[str, Combine] = {
    "one_step": summed,
    "elbo": sequence_mean,
    "sandwich": sandwiched,
    "trace": traced,
}


def _sums(values_K: Tensor, owners_K: Tensor, size: int) -> Tensor:
    return values_K.new_zeros(size).index_add(0, owners_K, values_K)


def _mean_entropies(scored: Scored, num_tokens: int) -> Float[Tensor, " L"]:
    """Mean entropy per token; tokens that were not scored get the mean of the others."""
    sums_L = _sums(scored.entropies_K, scored.slots_K, num_tokens)
    counts_L = scored.slots_K.bincount(minlength=num_tokens)
    return torch.where(counts_L > 0, sums_L / counts_L.clamp(min=1), scored.entropies_K.detach().mean())


def _canvas(row: Row, mask: int) -> Int[Tensor, " T"]:
    """Prompt, completion, and masks for the rest of the sampler's canvas."""
    trace = row.completion.facts.get("trace")
    rest = len(trace["tail_ids"]) if trace is not None else 0
    return torch.tensor([*row.prompt.token_ids, *row.completion.token_ids, *[mask] * rest])


def _scored_columns(row: Row) -> Int[Tensor, " n"]:
    return torch.tensor(row.completion.loss_mask).nonzero().squeeze(-1) + len(row.prompt.token_ids)


def _masked_prompt(
    ids_T: Tensor, *, row: Row, config: EstimatorConfig, mask: int, generator: torch.Generator
) -> Int[Tensor, " T"]:
    if not config.prompt_mask:
        return ids_T
    hit = torch.rand(len(row.prompt.token_ids), generator=generator) < config.prompt_mask
    return ids_T.masked_fill(pad(hit, (0, len(ids_T) - len(hit))), mask)


def _fingerprint(row: Row, repeat: int, draw: int) -> int:
    """A 62-bit hash of the sequence and the policy version that wrote it, so that masks do not depend on
    packing or process. Equal completions of a group get different masks.
    """
    numbers = [row.completion.policy_version, repeat, draw]
    words = [numbers, list(row.prompt.token_ids), list(row.completion.token_ids)]
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2
