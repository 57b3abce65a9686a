"""The LLaDA sampler: canvases of masks in, text out, with the step at which each token was committed.

Every row goes through its canvas at its own pace. Rows of any length share a model call, finished ones leave,
and waiting ones take their place. Only the active block's masked columns reach the output head. Without a
threshold the host knows the whole schedule, so it reads results back only at the ends of blocks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rollout.diffusion.canvas import UNWRITTEN, Batch, Row
from rollout.diffusion.model import Denoiser
from rollout.diffusion.steps import DenoisingParams


@dataclass(frozen=True, slots=True)
class Denoised:
    """A canvas after sampling.

    Attributes:
        token_ids: the whole row; the mask token where it ended before a token was committed.
        commit_steps: per column, the row's step (from 0) that committed it; -1 for what was given, and
            `num_steps` for what is still masked.
        logprobs: per column, nats, of the distribution its token was drawn from at that step; 0 where none
            was drawn.
        end: columns up to and including the first end token after all given tokens; all of them without one.
        stopped: there was such an end token.
        num_steps: model calls that the row took part in.
        finite: False if the model's logits were not finite, so that the tokens mean nothing.
    """

    token_ids: list[int]
    commit_steps: list[int]
    logprobs: list[float]
    end: int
    stopped: bool
    num_steps: int
    finite: bool


def prompt_canvas(prompt: Sequence[int], params: DenoisingParams, mask_token_id: int) -> list[int]:
    """A prompt followed by `gen_length` masks."""
    return [*prompt, *[mask_token_id] * params.gen_length]


@torch.no_grad()
def denoise(
    model: Denoiser,
    canvases: Sequence[Sequence[int]],
    params: DenoisingParams,
    *,
    seeds: Sequence[int],
    max_rows: int = 64,
    deadline: float | None = None,
) -> list[Denoised | None]:
    """Fills every canvas, `max_rows` at a time; a row depends on its own seed and not on its batch mates.

    Args:
        canvases: token ids, with the mask token wherever a token is wanted: after a prompt (`prompt_canvas`)
            or anywhere between given tokens. Blocks of `params.block_length` columns follow each other from
            the first mask on.
        deadline: a value of time.monotonic(), after which unfinished rows are None.

    Raises:
        ValueError: no mask in a canvas, or one longer than the model's context; not one seed per canvas; the
            mask token ends a text.
    """
    if len(seeds) != len(canvases):
        raise ValueError(f"{len(seeds)} seeds for {len(canvases)} canvases; give one seed per canvas")
    if model.mask_token_id in params.stop_token_ids:
        raise ValueError(
            f"stop_token_ids has the mask token ({model.mask_token_id}), so a text would end where it has "
            "not been written yet; leave it out, or choose another mask token"
        )
    rows = [
        Row.of(i, c, seed=s, params=params, model=model)
        for i, (c, s) in enumerate(zip(canvases, seeds, strict=True))
    ]
    done: list[Denoised | None] = [None] * len(rows)
    # Rows of like length share a call, so that little of it is padding.
    waiting = deque(sorted(rows, key=lambda row: row.length))
    batch = Batch(model, params)
    while deadline is None or time.monotonic() < deadline:
        while waiting and len(batch.rows) < max_rows:
            batch.rows.append(waiting.popleft())
        if not batch.rows:
            break
        if finished := batch.step():
            read = batch.state.read([row.slot for row in finished])
            for row, found in zip(finished, read, strict=True):
                done[row.index] = _result(row, found, params.stop_token_ids)
    return done


def _result(
    row: Row, found: tuple[list[int], list[int], list[float], bool], stop_token_ids: Sequence[int]
) -> Denoised:
    token_ids, steps, logprobs, finite = found
    end = next((c + 1 for c in range(row.tail, row.length) if token_ids[c] in stop_token_ids), None)
    return Denoised(
        token_ids=token_ids[: row.length],
        commit_steps=[row.num_steps if step == UNWRITTEN else step for step in steps[: row.length]],
        logprobs=logprobs[: row.length],
        end=end or row.length,
        stopped=end is not None,
        num_steps=row.num_steps,
        finite=finite,
    )
