"""How a masked diffusion model wrote a completion, as a fragment of a report.

A colour says when a token was committed, from the first steps (yellow) to the last (violet). Text of models
is hostile: it is escaped, and its control characters are removed or made visible.
"""

from __future__ import annotations

from html import escape
from itertools import islice
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError, model_validator

from rl.store.ledger import Ledger
from rl.store.redact import redact, show_controls
from rl.types import Completion, ScoredGroup

COLOURS = ("#f7d13d", "#fca50a", "#f1731d", "#dd513a", "#bc3754", "#932667", "#6a176e", "#7b5cd6")
_NUM_CANDIDATES = 24
_MAX_TOKENS, _MAX_PIECE = 8192, 100  # shown of a completion, and characters of a token
_STYLE = """<style>
.denoising pre{white-space:pre-wrap;margin:0}
.denoising span{border-radius:2px;background:color-mix(in srgb,var(--c) 35%,transparent)}
@keyframes commit{from{opacity:.06}to{opacity:1}}
@media (prefers-reduced-motion:no-preference){.denoising pre:hover span{animation:commit .2s both;
animation-delay:calc(var(--s)*4s/var(--n))}}
</style>"""


class Trace(BaseModel, strict=True):
    """`facts["trace"]` of `rollout.diffusion.engine`."""

    steps: list[Annotated[int, Field(ge=0)]]
    tail_ids: list[int]
    num_steps: int
    pieces: list[str]

    @model_validator(mode="after")
    def check_steps(self) -> Trace:
        if max(self.steps, default=0) > self.num_steps:
            raise ValueError(f"a token was written in step {max(self.steps)} of {self.num_steps}")
        return self


def denoising_html(completion: Completion, caption: str = "") -> str:
    """A `<figure>` that stands on its own: tokens tinted by their step, replayed while the pointer is on it.

    Raises:
        ValueError: the completion has no trace.
    """
    trace, logprobs = trace_of(completion), completion.behavior_logprobs
    spans = []
    for i, (piece, when) in enumerate(tokens_of(trace)):
        sure = f", log-prob {logprobs[i]:.2f}" if i < len(logprobs) else ""
        title = f"step {when + 1} of {trace.num_steps}{sure}"
        colour = COLOURS[shade_of(when, trace)]
        text = escape(show_controls(piece))
        spans.append(f'<span style="--s:{when};--c:{colour}" title="{title}">{text}</span>')
    never = sum(step == trace.num_steps for step in trace.steps)
    note = f"{trace.num_steps} steps for {len(trace.steps) - never} of {len(trace.steps)} columns"
    return (
        f'<figure class="denoising" style="--n:{max(trace.num_steps, 1)}">{_STYLE}<figcaption>'
        f"{escape(show_controls(caption))} {note}</figcaption><pre>{''.join(spans)}</pre></figure>"
    )


def sampled_traces(ledger: Ledger) -> list[tuple[int, ScoredGroup, int]]:
    """(step, group, index in it) of completions with traces: the best and the worst of one group, in the
    first and the last recorded step. Steps are counted as in curves, by how many are done.
    """
    found, recorded = [], ledger.recorded()
    for step in dict.fromkeys([*recorded][:1] + [*recorded][-1:]):
        groups = (scored for rank in recorded[step][:_NUM_CANDIDATES] for scored in ledger.glance(step, rank))
        for scored in [*islice(groups, _NUM_CANDIDATES)]:  # all, so that damage among them is told
            if traced := [i for i, completion in enumerate(scored.completions) if _has_trace(completion)]:
                traced.sort(key=lambda i: -(scored.rewards[i].score or 0.0))
                found += [(step + 1, scored, i) for i in dict.fromkeys([traced[0], traced[-1]])]
                break
    return found


def trace_of(completion: Completion) -> Trace:
    given = completion.facts.get("trace")
    if given is None:
        raise ValueError("the completion has no trace: it was not sampled by a masked diffusion model")
    try:
        return Trace.model_validate(given)
    except ValidationError as error:
        raise ValueError(f"the completion's trace is damaged: {error.errors()[0]['msg']}") from None


def _has_trace(completion: Completion) -> bool:
    try:
        return bool(trace_of(completion))
    except ValueError:
        return False


def tokens_of(trace: Trace) -> list[tuple[str, int]]:
    """Pieces and their steps; one piece if the text holds a secret, which may lie across pieces."""
    text = "".join(trace.pieces)
    if redact(text) != text:
        return [(redact(text)[: _MAX_PIECE * _MAX_TOKENS], 0)]
    tokens = [(piece[:_MAX_PIECE], when) for piece, when in zip(trace.pieces, trace.steps, strict=False)]
    return tokens if len(tokens) <= _MAX_TOKENS else [*tokens[:_MAX_TOKENS], ("…", trace.num_steps)]


def shade_of(when: int, trace: Trace) -> int:
    return min(when * len(COLOURS) // max(trace.num_steps, 1), len(COLOURS) - 1)
