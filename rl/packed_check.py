"""Settles how a policy reads its rows: packed only where that gives the log-probs of single sequences."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from rl.batch import MicroBatch, Row, micro_batch_of
from rl.model.exactness import EAGER_LIMIT, PROBE_LIMIT, moving_rope, switch_lengths, take_long_factors
from rl.model.loading import context_length, nonfinite_parameters, num_ids, storage_dtype
from rl.types import Completion, Prompt, VersionSpan
from rl.world import World

NUM_BEHIND = 64
OTHER_HEAD = "its output head does more than a linear layer, a scale and a soft cap, and is not supported"


def settle_attention(policy: Any, longest: int | None = None) -> str | None:
    """A method of `CausalPolicy`: it turns packed rows on if their log-probs equal those of single sequences,
    else returns why not.

    Args:
        longest: tokens of the longest sequence that will be trained on.

    Raises:
        ValueError: the head is not a plain linear layer, so log-probs from hidden states would be wrong; or
            attention=packed is not exact; or dynamic rotary frequencies forbid `longest`.
    """
    config, rope = policy.config, moving_rope(policy.model)
    if rope and rope[0] == "longrope" and (longest or 0) > rope[1]:
        take_long_factors(policy.model)
        policy.long_factors, rope = True, None
    if rope and "dynamic" in rope[0]:
        policy.scorer.longest = rope[1]
        policy.scorer.check_length(longest or 0)
    batch = probe_batch(policy.model, longest).to(policy.device)
    policy.scorer.eval()
    with torch.no_grad():
        expected_L = _settled_rows(policy, batch)
        if config.attention == "rows":
            reason = "model.attention=rows"
        elif rope and (longest is None or longest > rope[1]):
            reason = (
                f"the rotary frequencies ({rope[0]}) of a whole row change when one of its sequences exceeds "
                f"{rope[1]} tokens"
            )
        else:
            reason = _packed_fault(policy, batch, expected_L)
            if reason is not None:
                policy.set_packed(False)
                apart = micro_batch_of([[row] for row in batch.rows]).to(policy.device)
                policy.scorer.padded = _packed_fault(policy, apart, expected_L, padded=True) is None
    policy.scorer.train()
    found = World(policy.accelerator).gather([reason, policy.scorer.padded])  # cards may round differently
    reason = next(filter(None, [why for why, _ in found]), None)
    policy.scorer.padded = reason is not None and all(padded for why, padded in found if why)
    if reason is not None:
        if config.attention == "packed":
            raise ValueError(f"model.attention=packed: {reason}; use model.attention=auto")
        policy.packing_fault = reason
        policy.set_packed(False)
    return reason


def _settled_rows(policy: Any, batch: MicroBatch) -> Float[Tensor, " L"]:
    """Log-probs of one sequence at a time, checked against the logits of eager attention, which honours every
    config. If the model's own attention is the reason for a difference, eager replaces it.
    """
    model, own, gap = policy.model, policy.own_attention, math.inf
    head = cast(Any, model.get_output_embeddings())
    if others := {n for n, _ in head.named_parameters(recurse=False)} - {"weight", "bias"}:
        # A new model's may be all 1: log-probs would agree, and these weights would have no gradient.
        raise ValueError(f"{type(model).__name__}: its output head has {min(others)}; {OTHER_HEAD}")
    if batch.layout.longest <= EAGER_LIMIT:
        model.set_attn_implementation("eager")
    plain_L = plain_logprobs(model, batch)
    policy.rounding = _rounding(policy, batch, plain_L)
    for policy.own_attention in dict.fromkeys((own, "eager")):
        policy.set_packed(False)
        expected_L = policy.scorer(batch, 1.0)[0]
        gap = _gap(policy, expected_L, plain_L)
        if gap <= _tolerance(policy):
            return expected_L
    if broken := nonfinite_parameters(model) if math.isnan(gap) else []:
        raise ValueError(
            f"{policy.config.name}: {len(broken)} weights such as {broken[0]} hold NaN or infinity; take an "
            "earlier checkpoint, or download the model again"
        )
    raise ValueError(
        f"{type(model).__name__}: log-probs from hidden states differ by {gap:.2g} nats from its own logits; "
        f"{OTHER_HEAD}"
    )


def _packed_fault(
    policy: Any, batch: MicroBatch, expected_L: Float[Tensor, " L"], *, padded: bool = False
) -> str | None:
    """Why packed (or padded) rows may not be used, or None. Log-probs are compared in the storage dtype, and
    in the compute dtype: there they may differ by what rounding does (fused kernels take 16 bits only).
    """
    try:
        with policy.autocast():
            rounded = _gap(policy, policy.scorer(batch, 1.0)[0], expected_L)
        policy.scorer.padded = padded
        policy.set_packed(not padded)
        gap = _gap(policy, policy.scorer(batch, 1.0)[0], expected_L)
        if not gap <= _tolerance(policy):
            return (
                f"packed log-probs differ by {gap:.2g} nats: another layer than attention mixes tokens of "
                "the row, or attention does not take distances or its window from the positions"
            )
        with policy.autocast():
            gap = _gap(policy, policy.scorer(batch, 1.0)[0], expected_L)
    except ValueError as error:
        return str(error).splitlines()[0]
    except torch.OutOfMemoryError:
        return f"the {len(batch.token_ids_N)} tokens that try it do not fit into memory"
    except (TypeError, AttributeError, RuntimeError):
        name = type(policy.model).__name__
        return f"the layers of {name} need an attention mask, or shapes that a packed row does not have"
    if not gap <= 4 * rounded + _tolerance(policy):
        return f"packed log-probs differ by {gap:.2g} nats, and rounding alone by {rounded:.2g}"
    return None


def _tolerance(policy: Any) -> float:
    """Nats by which log-probs of the same weights may differ: the surer a model is, the more it rounds."""
    return max(2e-4 if storage_dtype(policy.config) == torch.float32 else 0.15, 4 * policy.rounding)


def _rounding(policy: Any, batch: MicroBatch, plain_L: Float[Tensor, " L"]) -> float:
    """The gap between the model's own log-probs without and with tokens after the sequence, in nats.

    In a causal model those change only the shapes of products, so rounding and the choice of tied experts.
    """
    model, rope = policy.model, moving_rope(policy.model)
    context = context_length(model.config) or sys.maxsize
    room = min(context, rope[1] if rope else sys.maxsize) - batch.layout.longest
    moved_L = plain_logprobs(model, batch, behind=max(0, min(room, NUM_BEHIND)))
    gap, most = _gap(policy, moved_L, plain_L), 1e-4 if storage_dtype(policy.config) == torch.float32 else 0.1
    most *= plain_L.abs().mean().item()
    rows = zip(*(x.split([r.num_loss_tokens for r in batch.rows]) for x in (moved_L, plain_L)), strict=True)
    if gap > most and torch.tensor([_gap(policy, *row) for row in rows]).median() > most / 10:
        raise ValueError(
            f"{policy.config.name}: log-probs differ by {gap:.2g} nats with what stands behind their tokens: "
            "this is not a causal language model"
        )
    return min(gap, most)


def _gap(policy: Any, ours_L: Float[Tensor, " L"], theirs_L: Float[Tensor, " L"]) -> float:
    """The largest gap in nats; in bf16 the mean gap, as rounding alone moves single tokens by 0.3."""
    gaps_L = (ours_L - theirs_L).abs()
    return (gaps_L.max() if storage_dtype(policy.config) == torch.float32 else gaps_L.mean()).item()


def probe_batch(model: PreTrainedModel, longest: int | None = None) -> MicroBatch:
    """Ragged groups with shared prompts and a branch, longer than all switch lengths that the run will reach.

    Args:
        longest: tokens of the longest sequence of the run; None: `PROBE_LIMIT`.
    """
    config, context = model.config.get_text_config(), context_length(model.config) or sys.maxsize
    reached = [n for n in switch_lengths(config) if 0 < n < min(longest or PROBE_LIMIT, context)]
    extra = min(max(reached, default=-3) + 3, max(context - 12, 0))
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(0, num_ids(model), (n,), generator=generator).tolist()  # noqa: E731
    blocks: list[list[Row]] = []
    for i, (prompt_length, lengths) in enumerate(((5, (3, 1, 7 + extra)), (2 + extra, (4, 2)), (1, (1,)))):
        completions = [Completion(draw(n), [], [True] * n, "stop", [VersionSpan(0, n)]) for n in lengths]
        prompt = Prompt("probe", "", tuple(draw(prompt_length)))
        blocks.append([Row(prompt, c, i, g, 0.0, weight=1.0) for g, c in enumerate(completions)])
    _, branch, trunk = blocks[0]  # the branch goes on from all but two tokens of the trunk
    shared = trunk.completion.token_ids[:-2]
    more = {"token_ids": shared + branch.completion.token_ids, "loss_mask": [False] * len(shared) + [True]}
    branch = replace(branch, index=trunk.index, completion=replace(branch.completion, **more))
    blocks[0][1:] = [replace(branch, num_context=len(shared)), replace(trunk, num_context=len(shared) + 1)]
    return micro_batch_of(blocks)


def plain_logprobs(model: PreTrainedModel, batch: MicroBatch, *, behind: int = 0) -> Float[Tensor, " L"]:
    """Log-probs by the model's own logits, one sequence at a time, in the order of the loss tokens."""
    found = [own_logprobs(model, ids, given=n, behind=behind) for ids, n, _ in batch.sequences()]
    return torch.cat(found)


def own_logprobs(
    model: PreTrainedModel, ids_T: Int[Tensor, " T"], *, given: int = 1, behind: int = 0
) -> Float[Tensor, " n"]:
    """Log-probs of all but the first `given` ids, each after what precedes it, by the model's own logits.

    Args:
        behind: number of copies of the first id to append; in a causal model they only change rounding.
    """
    read = torch.cat([ids_T, ids_T[:1].expand(behind)])[None]
    logits = model(input_ids=read, use_cache=False).logits[0, given - 1 : len(ids_T) - 1].float()
    return torch.log_softmax(logits, -1).gather(-1, ids_T[given:, None]).squeeze(-1)
