"""The causal policy: a transformers model; every process holds a full copy."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from rl.batch import Batch, MicroBatch
from rl.config import ModelConfig
from rl.model import exactness, loading
from rl.model.adapter_folder import find_adapter
from rl.model.adapters import Plan, add_lora, check_adapted, load_adapter
from rl.model.head import asked_logprobs, head_logprobs
from rl.model.packed import PACKED
from rl.model.saving import name_dtype, save_model
from rl.packed_check import own_logprobs, settle_attention
from rl.policy import Prepared, Scores, Writer
from rl.store.optimizer_state import load_optimizer, optimizer_writer
from rl.together import SummedGradients
from rl.types import WeightStream
from rl.weights import PolicyWeights, canary_ids, check_streamed


class CausalScorer(nn.Module):
    """A causal language model that answers with log-probs of given tokens instead of logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.packed = self.padded = self.keeps_logits = False
        self.longest = sys.maxsize

    def check_length(self, num_tokens: int) -> None:
        """Raises ValueError where dynamic rotary frequencies would depend on earlier sequences."""
        if num_tokens > self.longest:
            raise ValueError(
                f"a sequence of {num_tokens} tokens exceeds {self.longest}, beyond which the dynamic rotary "
                "frequencies of this model depend on earlier sequences; lower "
                "sampling.max_completion_length and leave out long prompts"
            )

    def train(self, mode: bool = True) -> CausalScorer:
        """In both modes nothing random is active; only gradient checkpointing follows `mode`."""
        super().train(mode)
        exactness.quiet(self.model, checkpointing=mode)
        return self

    def forward(
        self, batch: MicroBatch, temperature: float, ids_LK: Int[Tensor, "L K"] | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.answers(self.hidden(batch), batch, temperature, ids_LK)

    def answers(
        self, hidden_LD: Float[Tensor, "L D"], batch: MicroBatch, temperature: float, ids_LK: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Log-prob and entropy of each loss token; log-probs of `ids_LK`, and of all other ids together."""
        how = {"temperature": temperature, "keep": self.keeps_logits}
        found = head_logprobs(self.model, hidden_LD, batch.targets_L, **how)
        if ids_LK is None:
            return *found, None, None
        return *found, *asked_logprobs(self.model, hidden_LD, ids_LK, temperature=temperature)

    def own_logprobs(self, ids_T: Int[Tensor, " T"]) -> Float[Tensor, " n"]:
        return own_logprobs(self.model, ids_T)

    def run(self, batch: MicroBatch) -> None:
        self.hidden(batch)  # for hooks that watch the layers

    def hidden(self, batch: MicroBatch) -> Float[Tensor, "L D"]:
        """Hidden states at `predecessors_L`; the head computes the loss tokens' log-probs from them."""
        if self.packed:
            return self._packed_hidden(batch)
        return self._padded_hidden(batch) if self.pads(batch) else self._row_hidden(batch)

    def pads(self, batch: MicroBatch) -> bool:
        """Whether all rows are one padded call. Rows that share a prompt might be too large for one."""
        return self.padded and len(batch.blocks) == len(batch.rows)

    def _packed_hidden(self, batch: MicroBatch) -> Float[Tensor, "L D"]:
        hidden_1ND = exactness.backbone(self.model)(
            input_ids=batch.token_ids_N[None],
            position_ids=batch.positions_N[None],
            use_cache=False,
            cohort_layout=batch.layout,
        ).last_hidden_state
        return hidden_1ND[0, batch.predecessors_L]

    def _padded_hidden(self, batch: MicroBatch) -> Float[Tensor, "L D"]:
        """All sequences side by side, without a mask: none sees the padding on its right (`packed_check`)."""
        layout = batch.layout
        self.check_length(layout.longest)
        fill = int(getattr(self.model.config, "pad_token_id", None) == 0)  # transformers warns of that id
        ids_BT = layout.padded(batch.token_ids_N, fill).view(-1, layout.longest)
        hidden_BTD = exactness.backbone(self.model)(input_ids=ids_BT, use_cache=False).last_hidden_state
        return hidden_BTD.flatten(0, 1)[layout.places[batch.predecessors_L]]

    def _row_hidden(self, batch: MicroBatch) -> Float[Tensor, "L D"]:
        """One sequence at a time through the model's own attention: slow, exact, for any model."""
        pieces, below = [], exactness.backbone(self.model)
        for row, prompt_length, start in batch.sequences():
            self.check_length(len(row))
            hidden_TD = below(input_ids=row[None], use_cache=False).last_hidden_state[0]
            # Prompt states of a sibling's row are not reused: rotary embeddings may depend on its length.
            own = batch.columns_L[batch.columns_L >= start] - start
            pieces.append(hidden_TD[own[own < len(row) - prompt_length] + prompt_length - 1])
        return torch.cat(pieces)


def autocast(policy: Any) -> contextlib.AbstractContextManager[Any]:
    """The block in which a policy computes, narrowed under bf16-mixed."""
    if policy.config.dtype == "bf16-mixed":
        return torch.autocast(policy.device.type, torch.bfloat16)
    return contextlib.nullcontext()


def snapshot(policy: Any, optimizer: torch.optim.Optimizer) -> Writer:
    """A writer for a policy of which each process holds a full copy: the main one writes the model."""
    write_optimizer = optimizer_writer(optimizer, policy.trainable())

    def write(folder: Path) -> None:
        if policy.accelerator.is_main_process:
            policy.write_model(folder)
        write_optimizer(folder)

    return write


def load(policy: Any, folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Restores what the writer of `snapshot` wrote."""
    policy.load_weights(folder)
    load_optimizer(folder, optimizer, policy.trainable())


class CausalPolicy:
    """The model being trained and its tokenizer. Its log-probs are exact and equal in every pass.

    With `like`, a settled policy of a shorter model, `load` gives a hollow one (`rl.sharded.load_split`).
    """

    redraws = in_step = False
    settle_attention = settle_attention  # of `rl.packed_check`, which measures log-probs in both ways
    autocast, snapshot, load = autocast, snapshot, load

    def __init__(
        self,
        config: ModelConfig,
        accelerator: Accelerator,
        *,
        temperature: float,
        plan: Plan | None = None,
        load: Callable[[ModelConfig], PreTrainedModel] = loading.load_model,
        like: CausalPolicy | None = None,
    ) -> None:
        self.config, self.accelerator, self.temperature = config, accelerator, temperature
        self.tokenizer = loading.load_tokenizer(config)
        model = load(config)
        loading.check_vocabulary(loading.num_ids(model), self.tokenizer)
        if accelerator.device.type == "cuda":
            placed = model if like else model.to(accelerator.device)
            loading.use_fused_layers(placed, config, is_checked=like is not None)
        if config.gradient_checkpointing is True:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.own_attention = like.own_attention if like else exactness.honouring_attention(model)
        adapter = find_adapter(config.name, config.revision) if config.lora else None
        below = {} if adapter is None else {"name": adapter.base, "revision": adapter.revision}
        self.peft_model: Any = None
        if config.lora:
            self.peft_model = add_lora(model, config.model_copy(update=below), plan)
            if like is None:
                check_adapted(model, config)
        if adapter is not None:
            load_adapter(self.peft_model, adapter.folder, model.device)
        check_streamed(model)
        self.long_factors, self.packing_fault = False, None
        self.unread: list[Path] = []
        self.scorer = CausalScorer(model if like else model.to(accelerator.device)).train()
        self.scorer.keeps_logits = config.keep_logits is True
        self.sums = SummedGradients(self.trainable, accelerator.num_processes)
        self.canary_ids = canary_ids(self.tokenizer, loading.context_length(model.config))

    @property
    def model(self) -> PreTrainedModel:
        return self.scorer.model

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    @property
    def shares_prompts(self) -> bool:
        """Whether rows are packed: only then do completions share the prompt's columns."""
        return self.scorer.packed

    def set_packed(self, packed: bool) -> None:
        """Chooses between packed rows and one sequence at a time. Packed rows stay off once they were found
        to be inexact. A reference's copy of the scorer is not switched.
        """
        self.scorer.packed = packed and self.packing_fault is None
        self.model.set_attn_implementation(PACKED if self.scorer.packed else self.own_attention)

    @contextlib.contextmanager
    def in_rows(self) -> Iterator[None]:
        """One sequence at a time inside the `with` block."""
        packed = self.scorer.packed
        self.set_packed(False)
        try:
            yield
        finally:
            self.set_packed(packed)

    def prepare(self, batch: Batch, *, draw: int) -> list[Prepared]:
        return [Prepared(micro_batch.to(self.device)) for micro_batch in batch.micro_batches]

    def score(self, prepared: Prepared, *, ids_LK: Int[Tensor, "L K"] | None = None) -> Scores:
        """Log-probs under the sampling distribution, that is, with the temperature applied."""
        return self.score_by(self.scorer, prepared, ids_LK=ids_LK)

    def score_by(self, scorer: nn.Module, prepared: Prepared, *, ids_LK: Tensor | None = None) -> Scores:
        with self.autocast():
            return Scores(*scorer(prepared.batch, self.temperature, ids_LK))

    def step_metrics(self) -> dict[str, float]:
        return {}

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.sums.backward(loss, last=last)

    def finish_gradients(self, max_norm: float) -> float:
        return self.sums.finish(max_norm)

    def load_weights(self, folder: Path) -> None:
        """Loads the weights (or the adapter) that `write_model` wrote, bit for bit."""
        if self.peft_model is not None:
            load_adapter(self.peft_model, folder, self.device)
            return
        saved = loading.load_model(self.config.model_copy(update={"name": str(folder), "revision": None}))
        self.model.load_state_dict(saved.state_dict())

    def weights(self) -> WeightStream:
        return PolicyWeights(self.model, self.canary)

    @torch.no_grad()
    def canary(self) -> tuple[list[int], list[float]]:
        """Fixed ids, and their log-probs by the model's own logits and attention."""
        ids, training = torch.tensor(self.canary_ids, device=self.device), self.scorer.training
        self.scorer.eval()
        with self.in_rows(), self.autocast():
            logprobs = self.scorer.own_logprobs(ids)
        self.scorer.train(training)
        return ids.tolist(), logprobs.tolist()

    def write_model(self, folder: Path, save: Callable[[Path], None] | None = None) -> None:
        """Writes Hugging Face form: the model's folder, or with LoRA the adapter's, and the tokenizer.

        Weights keep their dtype; config.json names the compute dtype, in which others load them. `save`
        replaces the writing of the weights and settings; by default this process writes all of them.
        """
        with self.in_rows():
            (save or partial(save_model, self.peft_model or self.model, self.model))(folder)
        self.tokenizer.save_pretrained(folder)
        name_dtype(folder, "bfloat16" if self.config.dtype != "fp32" else "float32")
