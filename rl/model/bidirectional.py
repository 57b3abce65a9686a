"""Bidirectional attention within the documents of a packed row: transformers' `cohort_bidirectional`.

Every token sees its whole document and nothing else. The documents travel as the keyword argument
`cohort_documents` through the model's forward, so they survive gradient checkpointing. The mask that
transformers passes (None for an unknown implementation) is never used: with stock `sdpa` a None mask can
silently mean causal attention.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from rl.model.varlen import flash_serves, shared_prompt_attention
from rl.model.varlen_plan import VarlenPlan

BIDIRECTIONAL = "cohort_bidirectional"


@dataclass(frozen=True)
class Documents:
    """Where the documents of a packed row begin and end; made once per row and reused by every layer.

    Attributes:
        lengths: tokens of each document, at least 1; they add up to N.
        positions_N: 0, 1, ... within each document.
    """

    lengths: tuple[int, ...]
    positions_N: Int[Tensor, " N"]

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Documents:
        """Raises ValueError if there is no document or an empty one."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"documents of {list(lengths)} tokens: each needs at least one")
        positions = torch.cat([torch.arange(n) for n in lengths])
        return Documents(tuple(lengths), positions.to(device))

    @functools.cached_property
    def varlen(self) -> VarlenPlan:
        return VarlenPlan.documents(self.lengths, self.positions_N.device)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)


@torch.compiler.disable
def bidirectional_attention(
    module: nn.Module,
    query: Float[Tensor, "1 Hq N D"],
    key: Float[Tensor, "1 Hk M D"],
    value: Float[Tensor, "1 Hk M Dv"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cohort_documents: Documents | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "1 N Hq Dv"], None]:
    """softmax(q k^T * scaling) v over the document of each query; an attention function of transformers.

    On CUDA with 16-bit inputs, one variable-length flash kernel computes all documents. Elsewhere there is
    one scaled_dot_product_attention per document, or a single one if their lengths are equal.

    Raises:
        ValueError: there are no documents, or several rows, or attention has no bidirectional form here
            (soft cap, sinks, a window shorter than a document).
    """
    name, documents = type(module).__name__, cohort_documents
    if documents is None:
        raise ValueError(
            f"{name} got no cohort_documents, which say what a token may see: call the model through "
            "rl.diffusion.model.hidden_states; if you did, it does not pass keyword arguments to its "
            "attention and cannot be used as a diffusion model"
        )
    if len(query) != 1:
        raise ValueError(f"{name} got {len(query)} rows; pack the sequences into one, Documents.of(lengths)")
    check_plain(name, max(documents.lengths), sliding_window=sliding_window, softcap=softcap, s_aux=s_aux)
    if torch.is_autocast_enabled(query.device.type):
        # Norms of query and key (Qwen 3) give fp32 under autocast, and only SDPA itself would cast them.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not dropout and flash_serves(query, value):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return shared_prompt_attention(q, k, v, documents.varlen, scale=scale)[None], None
    attend = functools.partial(attend_both_ways, dropout=dropout, scale=scale)
    if len(set(documents.lengths)) == 1:
        shape = (len(documents.lengths), -1)
        q, k, v = (x[0].unflatten(1, shape).transpose(0, 1) for x in (query, key, value))
        return attend(q, k, v).transpose(1, 2).flatten(0, 1)[None], None
    pieces = zip(*(x.split(documents.lengths, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([attend(q, k, v) for q, k, v in pieces], dim=2).transpose(1, 2), None


def check_plain(
    name: str, longest: int, *, sliding_window: int | None, softcap: float | None, s_aux: Tensor | None
) -> None:
    """Raises ValueError for a kind of attention that has no bidirectional form at this length."""
    if softcap is not None or s_aux is not None:
        raise ValueError(
            f"{name} caps its attention logits or has sinks, which have no bidirectional form here; use a "
            "Llama, Qwen or SmolLM model"
        )
    if sliding_window is not None and longest > sliding_window:
        raise ValueError(
            f"{name} attends within a window of {sliding_window} tokens, but a document has {longest}, and a "
            "diffusion model sees all of it; use a model without a window, or shorter sequences"
        )


def attend_both_ways(
    q: Float[Tensor, "B Hq T D"],
    k: Float[Tensor, "B Hk S D"],
    v: Float[Tensor, "B Hk S Dv"],
    mask: Tensor | None = None,
    *,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Float[Tensor, "B Hq T Dv"]:
    """softmax(q k^T * scale) v over all positions, or those where `mask` is True; key heads may be shared."""
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=False, scale=scale)


AttentionInterface.register(BIDIRECTIONAL, bidirectional_attention)
