"""The sections of a run's configuration: every key with its default and its range."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationInfo,
    field_validator,
    model_validator,
)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def refuse_switch(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses true and false for a number, or in a list of them: Pydantic reads them as 1 and 0."""
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation) if _has_switch(value) else set()
        if kinds & {int, float} and bool not in kinds:
            raise ValueError("must be a number, not a switch (YAML reads yes, no, on and off as switches)")
        return value


def _has_switch(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = [*value.values()]
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_has_switch, value)))


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    return {annotation}.union(*map(_kinds, get_args(annotation))) if get_args(annotation) else {annotation}


def _from_home(path: Any) -> Any:
    """A path with `~` or `~user` at its start replaced by the folder that it stands for."""
    if not isinstance(path, str) or not path.startswith("~"):
        return path
    if (whole := os.path.expanduser(path)).startswith("~"):
        raise ValueError("there is no home folder of this user; give the whole path")
    return whole


SERVER = r"^https?://([^/@?#:\s\[\]]+|\[[\da-fA-F:.]+\])(:\d{1,5})?/?$"  # a host and no more than a port
HOME = BeforeValidator(_from_home)  # annotates a key that may hold the path of a file or folder
RunDir = Annotated[Path, HOME, Field(description="logs, checkpoints and the report; the same folder resumes")]
Trackers = Annotated[
    list[Literal["tensorboard", "wandb", "trackio"]],
    Field(description="receive the metrics too, besides metrics.jsonl"),
]

Auto = Literal["auto"]
"""Leaves a key to `rl.plan` on a GPU, which knows the model's config, the card and the processes."""

UNPLANNED_TOKENS = 8192
"""What `train.token_budget: auto` is without a plan: on a CPU, and for models that `rl.plan` cannot size."""

TokenBudget = Annotated[
    Annotated[int, Field(ge=16)] | Auto,
    Field(description=f"packed tokens of one forward pass; auto: what fits, {UNPLANNED_TOKENS} on a CPU"),
]


def tokens_of(token_budget: int | Auto) -> int:
    """Tokens of a forward pass; without a plan, a number that suits a CPU."""
    return UNPLANNED_TOKENS if token_budget == "auto" else token_budget


class TrainConfig(Section):
    """How much is sampled, and how it is trained on. A step samples `prompts_per_step` groups and trains on
    each once.
    """

    steps: int = Field(default=100, ge=1, description="steps of the whole run")
    prompts_per_step: int = Field(default=8, ge=1, description="groups per step, over all processes")
    group_size: int = Field(default=8, ge=1, description="G, completions per prompt")
    num_epochs: int = Field(default=1, ge=1, description="passes over a step's batch; 1 = strictly on-policy")
    num_minibatches: int = Field(default=1, ge=1, description="optimizer steps per pass, groups split evenly")
    token_budget: TokenBudget = "auto"
    max_staleness: int = Field(
        default=0,
        ge=0,
        description="steps that sampling may run ahead; 0: the current policy samples every token",
    )
    in_flight: int | None = Field(
        default=None,
        ge=1,
        description="most unfinished completions per process; default: all that max_staleness allows",
    )
    sample_while_training: bool | None = Field(
        default=None, description="sample while the trainer computes; default: only on a CPU"
    )
    sharding: Literal["auto", "none", "full", "hybrid"] = Field(
        default="auto",
        description="FSDP2: full: weights, gradients and moments are split over all processes; hybrid: over "
        "those of a host; auto: full where whole copies do not fit the GPUs",
    )
    seed: int = Field(default=0, ge=0, description="seed of sampling, data order and new weights")
    deterministic: bool = Field(default=True, description="deterministic algorithms on CPU: exact resume")
    max_bad_steps: int = Field(default=3, ge=1, description="consecutive non-finite steps that stop the run")


class MemoryConfig(Section):
    """What is moved off a GPU that is too small; auto: only what must, and the run says what that costs."""

    engine_sleeps: bool | Auto = Field(
        default="auto", description="vLLM drops weights and cache while the trainer computes"
    )
    optimizer_on_host: bool | Auto = Field(
        default="auto", description="AdamW's moments stay in host memory and come for the optimizer step"
    )
    reference_on_host: bool | Auto = Field(
        default="auto", description="the reference's layers stay in host memory and come one at a time"
    )
    host_gib: PositiveFloat | Auto = Field(
        default="auto",
        description="host memory that moments and reference may take, of all processes of the host together, "
        "GiB; auto: what is free, also of a container. Set it on a machine whose memory grows as it is used",
    )

    @property
    def keeps_whole(self) -> bool:
        """Whether each process is to keep a whole copy of something in host memory."""
        return self.optimizer_on_host is True or self.reference_on_host is True


class LoraConfig(Section):
    r: int = Field(default=16, ge=1, description="rank")
    alpha: int = Field(default=32, ge=1, description="deltas are scaled by alpha / r")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of the adapters' inputs")
    target_modules: str | list[str] = Field(
        default="all-linear", description="all-linear, a list of name endings, or a regex of whole names"
    )


class ReferenceConfig(Section):
    """The reference of the KL term. With LoRA it is the base model and costs no copy."""

    update_every: int = Field(default=0, ge=0, description="steps per move towards the policy; 0 = frozen")
    mixup: float = Field(default=1.0, gt=0, le=1, description="reference += mixup * (policy - reference)")


class TunedModelConfig(Section):
    """Keys that models of every kind have."""

    name: Annotated[str, HOME] = Field(
        default="smollm2-135m-instruct", description="hub name, folder, or the built-in smollm2-135m-instruct"
    )
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub name")
    dtype: Literal["bf16-mixed", "fp32", "bf16"] = Field(
        default="bf16-mixed", description="bf16-mixed: fp32 master weights, bf16 compute"
    )
    lora: LoraConfig | None = Field(
        default=None, description="train adapters beside frozen weights; default: train all weights"
    )
    chat_template: Annotated[str, HOME] | None = Field(
        default=None, description="path of a Jinja file; default: the tokenizer's own"
    )


class TrainedModelConfig(TunedModelConfig):
    gradient_checkpointing: bool | Auto = Field(
        default="auto", description="recomputes activations: less memory, more time; auto: if memory is short"
    )
    fused_layers: bool = Field(default=True, description="Liger's Triton layers, on a GPU, where installed")


class ModelConfig(TrainedModelConfig):
    attention: Literal["auto", "packed", "rows"] = Field(
        default="auto",
        description="packed: a batch in one forward pass, prompts shared; rows: one sequence at a time",
    )
    keep_logits: bool | Auto = Field(
        default="auto",
        description="keeps logits for the backward pass, else computes them twice: more memory, less time; "
        "auto: if memory is left",
    )
    reference: ReferenceConfig = ReferenceConfig()


class SamplingConfig(Section):
    temperature: float = Field(default=1.0, ge=0, description="of the token draws")
    top_p: float = Field(default=1.0, gt=0, le=1, description="1 = off")
    top_k: int = Field(default=0, ge=0, description="0 = off")
    min_p: float = Field(default=0.0, ge=0, lt=1, description="0 = off")
    max_completion_length: int = Field(default=256, ge=1, description="tokens")
    stop_token_ids: list[int] = Field(default=[], description="added to the tokenizer's end-of-turn ids")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[],
        description="strings; a completion is cut after the token that completes one. It is still sampled "
        "to its end; stop_token_ids stop sampling too",
    )


class DynamicSamplingConfig(Section):
    """DAPO (arXiv:2503.14476) section 3.2: groups without spread are replaced by fresh ones."""

    max_rounds: int = Field(default=3, ge=1, description="sampling rounds per step, the first included")


class AdvantageConfig(Section):
    name: Literal["grpo", "centered", "rloo", "batch", "max_rl", "wd1"] = "grpo"
    aggregate: Literal["sum", "gdpo"] = Field(
        default="sum", description="sum: weighted sum, then normalise; gdpo: normalise each reward, then sum"
    )
    credit: Literal["episode", "turns"] = Field(
        default="episode",
        description="what a token is credited with. episode: its episode's reward; turns: the rewards from "
        "its turn on, minus their mean over the group's other episodes",
    )
    dynamic_sampling: DynamicSamplingConfig | None = None

    @model_validator(mode="after")
    def check_name(self) -> AdvantageConfig:
        if self.credit == "turns" and (self.name, self.aggregate) != ("rloo", "sum"):
            raise ValueError(
                "advantage.credit=turns subtracts leave-one-out means and does not normalise, since that "
                "would be biased by turn; use advantage.name=rloo and aggregate=sum with it, not "
                f"{self.name} and {self.aggregate}"
            )
        if self.aggregate == "gdpo" and self.name != "grpo":
            raise ValueError(
                "advantage.aggregate=gdpo normalises each reward by its group's deviation and would ignore "
                f"advantage.name={self.name}; use advantage.name=grpo, or advantage.aggregate=sum"
            )
        return self


class SamplerCorrectionConfig(Section):
    """Truncated importance sampling: weights the loss by old policy / sampler. It corrects for an engine
    whose log-probs differ from the policy's, and for samples of an older policy.
    """

    level: Literal["token", "sequence", "geometric"] = Field(default="token", description="of the ratio")
    mode: Literal["truncate", "mask"] = Field(default="truncate", description="outside low and high")
    low: float = Field(default=0.0, ge=0, description="smaller ratios are raised to it; mask: weigh 0")
    high: float = Field(default=2.0, gt=0, description="larger ratios are cut to it; mask: weigh 0")


CLIP_RANGES = {"gspo": (3e-4, 4e-4), "dapo": (0.2, 0.28), "cispo": (1.0, 4.0)}
"""(clip_low, clip_high) of a loss where they are not 0.2: GSPO arXiv:2507.18071 section 5.1, DAPO
arXiv:2503.14476, CISPO without a lower bound (arXiv:2506.13585) and weights up to 5 (ScaleRL,
arXiv:2510.13786).
"""


class LossConfig(Section):
    """DeepSeek-R1 (arXiv:2501.12948) equations (1)-(3) by default: clipped ratio, k3 KL, per-sequence mean.

    The clip range defaults to that of the loss's own paper (`CLIP_RANGES`), else to 0.2 and 0.2.

    Stale samples (train.max_staleness > 0) get the decoupled objective of arXiv:2110.00641 section 3 and
    arXiv:2505.24298. The clipped ratio is policy / old, where old is the policy before the step;
    `sampler_correction` weighs it by old / sampler. With one update per batch, old needs no forward pass, and
    a token's gradient is min(old / sampler, high) A grad log p. Without truncation that is the on-policy
    gradient, except for the weight of earlier tokens (level "sequence" includes it, with more variance).
    Clipping policy / sampler instead would give no gradient to a token that earlier steps moved beyond the
    clip range in the direction of its advantage. The KL term is not weighted.
    """

    name: Literal["grpo", "dr_grpo", "bnpo", "dapo", "gspo", "cispo", "sapo", "reinforce"] = "grpo"
    clip_low: float = Field(default=0.2, ge=0, le=1, description="ratio >= 1 - clip_low")
    clip_high: float = Field(default=0.2, ge=0, description="ratio <= 1 + clip_high")
    dual_clip: float | None = Field(
        default=None, gt=1, description="upper bound of the ratio where the advantage is negative"
    )
    kl_coef: float = Field(default=0.001, ge=0, description="0: no reference model")
    kl_estimator: Literal["k1", "k2", "k3"] = Field(default="k3", description="see rl/losses.py")
    kl_bias_correction: bool = Field(
        default=False,
        description="KL times the ratio (arXiv:2512.02556): the gradient of k1 or k3 is then the KL's",
    )
    entropy_coef: float = Field(default=0.0, ge=0, description="weight of the entropy bonus")
    mask_truncated: bool = Field(default=False, description="completions that were cut off give no gradient")
    sampler_correction: SamplerCorrectionConfig | None = SamplerCorrectionConfig()
    sapo_temperatures: tuple[PositiveFloat, PositiveFloat] = Field(
        default=(1.0, 1.05), description="for positive advantages, and for others"
    )

    @model_validator(mode="before")
    @classmethod
    def fill_clip_range(cls, values: Any) -> Any:
        """The clip range of the loss's own paper, where the user gave none."""
        if not isinstance(values, dict) or not isinstance(values.get("name"), str):
            return values
        low, high = CLIP_RANGES.get(values["name"], (0.2, 0.2))
        return {"clip_low": low, "clip_high": high, **values}

    @model_validator(mode="after")
    def check_dual_clip(self) -> LossConfig:
        if self.dual_clip is None:
            return self
        if self.name not in ("grpo", "dr_grpo", "bnpo", "dapo", "gspo"):
            raise ValueError(f"loss.dual_clip does nothing under loss.name={self.name}; remove it")
        if self.dual_clip <= 1 + self.clip_high:
            raise ValueError(
                f"loss.dual_clip={self.dual_clip} must be above 1 + loss.clip_high = {1 + self.clip_high:g}; "
                "use loss.dual_clip=3.0, or leave it out"
            )
        return self


class OptimizerConfig(Section):
    lr: float = Field(default=1e-6, gt=0, description="learning rate")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="of AdamW")
    eps: float = Field(default=1e-8, gt=0, description="of AdamW")
    weight_decay: float = Field(default=0.0, ge=0, description="on matrices only")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="of the learning rate after the warmup"
    )
    warmup_steps: int = Field(default=0, ge=0, description="steps until lr is reached")
    max_grad_norm: float = Field(default=1.0, gt=0, description="larger gradients are scaled to this norm")


class CheckpointConfig(Section):
    every: int = Field(default=50, ge=0, description="steps; 0: only at the end and on a signal")
    keep: int = Field(default=2, ge=1, description="number of newest checkpoints to keep")
