"""A packed row and the plain forward passes it is compared with, at lengths where a model switches."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from rl.batch import MicroBatch, Row, micro_batch_of
from rl.model.exactness import PROBE_LIMIT, switch_lengths
from rl.types import Completion, Prompt, VersionSpan


def probe_batch(model: PreTrainedModel, longest: int | None = None) -> MicroBatch:
    """Ragged groups with shared prompts and a branch, longer than all switch lengths that the run will reach.

    Args:
        longest: tokens of the longest sequence of the run; None: `PROBE_LIMIT`.
    """
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or sys.maxsize
    reached = [n for n in switch_lengths(config) if 0 < n < min(longest or PROBE_LIMIT, context)]
    extra = min(max(reached, default=-3) + 3, max(context - 12, 0))
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(0, config.vocab_size, (n,), generator=generator).tolist()  # noqa: E731
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


def plain_logprobs(model: PreTrainedModel, batch: MicroBatch) -> Float[Tensor, " L"]:
    """Log-probs by the model's own logits, one sequence at a time, in the order of the loss tokens."""
    return torch.cat([own_logprobs(model, ids, given=given) for ids, given, _ in batch.sequences()])


def own_logprobs(model: PreTrainedModel, ids_T: Int[Tensor, " T"], *, given: int = 1) -> Float[Tensor, " n"]:
    """Log-probs of all but the first `given` ids, each after what precedes it, by the model's own logits."""
    logits = model(input_ids=ids_T[None], use_cache=False).logits[0, given - 1 : -1].float()
    return torch.log_softmax(logits, -1).gather(-1, ids_T[given:, None]).squeeze(-1)
