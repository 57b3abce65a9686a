"""What the sampler needs of a model: hidden states of packed columns, keys and values kept between steps, and
logits where they are wanted. `TransformersDenoiser` does it for any decoder of transformers.

The model's own mask is never used: rows attend in both directions within themselves, which the attention
function below does for whatever columns are computed. It is registered as `cohort_denoise`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface

from rl.model.bidirectional import attend_both_ways, check_plain
from rl.model.head import head_logits
from rl.model.varlen import run_attention

DENOISE = "cohort_denoise"


@dataclass
class KeyValues:
    """Keys and values of every layer, [R * T, heads, size] for R rows of T columns."""

    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def write(self, layer: int, layout: Layout, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the columns that were just computed; returns all columns of all rows."""
        if layer not in self.keys:
            size = layout.num_rows * layout.width
            self.keys[layer] = key.new_zeros(size, *key.shape[1:])
            self.values[layer] = value.new_zeros(size, *value.shape[1:])
        self.keys[layer].index_copy_(0, layout.key_slots_N, key)
        self.values[layer].index_copy_(0, layout.key_slots_N, value)
        return self.keys[layer], self.values[layer]

    def select(self, rows: Sequence[int], *, num_rows: int, old: tuple[int, int], width: int) -> None:
        """Keeps these of the old rows, in this order, in front of `num_rows` rows of `width` columns."""
        if not rows:
            self.keys.clear()
            self.values.clear()
        for held in (self.keys, self.values):
            for layer, tensor in held.items():
                kept = tensor.unflatten(0, old)[list(rows), :width]
                new = tensor.new_zeros(num_rows, width, *tensor.shape[1:])
                new[: len(rows), : kept.shape[1]] = kept
                held[layer] = new.flatten(0, 1)


@dataclass(frozen=True)
class Layout:
    """N packed columns of R rows, and what they attend to: all columns of their row, computed now or kept.

    Attributes:
        rows_N, columns_N: of each packed column; the column is also its position.
        offsets_R: packed index of a row's column c is offsets_R[row] + c.
        width: T, columns of the rectangle of keys; `max_fresh` is Q, of the rectangle of queries.
        key_slots_N, query_slots_N: where a packed column lies in the flattened rectangles.
        ends_S: cumulative numbers of computed columns, from 0, int32: S = R + 1.
        unpadded: every row has T columns, so that all keys are visible.
        kept: keys and values of the columns that are not computed now; None: everything is.
    """

    rows_N: Int[Tensor, " N"]
    columns_N: Int[Tensor, " N"]
    offsets_R: Int[Tensor, " R"]
    key_slots_N: Int[Tensor, " N"]
    query_slots_N: Int[Tensor, " N"]
    ends_S: Int[Tensor, " S"]
    visible_RT: Bool[Tensor, "R T"]
    num_rows: int
    width: int
    max_fresh: int
    unpadded: bool
    kept: KeyValues | None = None

    @staticmethod
    def of(
        ranges: Sequence[tuple[int, int]],
        lengths: Sequence[int],
        *,
        device: torch.device,
        kept: KeyValues | None = None,
    ) -> Layout:
        """The layout in which columns [low, high) of each row are computed."""
        low = np.array([a for a, _ in ranges])
        sizes = np.array([b for _, b in ranges]) - low
        starts = np.cumsum(sizes) - sizes
        rows = np.repeat(np.arange(len(sizes)), sizes)
        slots = np.arange(sizes.sum()) - starts[rows]
        columns = slots + low[rows]
        num_columns, max_fresh = max(lengths), int(sizes.max())
        packed = [rows, columns, rows * num_columns + columns, rows * max_fresh + slots]
        rows_N, columns_N, keys_N, queries_N = upload(np.stack(packed), device).unbind()
        offsets_R, lengths_R = upload(np.stack([starts - low, np.array(lengths)]), device).unbind()
        return Layout(
            rows_N=rows_N,
            columns_N=columns_N,
            offsets_R=offsets_R,
            key_slots_N=keys_N,
            query_slots_N=queries_N,
            ends_S=upload(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32), device),
            visible_RT=torch.arange(num_columns, device=device) < lengths_R[:, None],
            num_rows=len(sizes),
            width=num_columns,
            max_fresh=max_fresh,
            unpadded=min(lengths) == num_columns,
            kept=kept,
        )


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """Copies an array to the device without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Denoiser(Protocol):
    """A bidirectional model that predicts masked tokens.

    Attributes:
        mask_token_id: what stands where a token is to be predicted.
        context_length: longest row; None: no limit.
        shift: hidden column i predicts token i + 1 (Dream's alignment) instead of token i (LLaDA's).
    """

    mask_token_id: int
    context_length: int | None
    shift: bool

    @property
    def device(self) -> torch.device: ...

    def hidden(self, token_ids_N: Int[Tensor, " N"], layout: Layout) -> Float[Tensor, "N D"]:
        """Hidden states of the packed columns; each sees its whole row."""
        ...

    def logits(self, hidden_LD: Float[Tensor, "L D"]) -> Float[Tensor, "L V"]:
        """Logits of chosen columns, in the model's dtype."""
        ...


class TransformersDenoiser:
    """A decoder of transformers (Llama, Qwen, SmolLM, LLaDA as Llama) that attends in both directions.

    The attention function is only in place during `hidden`, so that a model can be trained and sampled from.

    Args:
        model: with `base_model` and a linear output head.
        mask_token_id, shift: default: what the model's config says (`mask_token_id`, `diffusion_shift`).

    Raises:
        ValueError: no mask token is known, or it has no row in the embedding.
    """

    def __init__(
        self,
        model: Any,
        mask_token_id: int | None = None,
        *,
        shift: bool | None = None,
    ) -> None:
        config = model.config.get_text_config()
        self.model = model
        self.shift = bool(getattr(config, "diffusion_shift", False)) if shift is None else shift
        self.mask_token_id = checked_mask_token(
            mask_token_id if mask_token_id is not None else getattr(config, "mask_token_id", None),
            num_rows=model.get_input_embeddings().weight.shape[0],
        )
        self.context_length: int | None = getattr(config, "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def hidden(self, token_ids_N: Int[Tensor, " N"], layout: Layout) -> Float[Tensor, "N D"]:
        with _bidirectional(self.model.config):
            states = self.model.base_model(
                input_ids=token_ids_N[None],
                position_ids=layout.columns_N[None],
                use_cache=False,
                cohort_rows=layout,
            )
        return states.last_hidden_state[0]

    def logits(self, hidden_LD: Float[Tensor, "L D"]) -> Float[Tensor, "L V"]:
        return head_logits(self.model, hidden_LD)


def checked_mask_token(mask_token_id: int | None, *, num_rows: int) -> int:
    if mask_token_id is None:
        raise ValueError(
            "the model has no mask token: its config has no mask_token_id; give the id of a reserved token "
            "(LLaDA: 126336), or convert the model to masked diffusion first"
        )
    if not 0 <= mask_token_id < num_rows:
        raise ValueError(
            f"mask_token_id={mask_token_id} has no row in the embedding of {num_rows}; use a reserved id "
            "below that"
        )
    return mask_token_id


@contextmanager
def _bidirectional(config: Any) -> Iterator[None]:
    configs = {id(c): c for c in (config, config.get_text_config())}.values()
    before = [c._attn_implementation for c in configs]
    for c in configs:
        c._attn_implementation = DENOISE
    try:
        yield
    finally:
        for c, implementation in zip(configs, before, strict=True):
            c._attn_implementation = implementation


@torch.compiler.disable
def denoise_attention(
    module: nn.Module,
    query: Float[Tensor, "1 Hq N D"],
    key: Float[Tensor, "1 Hk N D"],
    value: Float[Tensor, "1 Hk N Dv"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cohort_rows: Layout | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "1 N Hq Dv"], None]:
    """softmax(q k^T * scaling) v over all columns of a query's row, in transformers' attention signature.

    If every column is computed and a flash kernel is available, it is used; else rows are padded.

    Raises:
        ValueError: the model does not hand the layout on, or its attention does more than this.
    """
    if cohort_rows is None:
        raise ValueError(f"{type(module).__name__} does not hand keyword arguments to its attention function")
    layout = cohort_rows
    check_plain(
        type(module).__name__, layout.width, sliding_window=sliding_window, softcap=softcap, s_aux=s_aux
    )
    if layout.kept is None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        found = run_attention(query, key, value, ends_S=layout.ends_S, longest=layout.max_fresh, scale=scale)
        if found is not None:
            return found[None], None
    q_NHD, k_NHD, v_NHD = (x[0].transpose(0, 1) for x in (query, key, value))
    shape = (layout.num_rows, layout.width)
    if layout.kept is not None:
        layer: Any = module.layer_idx
        k, v = (x.unflatten(0, shape) for x in layout.kept.write(layer, layout, k_NHD, v_NHD))
    else:
        k, v = (_rectangle(x, layout.key_slots_N, shape) for x in (k_NHD, v_NHD))
    q = _rectangle(q_NHD, layout.query_slots_N, (layout.num_rows, layout.max_fresh))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    # A mask would rule out the fastest kernels.
    mask = None if layout.unpadded else layout.visible_RT[:, None, None]
    out = attend_both_ways(q, k, v, mask, scale=scaling).transpose(1, 2).flatten(0, 1)
    return (out if len(out) == len(q_NHD) else out[layout.query_slots_N])[None], None


def _rectangle(x_NHD: Tensor, slots_N: Tensor, shape: tuple[int, int]) -> Tensor:
    """Packed columns of all rows side by side, with zeros after the shorter ones."""
    size = shape[0] * shape[1]
    if len(x_NHD) < size:
        x_NHD = x_NHD.new_zeros(size, *x_NHD.shape[1:]).index_copy(0, slots_N, x_NHD)
    return x_NHD.unflatten(0, shape)


AttentionInterface.register(DENOISE, denoise_attention)
