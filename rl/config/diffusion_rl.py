"""The configuration of RL for a masked diffusion model: that of any run, and how it samples and is scored."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from rl.config import Config, Section


class EstimatorConfig(Section):
    """What is used as the log-prob of a completion (rl/diffusion/estimators.py)."""

    name: Literal["one_step", "elbo", "sandwich", "trace"] = Field(
        default="elbo", description="one_step: diffu-GRPO; elbo: ESPO; sandwich: SPG; trace: TraceRL"
    )
    num_draws: int = Field(default=1, ge=1, description="mask draws per completion; not trace")
    prompt_mask: float = Field(
        default=0.0, ge=0, lt=1, description="probability of masking a prompt token; all but trace"
    )
    beta: float = Field(default=1.5, ge=1, description="exponent of the upper bound; sandwich only")
    mix: float = Field(
        default=0.5, ge=0, le=1, description="share of the upper bound where the advantage is negative"
    )
    merge: int = Field(default=1, ge=1, description="steps of the sampler that share a canvas; trace only")
    max_canvases: int | None = Field(
        default=None, ge=1, description="canvases per completion, drawn at random, reweighted; trace only"
    )


class MaskedConfig(Section):
    """The mask token, and how canvases are filled (rollout/diffusion/steps.py)."""

    mask_token: str | int | None = Field(
        default=None, description="token or id; default: the checkpoint's own, else a spare vocabulary row"
    )
    shift: bool | None = Field(
        default=None, description="the left neighbour predicts a token (Dream); default: as the model says"
    )
    block_length: int = Field(
        default=32, ge=1, description="tokens of a block; it is decoded before the next block begins"
    )
    steps_per_block: int | None = Field(default=None, ge=1, description="default: one per token")
    remasking: Literal["low_confidence", "random", "margin", "entropy"] = Field(
        default="low_confidence", description="which tokens of a step are kept"
    )
    threshold: float | None = Field(
        default=None, gt=0, le=1, description="also commits tokens of higher probability; default: off"
    )
    cache: Literal["none", "prefix", "dual"] = Field(
        default="none",
        description="keys and values kept between steps: of the prefix, or of all outside the block",
    )
    refresh_every: int = Field(default=0, ge=0, description="steps per refresh; 1: exact; 0: once per block")
    estimator: EstimatorConfig = EstimatorConfig()


class MaskedRunConfig(Config):
    """A whole RL run of a masked diffusion model."""

    diffusion: MaskedConfig = MaskedConfig()

    @model_validator(mode="before")
    @classmethod
    def correct_traces_alone(cls, given: Any) -> Any:
        """Turns the sampler correction off by default; only `trace` can be compared with the sampler."""
        if isinstance(given, dict):
            diffusion, loss = given.get("diffusion", {}), given.get("loss", {})
            estimator = diffusion.get("estimator", {}) if isinstance(diffusion, dict) else {}
            is_traced = isinstance(estimator, dict) and estimator.get("name") == "trace"
            if isinstance(loss, dict) and not is_traced:
                return given | {"loss": {"sampler_correction": None} | loss}
        return given

    @model_validator(mode="after")
    def check_estimator(self) -> MaskedRunConfig:
        e, loss = self.diffusion.estimator, self.loss
        if e.name == "sandwich" and e.num_draws < 2:
            raise ValueError(
                "diffusion.estimator.name=sandwich with num_draws=1 scores each token once, and its upper "
                "bound then equals the lower one; use diffusion.estimator.num_draws=2 or more"
            )
        if e.name != "trace" and loss.sampler_correction is not None:
            raise ValueError(
                f"diffusion.estimator.name={e.name} is not a probability that the sampler drew from, so it "
                "cannot be compared with the sampler's: use loss.sampler_correction=null, or "
                "estimator.name=trace"
            )
        if e.name == "sandwich" and (loss.name != "reinforce" or loss.kl_coef > 0):
            raise ValueError(
                "diffusion.estimator.name=sandwich has another value for each sign of the advantage, so "
                f"ratio and KL are undefined, but loss is {loss.name} with kl_coef={loss.kl_coef:g}; use "
                "loss.name=reinforce, loss.kl_coef=0"
            )
        if e.max_canvases is not None and (loss.kl_coef > 0 or loss.entropy_coef > 0):
            raise ValueError(
                f"diffusion.estimator.max_canvases={e.max_canvases} scores only some tokens, but KL and "
                "entropy terms need all; use loss.kl_coef=0, loss.entropy_coef=0, or max_canvases=null"
            )
        if self.model.keep_logits is True:
            raise ValueError("model.keep_logits=true does nothing for a diffusion model; leave it out")
        if asked := self.moe.model_dump(exclude_defaults=True):
            raise ValueError(f"moe: {', '.join(asked)} do nothing for a diffusion model; remove section moe")
        if self.teacher is not None:
            raise ValueError(
                "teacher scores sampled tokens from left to right, but a diffusion model has no such "
                "log-probs; leave the section out"
            )
        if self.engine.name != "auto":
            raise ValueError(
                f"engine.name={self.engine.name} serves causal models; a diffusion model has its own "
                "sampler: use engine.name=auto"
            )
        if self.advantage.name == "wd1" and loss.name != "reinforce":
            raise ValueError(
                f"advantage.name=wd1 makes weights for log-probs without a ratio, but loss.name={loss.name} "
                "has one; use loss.name=reinforce"
            )
        return self
