"""The section `moe` of a run: what is done about the experts of a mixture-of-experts model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rl.config.sections import HOME, Auto, Section


class MoeConfig(Section):
    """Mixture-of-experts models only; of a model without routers every key does nothing."""

    replay: Auto | Literal["engine", "none"] = Field(
        default="auto",
        description="engine: training uses the experts that sampling used (arXiv:2510.11370); auto: where "
        "the engine returns them",
    )
    router: Auto | Literal["train", "freeze"] = Field(
        default="auto", description="auto: frozen beside adapters or chosen experts, else trained"
    )
    router_fp32: bool = Field(
        default=False, description="logits and scores of routers in fp32, in policy and engine"
    )
    balance: Literal["none", "switch", "sequence", "entropy"] = Field(
        default="none", description="loss that spreads tokens over experts, per layer over the whole batch"
    )
    balance_coef: float = Field(default=1e-3, ge=0, description="its weight; 1 is a balanced layer's loss")
    z_loss_coef: float = Field(default=0.0, ge=0, description="weight of mean(logsumexp(logits) ** 2)")
    bias_rate: float = Field(
        default=0.0, ge=0, description="step of the selection bias without a loss (arXiv:2408.15664)"
    )
    experts_implementation: Auto | Literal["grouped_mm", "batched_mm", "eager"] = Field(
        default="auto",
        description="how experts are computed; auto: the fastest of a measurement; a run keeps its way, "
        "another run of the same seed may take another one",
    )
    trained_experts: Annotated[str, HOME] | None = Field(
        default=None, description="path of an ESFT json: only the experts it names are trained"
    )
