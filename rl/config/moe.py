"""The section `moe` of a run: how the experts of a mixture-of-experts model are trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rl.config.sections import HOME, Auto, Section


class MoeConfig(Section):
    """For mixture-of-experts models only; without routers these keys have no effect."""

    replay: Auto | Literal["engine", "none"] = Field(
        default="auto",
        description="engine: training uses the experts that sampling used (arXiv:2510.11370); auto: where "
        "the engine returns them",
    )
    router: Auto | Literal["train", "freeze"] = Field(
        default="auto", description="auto: frozen beside adapters or chosen experts, else trained"
    )
    router_fp32: bool = Field(default=False, description="routers compute in fp32, in policy and engine")
    balance: Literal["none", "switch", "sequence", "entropy"] = Field(
        default="none", description="loss that spreads tokens over experts, per layer over the whole batch"
    )
    balance_coef: float = Field(default=1e-3, ge=0, description="its weight; a balanced layer's loss is 1")
    z_loss_coef: float = Field(default=0.0, ge=0, description="weight of mean(logsumexp(logits) ** 2)")
    bias_rate: float = Field(
        default=0.0, ge=0, description="step of routers' biases: balance without a loss (arXiv:2408.15664)"
    )
    experts_implementation: Auto | Literal["grouped_mm", "batched_mm", "eager"] = Field(
        default="auto",
        description="how experts are computed; auto: the fastest in a measurement, kept for the whole run; "
        "another run of the same seed may choose another",
    )
    trained_experts: Annotated[str, HOME] | None = Field(
        default=None, description="path of an ESFT json: only the experts it names are trained"
    )

    @property
    def freezes(self) -> bool:
        """Whether weights of a model without adapters are frozen."""
        return self.router == "freeze" or self.trained_experts is not None
