"""The section `teacher` of a run: the model that it distils from, beside rewards or instead of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rl.config.sections import HOME, SERVER, Section

DEMONSTRATED = (
    "Here is a worked solution of the problem below.\n\n{demonstration}\n\nUnderstand it, then solve the "
    "problem from the start in your own words.\n\n{prompt}"
)


class TeacherConfig(Section):
    """On-policy distillation: the policy samples, the teacher scores its tokens (arXiv:2306.13649).

    The teacher may be the policy itself where it reads a demonstration (arXiv:2601.18734, 2601.19897).
    Rewards may be left out (`rewards.functions: []`), or have weight 0 and only be logged.
    """

    name: Annotated[str, HOME] | None = Field(
        default=None,
        description="hub name or folder; its tokenizer must have the same ids as the model's. Default, with "
        "a demonstration: the policy as it is at each step",
    )
    url: str | None = Field(
        default=None,
        pattern=SERVER,
        description="vLLM server of the teacher, such as http://127.0.0.1:8000, in place of name",
    )
    token_file: Annotated[str, HOME] | None = Field(
        default=None, description="file of the token that the server asks for; default: it asks for none"
    )
    timeout_s: float = Field(default=600.0, gt=0, description="longest wait for the server, or one answer")
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub name")
    dtype: Literal["bf16", "fp32"] = Field(default="bf16", description="of its weights and its compute")
    divergence: Literal["sampled", "reverse", "forward", "jsd"] = Field(
        default="sampled",
        description="sampled: log teacher - log policy of a sampled token is its advantage; reverse KL, "
        "forward KL or Jensen-Shannon (jsd): over the teacher's top_k ids, all others counted as one",
    )
    coef: float = Field(
        default=1.0, gt=0, description="weight of the divergence beside the advantages from rewards"
    )
    top_k: int = Field(default=32, ge=1, description="likeliest ids of the teacher; not used by sampled")
    demonstration: str | None = Field(
        default=None,
        description="column of data, such as a worked solution, that only the teacher reads",
    )
    template: str = Field(
        default=DEMONSTRATED,
        description="what the teacher reads in place of the prompt's text, or of the last message; "
        "{demonstration} and {prompt} are replaced",
    )

    @property
    def asked_ids(self) -> int:
        """Ids of the teacher's distribution that are compared with the policy's."""
        return 0 if self.divergence == "sampled" else self.top_k

    @property
    def is_policy(self) -> bool:
        return self.name is None and self.url is None

    @model_validator(mode="after")
    def check_kind(self) -> TeacherConfig:
        """Raises ValueError for keys that do nothing with this kind of teacher."""
        if (self.name is None) == (self.url is None) and (self.name or not self.demonstration):
            raise ValueError(
                "teacher needs one of teacher.name and teacher.url, or teacher.demonstration=COLUMN alone: "
                "then the policy teaches itself"
            )
        fields = type(self).model_fields
        for needed, keys in (("name", ("revision", "dtype")), ("url", ("token_file", "timeout_s"))):
            idle = [key for key in keys if getattr(self, key) != fields[key].default]
            if idle and getattr(self, needed) is None:
                raise ValueError(f"teacher.{idle[0]} does nothing without teacher.{needed}; leave it out")
        if self.demonstration is None and self.template != DEMONSTRATED:
            raise ValueError("teacher.template does nothing without teacher.demonstration; leave it out")
        if missing := [x for x in ("{demonstration}", "{prompt}") if x not in self.template]:
            raise ValueError(
                f"teacher.template={self.template!r} has no {missing[0]}; write it where it belongs"
            )
        return self


def check_teacher(config: Any) -> None:
    """Raises ValueError for a run without anything to learn from, or that cannot use its teacher."""
    if config.teacher is None:
        if not any(spec.weight for spec in config.paid_rewards):
            raise ValueError(
                "rewards.functions pay nothing and there is no teacher, so nothing is learnt; give a reward "
                "a weight, such as rewards.functions=[{name: math}], or set teacher.name"
            )
        return
    if config.advantage.dynamic_sampling and not any(spec.weight for spec in config.paid_rewards):
        raise ValueError(
            "advantage.dynamic_sampling replaces groups whose rewards are equal, but without paid rewards "
            "all are equal; leave it out, or give a reward a weight"
        )
    if config.teacher.demonstration and config.environment is not None:
        raise ValueError(
            "teacher.demonstration needs completions of one turn, but an environment has several, with "
            "prompts of their own; leave one of the two out"
        )
    if config.teacher.url is not None and config.sampling.temperature != 1:
        raise ValueError(
            f"sampling.temperature={config.sampling.temperature}, and the log-probs of teacher.url are of "
            "temperature 1; use sampling.temperature=1.0, or teacher.name"
        )
    if config.teacher.url is not None and config.teacher.url.rstrip("/") in [
        u.rstrip("/") for u in config.engine.urls
    ]:
        raise ValueError(
            f"teacher.url={config.teacher.url} is one of engine.urls, which are given the policy's weights; "
            "serve the teacher on a port of its own"
        )
