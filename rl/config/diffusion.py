"""The typed configuration of `recipes/llada.py`: pre-training and fine-tuning of diffusion models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from rl.config import CheckpointConfig, DataConfig, ModelConfig, OptimizerConfig, Section
from rl.config.data import PromptsConfig, SourceConfig, check_source
from rl.config.sections import HOME, RunDir, TokenBudget, Trackers, TrainedModelConfig, tokens_of


class TrainConfig(Section):
    steps: int = Field(default=100, ge=1, description="optimizer steps of the whole run")
    examples_per_step: int = Field(default=32, ge=1, description="over all processes")
    token_budget: TokenBudget = "auto"
    seed: int = Field(default=0, ge=0, description="seed of masks, data order and new weights")
    deterministic: bool = Field(default=True, description="deterministic algorithms on CPU: exact resume")
    max_bad_steps: int = Field(default=3, ge=1, description="consecutive non-finite steps that stop the run")
    shard: bool = Field(
        default=False, description="FSDP2: each process holds a share of weights, gradients and moments"
    )


class DiffusionModelConfig(TrainedModelConfig):
    name: Annotated[str, HOME] = Field(
        default="smollm2-135m-instruct", description="a LLaDA, or a causal model to convert"
    )
    mask_token: str | int | None = Field(
        default=None, description="token or id; default: the checkpoint's own, else a spare vocabulary row"
    )
    shift: bool | None = Field(
        default=None,
        description="the left neighbour predicts a token (Dream); default: as the checkpoint says",
    )
    from_scratch: dict[str, Any] | None = Field(
        default=None,
        description="start from random weights in the shape of the causal checkpoint `name`, with these "
        "fields of its config.json changed",
    )
    compile: bool = Field(default=False, description="torch.compile of every layer")

    @model_validator(mode="after")
    def check_from_scratch(self) -> DiffusionModelConfig:
        if self.from_scratch is not None and self.lora is not None:
            raise ValueError(
                "model.lora saves adapters only, and no checkpoint would hold the random weights of "
                "model.from_scratch below them; use model.lora=null"
            )
        return self

    def plain(self, name: str) -> ModelConfig:
        """The keys that loaders of tokenizer, dtype and adapters read."""
        return ModelConfig(
            name=name,
            revision=self.revision,
            dtype=self.dtype,
            fused_layers=self.fused_layers and not self.compile,  # the compiler fuses by itself
            lora=self.lora,
            chat_template=self.chat_template,
        )


class TextConfig(PromptsConfig):
    """Rows in TRL's formats: `prompt` and `completion` (text or messages), `messages`, or `text`.

    `text` is pre-training: rows are joined, an end-of-text token after each, and cut every `max_length`.
    """

    source: Annotated[str, HOME] = Field(
        description="hub name, file or folder that `datasets` reads, or module:callable"
    )
    format: Literal["auto", "prompt_completion", "messages", "text"] = Field(
        default="auto", description="auto: by the columns of the first row"
    )
    completion_column: str = Field(default="completion", description="the answer, text or messages")
    chat: bool = Field(default=True, description="text becomes messages; false: prompt and answer stay plain")
    max_length: int = Field(default=1024, ge=2, description="tokens of prompt and answer")
    too_long: Literal["error", "drop"] = Field(default="error", description="for rows beyond max_length")

    @model_validator(mode="after")
    def check_template(self) -> TextConfig:
        if "{prompt}" not in self.template:
            raise ValueError(f"template={self.template!r} has no {{prompt}}, and is not a template's name")
        return self

    def rows(self) -> DataConfig:
        return DataConfig(**{name: getattr(self, name) for name in SourceConfig.model_fields})


class EosConfig(Section):
    """What follows an answer. End-of-text padding is part of the answer: masked, scored and seen.

    It teaches a model with a canvas of fixed length to end its text before the canvas does. Long padding
    teaches it to end too early; `rainbow` (one end of text, then a cycle of other tokens) avoids that.
    """

    policy: Literal["batch_max", "multiple", "single", "rainbow"] = Field(
        default="batch_max", description="pad to the step's longest example, to a multiple, or not at all"
    )
    multiple: int = Field(default=32, ge=1, description="tokens; policy=multiple only")
    rainbow_tokens: list[str | int] = Field(
        default=[], description="tokens that text never uses, in order; policy=rainbow only, 7 in the paper"
    )

    @model_validator(mode="after")
    def check_rainbow(self) -> EosConfig:
        if self.policy == "rainbow" and not self.rainbow_tokens:
            raise ValueError(
                "eos.policy=rainbow pads with a cycle of tokens that text never uses: list them in "
                "eos.rainbow_tokens (7 reserved special tokens), or use eos.policy=batch_max"
            )
        return self


class ObjectiveConfig(Section):
    """How masks are drawn and weighted (rl/diffusion/objectives.py). LLaDA's reference code is `bernoulli`
    with `systematic: false`.
    """

    scheme: Literal["coupled", "count", "subset", "bernoulli"] = Field(
        default="coupled", description="how the masked tokens are drawn"
    )
    systematic: bool = Field(default=True, description="noise levels spread evenly over the step's examples")
    num_draws: int = Field(default=1, ge=1, description="mask draws per example and step")
    normaliser: Literal["sequence", "token"] = Field(
        default="sequence", description="each example counts equally (LLaDA), or each token does"
    )
    random_length_share: float = Field(
        default=0.0, ge=0, le=1, description="`text` cut to a random length; 0.01 in LLaDA's pre-training"
    )


class BoundConfig(Section):
    """Measures the bound on held-out text before, every `every` steps and after, with the same masks."""

    data: TextConfig | None = Field(default=None, description="default: no evaluation")
    every: int = Field(default=0, ge=0, description="0: only before and after")
    num_draws: int = Field(default=4, ge=1, description="mask draws per example")


class DiffusionConfig(Section):
    """A whole run of pre-training or supervised fine-tuning."""

    run_dir: RunDir = Path("runs/llada")
    trackers: Trackers = Field(default=[])
    train: TrainConfig = TrainConfig()
    model: DiffusionModelConfig = DiffusionModelConfig()
    data: TextConfig
    eos: EosConfig = EosConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=2.5e-5, weight_decay=0.1, warmup_steps=50)
    evaluation: BoundConfig = BoundConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    copies_weights: ClassVar[bool] = False

    @property
    def token_budget(self) -> int:
        """Tokens of a forward pass."""
        return tokens_of(self.train.token_budget)

    @property
    def in_flight(self) -> int:
        """Noised copies of a step, over all processes."""
        copies = 2 if self.objective.scheme == "coupled" else 1
        return copies * self.objective.num_draws * self.train.examples_per_step

    @property
    def longest_row(self) -> int:
        """Tokens of the longest example, padding included."""
        unit = self.eos.multiple if self.eos.policy == "multiple" else 1
        return -(-self.data.max_length // unit) * unit

    longest_sequence = longest_row

    @model_validator(mode="after")
    def check_sources(self) -> DiffusionConfig:
        check_source(self.data, "data")
        if self.evaluation.data is not None:
            check_source(self.evaluation.data, "evaluation.data")
        return self
