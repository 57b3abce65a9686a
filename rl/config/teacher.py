"""The section `teacher` of a run: the model that it distils from, beside rewards or in place of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from rl.config.sections import HOME, Section


class TeacherConfig(Section):
    """On-policy distillation: the policy samples, the teacher scores its tokens (arXiv:2306.13649).

    Rewards may be left out (`rewards.functions: []`), or have weight 0 and be logged alone.
    """

    name: Annotated[str, HOME] = Field(
        description="hub name or folder; it has the ids of the model's tokenizer"
    )
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub name")
    dtype: Literal["bf16", "fp32"] = Field(default="bf16", description="of its weights and its compute")
    divergence: Literal["sampled", "reverse", "forward", "jsd"] = Field(
        default="sampled",
        description="sampled: log teacher - log policy of a sampled token is its advantage; reverse KL, "
        "forward KL or Jensen-Shannon: over the teacher's top_k ids and all others as one",
    )
    coef: float = Field(
        default=1.0, gt=0, description="weight of the divergence beside advantages of rewards"
    )
    top_k: int = Field(default=32, ge=1, description="ids of the teacher's distribution; sampled reads none")


def check_teacher(config: Any) -> None:
    """Raises ValueError for a run that learns from nothing, or that cannot use its teacher."""
    if config.teacher is None:
        if not any(spec.weight for spec in config.paid_rewards):
            raise ValueError(
                "rewards.functions pay nothing and there is no teacher, so nothing is learnt; give a reward "
                "a weight, such as rewards.functions=[{name: math}], or set teacher.name"
            )
        return
    if config.advantage.dynamic_sampling and not any(spec.weight for spec in config.paid_rewards):
        raise ValueError(
            "advantage.dynamic_sampling replaces groups whose rewards are equal, and without paid rewards "
            "all are; leave it out, or give a reward a weight"
        )
    if config.loss.name == "gspo" and config.teacher.divergence == "sampled":
        raise ValueError(
            "loss.name=gspo has one ratio for a sequence, and a teacher's advantages differ between tokens; "
            "use loss.name=grpo or dapo, or teacher.divergence=reverse"
        )
