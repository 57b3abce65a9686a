"""Masked diffusion language models as plain transformers models with bidirectional attention.

A loaded model is an ordinary `LlamaForCausalLM` (or Qwen, ...) whose config has `is_causal` False,
`mask_token_id` and `diffusion_shift`. A shifted model (Dream) predicts a token from the hidden state of its
left neighbour. Any causal checkpoint can become one: same weights, another attention, a vocabulary row that
text never uses as mask token. There are no padded batches: sequences are packed into one row (`Documents`).
"""

from __future__ import annotations

import difflib
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
)

from rl.config import ModelConfig
from rl.diffusion.adapters import recorded
from rl.diffusion.layouts import native_config, read_llada_tensors
from rl.diffusion.saved_config import model_config, raw_config, refuse_code
from rl.model.adapter_folder import checkpoint_folder, find_adapter, merge
from rl.model.bidirectional import BIDIRECTIONAL, Documents
from rl.model.exactness import quiet
from rl.model.head import head_logits, head_logprobs
from rl.model.loading import use_fused_layers

SPARE_NAMES = ("mask", "reserved", "unused", "placeholder")


def load_diffusion_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    mask_token_id: int | None = None,
    shift: bool | None = None,
) -> PreTrainedModel:
    """A masked diffusion model from a folder or hub name. It reads checkpoints of LLaDA-8B, iLLaDA, Dream and
    this project, merges adapters into their base, and converts any causal checkpoint.

    Args:
        mask_token_id: default: what the checkpoint says. A causal checkpoint names none; an adapter names
            what it was trained with.
        shift: default: what the checkpoint says; False for a causal one.

    Raises:
        ValueError: the layout is not supported, a mask token or an adapter's base is missing, attention stays
            causal, or reading needs code of the model's folder.
    """
    raw = raw_config(name, revision)
    if (adapter := find_adapter(name, revision)) is not None:
        says = recorded(adapter)
        mask_token_id = says.get("mask_token_id") if mask_token_id is None else mask_token_id
        shift = says.get("diffusion_shift") if shift is None else shift
        settings: dict[str, Any] = {"dtype": dtype, "mask_token_id": mask_token_id, "shift": shift}
        model = load_diffusion_model(adapter.base, revision=adapter.revision, **settings)
        merge(model, adapter)
        return model
    native = native_config(raw, name)
    if native is None:
        refuse_code(raw, name)
        model = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype=dtype, trust_remote_code=False
        )
        shift = bool(raw.get("diffusion_shift", False)) if shift is None else shift
    else:
        config, native_shift = native
        shift = native_shift if shift is None else shift
        if hasattr(config, "llada"):
            tensors = read_llada_tensors(checkpoint_folder(name, revision), raw, name)
            model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
            model.name_or_path = model.config.name_or_path = name  # a model made from tensors has none
        else:
            kind: Any = Qwen2ForCausalLM if config.model_type == "qwen2" else LlamaForCausalLM
            model = kind.from_pretrained(name, revision=revision, config=config, dtype=dtype)
    mask_token_id = raw.get("mask_token_id") if mask_token_id is None else mask_token_id
    if mask_token_id is None:
        raise ValueError(
            f"{name} names no mask token (mask_token_id in config.json); pass the id of a vocabulary row "
            "that text never uses, such as a reserved special token: find_mask_token looks for one"
        )
    return to_diffusion(cast(PreTrainedModel, model), mask_token_id=mask_token_id, shift=shift)


def random_diffusion_model(
    name: str,
    changes: dict[str, Any],
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    mask_token_id: int,
    shift: bool | None = None,
) -> PreTrainedModel:
    """A masked diffusion model with random weights, in the shape of a causal checkpoint.

    Args:
        changes: new values of fields of the checkpoint's config.json, such as {"num_hidden_layers": 6}.

    Raises:
        ValueError: `name` is a LLaDA or Dream, or `changes` do not fit its config.
    """
    if native_config(raw_config(name, revision), name) is not None:
        raise ValueError(
            f"model.from_scratch takes its shape from a causal checkpoint, but {name} is a diffusion model"
        )
    config = changed_config(model_config(name, revision), changes, name)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        return to_diffusion(model, mask_token_id=mask_token_id, shift=bool(shift))
    except Exception as error:  # each architecture has checks of its own
        raise ValueError(f"model.from_scratch={changes} is not a shape of {name}: {error}") from error


def changed_config(config: PreTrainedConfig, changes: dict[str, Any], name: str) -> PreTrainedConfig:
    """The config of checkpoint `name` with other values of some fields; ValueError if they do not fit."""
    known = config.to_dict()
    if unknown := sorted(changes.keys() - known.keys()):
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"model.from_scratch: the config of {name} has no {', '.join(unknown)}{hint}")
    if "head_dim" not in changes and changes.keys() & {"hidden_size", "num_attention_heads"}:
        known.pop("head_dim", None)  # follows from the two
    try:
        return type(config)(**(known | changes))
    except Exception as error:  # each architecture has checks of its own
        raise ValueError(f"model.from_scratch={changes} is not a shape of {name}: {error}") from error


def to_diffusion(model: PreTrainedModel, *, mask_token_id: int, shift: bool = False) -> PreTrainedModel:
    """Turns a causal model into a masked diffusion model in place, and checks that its attention is
    bidirectional. Changing the last token of a document must change its first hidden state, but no other
    document.

    Raises:
        ValueError: `mask_token_id` is not a row of the vocabulary or ends text; or the model stays causal.
    """
    rows = cast(Any, model.get_input_embeddings()).weight.shape[0]
    config = model.config.get_text_config()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if not 0 <= mask_token_id < rows:
        raise ValueError(
            f"mask_token_id={mask_token_id} (model.mask_token) is not one of the model's {rows} "
            "vocabulary rows"
        )
    if mask_token_id in ends:
        raise ValueError(
            f"mask_token_id={mask_token_id} (model.mask_token) is also the end-of-text token; a mask must "
            "not occur in text"
        )
    model.set_attn_implementation(BIDIRECTIONAL)
    for part in {id(c): c for c in (model.config, config)}.values():
        part.is_causal = False
        part.mask_token_id = mask_token_id
        part.diffusion_shift = shift
    _check_bidirectional(model)
    return model


def use_fused_diffusion_layers(model: PreTrainedModel, config: ModelConfig) -> None:
    """`rl.model.loading.use_fused_layers` for a diffusion model on CUDA. Its check makes plain calls, which
    need another attention.
    """
    model.set_attn_implementation("sdpa")
    try:
        use_fused_layers(model, config)
    finally:
        model.set_attn_implementation(BIDIRECTIONAL)


def find_mask_token(tokenizer: Any, config: PreTrainedConfig, wanted: str | int | None = None) -> int:
    """The id to use as mask: `wanted` (a token or an id), else the checkpoint's or the tokenizer's own. Else
    it is a row that no text uses: the first beyond the tokenizer's ids, or a special token named as spare.

    Raises:
        ValueError: there is none, or `wanted` is not in the vocabulary; the message lists special tokens.
    """
    special = sorted(set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab()))
    shown = ", ".join(special[:30])
    vocabulary = tokenizer.get_vocab()
    if isinstance(wanted, str) and wanted not in vocabulary:
        raise ValueError(f"model.mask_token={wanted!r} is not in the vocabulary; special tokens are: {shown}")
    own = getattr(config, "mask_token_id", None)
    for found in (vocabulary.get(wanted, wanted), own, tokenizer.mask_token_id):
        if found is not None:
            return int(found)
    num_rows = config.get_text_config().vocab_size
    largest = max(vocabulary.values())
    if largest + 1 < num_rows:
        return largest + 1
    for token in special:
        if any(name in token.lower() for name in SPARE_NAMES):
            return vocabulary[token]
    raise ValueError(
        f"the model has no mask token, no spare vocabulary row ({num_rows} rows, ids up to {largest}) and no "
        f"token whose name says that it is spare; set model.mask_token to a special token that your text "
        f"never uses, one of: {shown}"
    )


def hidden_states(
    model: PreTrainedModel, token_ids_N: Int[Tensor, " N"], documents: Documents
) -> Float[Tensor, "N D"]:
    """Hidden states of all tokens of a packed row after the last norm; each token sees its whole document.

    Raises:
        ValueError: the model attends causally, or the documents do not cover the row.
    """
    implementation = model.config.get_text_config()._attn_implementation
    if implementation != BIDIRECTIONAL:
        raise ValueError(
            f"{type(model).__name__} attends by {implementation!r}, which is causal, but a diffusion model "
            "must see both sides; convert it with rl.diffusion.model.to_diffusion"
        )
    if documents.num_tokens != len(token_ids_N):
        raise ValueError(
            f"documents of {documents.num_tokens} tokens do not cover a row of {len(token_ids_N)}; pass "
            "Documents.of the lengths of the row's sequences"
        )
    return model.base_model(
        input_ids=token_ids_N[None],
        position_ids=documents.positions_N[None],
        use_cache=False,
        cohort_documents=documents,
    ).last_hidden_state[0]


def is_shifted(model: PreTrainedModel) -> bool:
    """Whether the hidden state of a token's left neighbour predicts it (Dream)."""
    return bool(getattr(model.config, "diffusion_shift", False))


def predicting_columns(
    model: PreTrainedModel, columns_L: Int[Tensor, " L"], documents: Documents
) -> Int[Tensor, " L"]:
    """The columns whose hidden states predict the tokens at `columns_L`: those columns themselves, or in a
    shifted model (Dream) their left neighbours. A document's first token has no neighbour, so training never
    masks it (`rl.diffusion.text.encode_rows`); here its own state predicts it.
    """
    if not is_shifted(model):
        return columns_L
    return torch.where(documents.positions_N[columns_L] > 0, columns_L - 1, columns_L)


def logits_at(
    model: PreTrainedModel,
    hidden_ND: Float[Tensor, "N D"],
    columns_L: Int[Tensor, " L"],
    documents: Documents,
) -> Float[Tensor, "L V"]:
    """Logits [L, V] of the tokens at `columns_L`, in the model's dtype; they may take much memory."""
    return head_logits(model, hidden_ND[predicting_columns(model, columns_L, documents)])


class DiffusionScorer(nn.Module):
    """A diffusion model that returns log-probs of given tokens: the head runs on scored tokens only.

    It is a module, so that FSDP2 and `torch.compile` wrap a forward that includes the head.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.random_in_training = True

    def train(self, mode: bool = True) -> DiffusionScorer:
        """Fine-tuning keeps the dropout of the checkpoint's config. If log-probs are compared, as in RL,
        `random_in_training` is False and nothing random is active in either mode.
        """
        super().train(mode)
        if not self.random_in_training:
            quiet(self.model, checkpointing=mode)
        return self

    def forward(
        self,
        token_ids_N: Int[Tensor, " N"],
        documents: Documents,
        columns_L: Int[Tensor, " L"],
        targets_L: Int[Tensor, " L"],
        temperature: float = 1.0,
    ) -> tuple[Float[Tensor, " L"], Float[Tensor, " L"]]:
        """log p(target | noisy row) of each scored column and the entropy of its distribution, in nats."""
        hidden_ND = hidden_states(self.model, token_ids_N, documents)
        hidden_LD = hidden_ND[predicting_columns(self.model, columns_L, documents)]
        return head_logprobs(self.model, hidden_LD, targets_L, temperature=temperature)

    def likeliest(
        self, token_ids_N: Int[Tensor, " N"], documents: Documents, columns_L: Int[Tensor, " L"]
    ) -> Int[Tensor, " L"]:
        """The id that the model finds likeliest in each column."""
        hidden_ND = hidden_states(self.model, token_ids_N, documents)
        return logits_at(self.model, hidden_ND, columns_L, documents).argmax(-1)


@torch.no_grad()
def _check_bidirectional(model: PreTrainedModel) -> None:
    device = cast(Tensor, cast(Any, model.get_input_embeddings()).weight).device
    if device.type == "meta":
        return
    training = model.training
    model.eval()
    documents = Documents.of([4, 3], device)
    ids = torch.tensor([1, 2, 3, 4, 5, 6, 7], device=device) % model.config.get_text_config().vocab_size
    changed = ids.clone()
    changed[3] = 0
    before, after = (hidden_states(model, row, documents) for row in (ids, changed))
    model.train(training)
    if not (before[0] != after[0]).any():
        raise ValueError(
            f"{type(model).__name__} stays causal: its first token does not see the last one; a state-space "
            "or recurrent model cannot be a diffusion model, use a transformer such as Llama or Qwen"
        )
    if (before[4:] - after[4:]).abs().max() > 1e-3 * before[4:].abs().max():
        raise ValueError(
            f"{type(model).__name__} mixes the documents of a packed row, so they cannot be packed; use a "
            "transformer such as Llama or Qwen"
        )
