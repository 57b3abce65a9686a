"""Traces: reads those that were sampled elsewhere, and chooses which graded ones are kept."""

from __future__ import annotations

import json
import math
import os
import time
import unicodedata
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from http.client import HTTPException
from typing import Any

from recipes.tasks.prompts import unrendered_prompt
from rl.config import DataConfig
from rl.config.traces import TracesConfig
from rl.types import Call, Completion, Group, Prompt, Reward, ScoredGroup

ATTEMPTS, PAUSE_S = 3, 2.0
NUM_REQUESTS = 32  # at once, unless engine.max_num_seqs is given


@dataclass(frozen=True)
class Trace:
    """A verified completion, number `sample` of its prompt, which has the share `pass_rate` of right ones."""

    prompt: Prompt
    sample: int
    text: str
    reward: Reward
    pass_rate: float


def read_traces(
    data: DataConfig, rows: Sequence[Mapping[str, Any]], column: str
) -> tuple[list[Prompt], Callable[[Call], list[Group]]]:
    """The prompts of a file of traces, each pair of prompt and gold once, and a function that answers them.

    A cell is a completion (text, or messages, whose last one counts), or a list of texts.

    Raises:
        ValueError: a row lacks the column, or holds something else there.
    """
    prompts: dict[str, Prompt] = {}
    texts: dict[str, list[str]] = {}
    for index, row in enumerate(rows):
        if column not in row:
            raise ValueError(
                f"sample.completion_column: row {index} has no {column!r}; it has {', '.join(row)}"
            )
        others = {name: value for name, value in row.items() if name != column}
        prompt = unrendered_prompt(data, others, f"traces/{index:06d}")
        asked = [prompt.text, prompt.messages, prompt.columns.get("answer")]
        known = prompts.setdefault(json.dumps(asked), prompt)
        texts.setdefault(known.id, []).extend(_texts(row[column], f"row {index}, column {column!r}"))
    made = {
        name: [Completion([], [], [], "stop", [], text=text) for text in some] for name, some in texts.items()
    }
    return list(prompts.values()), lambda call: [Group(p, list(made[p.id])) for p in call.prompts]


def _texts(cell: Any, where: str) -> list[str]:
    if isinstance(cell, list) and cell and isinstance(cell[-1], Mapping):
        cell = cell[-1].get("content")
    found = [cell] if isinstance(cell, str) else cell
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ValueError(f"{where}: a trace is text, a chat, or a list of texts, not {cell!r:.60}")
    return found


def ask_endpoint(config: TracesConfig, call: Call) -> list[Group]:
    """Completions of an OpenAI-compatible server; reasoning returned in a field of its own goes into <think>.

    Raises:
        RuntimeError: more requests failed than rewards.max_fault_share; fewer become "abort" completions.
    """
    slots, faults = config.engine.max_num_seqs, []

    def ask(job: tuple[Prompt, int]) -> Completion:
        for attempt in range(ATTEMPTS):
            try:
                return _answer(config, *job)
            except (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
                faults.append(f"{type(error).__name__}: {error}")
                time.sleep(PAUSE_S * attempt)
        return Completion([], [], [], "abort", [])

    size = call.num_completions
    jobs = [(p, seed + g) for p, seed in zip(call.prompts, call.seeds, strict=True) for g in range(size)]
    with ThreadPoolExecutor(slots if isinstance(slots, int) else NUM_REQUESTS) as pool:
        found = list(pool.map(ask, jobs))
    lost, share = sum(c.finish_reason == "abort" for c in found), config.rewards.max_fault_share
    if lost == len(found) or lost > max(1, share * len(found)):
        raise RuntimeError(
            f"sample.endpoint={config.sample.endpoint} failed on {lost} of {len(found)} requests, more than "
            f"rewards.max_fault_share={share}: {faults[-1]}; nothing of this record is kept: start again to "
            "ask for all of it"
        )
    return [Group(p, found[i * size : (i + 1) * size]) for i, p in enumerate(call.prompts)]


def _answer(config: TracesConfig, prompt: Prompt, seed: int) -> Completion:
    s = config.sampling
    asked = {"messages": list(prompt.messages)} if prompt.messages else {"prompt": prompt.text}
    body = {"model": config.model.name, **asked, "max_tokens": s.max_completion_length, "seed": seed}
    body |= {"temperature": s.temperature, "top_p": s.top_p} | ({"stop": s.stop} if s.stop else {})
    own = {name: getattr(s, name) for name in ("top_k", "min_p", "stop_token_ids")}  # vLLM only
    own["chat_template_kwargs"] = config.data.chat_template_kwargs if prompt.messages else {}
    body |= {name: value for name, value in own.items() if value}
    head = {"Content-Type": "application/json"}
    if key := os.environ.get("COHORT_ENDPOINT_KEY"):
        head["Authorization"] = f"Bearer {key}"
    url = f"{str(config.sample.endpoint).rstrip('/')}/{'chat/' if prompt.messages else ''}completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), head)
    with urllib.request.urlopen(request, timeout=config.engine.timeout_s) as reply:
        choice = json.loads(reply.read())["choices"][0]
    said = choice.get("message") or {"content": choice.get("text")}
    thought = said.get("reasoning_content") or said.get("reasoning")
    text = (f"<think>{thought}</think>" if thought else "") + (said["content"] or "")
    return Completion([], [], [], "stop" if choice["finish_reason"] == "stop" else "length", [], text=text)


def verified(reward: Reward, least: Mapping[str, float]) -> bool | None:
    """Whether every named reward reached its least score; None if one of them abstained."""
    scores = [reward.parts.get(name) for name in least]
    if any(score is None for score in scores):
        return None
    return all(score >= low for score, low in zip(scores, least.values(), strict=True) if score is not None)


def choose(groups: Iterable[ScoredGroup], config: TracesConfig) -> tuple[list[Trace], dict[str, Any]]:
    """The traces that are kept, in order, and counts.

    For each prompt these are the first verified ones that were not cut off, each text once, even if several
    rows have the prompt. A row's pass rate leaves out aborted completions and those whose grader abstained.
    In each band of pass rates, the rows that are kept are drawn by a hash of seed and id.
    """
    s, counts = config.sample, Counter[str]()
    bands: list[list[list[Trace]]] = [[] for _ in s.bands]
    texts: dict[str, set[str]] = {}
    for group in groups:
        counts["prompts"] += 1
        verdicts = [
            None if completion.finish_reason == "abort" else verified(reward, config.verify)
            for completion, reward in zip(group.completions, group.rewards, strict=True)
        ]
        right, graded = verdicts.count(True), len(verdicts) - verdicts.count(None)
        counts.update(completions=len(verdicts), graded=graded, verified=right)
        known = texts.setdefault(json.dumps([group.prompt.text, group.prompt.messages]), set())
        some: list[Trace] = []
        for i, (completion, reward) in enumerate(zip(group.completions, group.rewards, strict=True)):
            text = " ".join(unicodedata.normalize("NFKC", completion.text).split())
            is_new = text not in known and len(known) < (s.max_per_prompt or math.inf)
            if verdicts[i] and completion.finish_reason == "stop" and is_new:
                known.add(text)
                some.append(Trace(group.prompt, i, completion.text, reward, right / graded))
        if some:
            band = next(i for i, (edge, _) in enumerate(s.bands) if right / graded <= edge)
            bands[band].append(some)
    mark = lambda some: sha256(f"{s.seed}/{some[0].prompt.id}".encode()).hexdigest()  # noqa: E731
    kept = [
        some for band, (_, most) in zip(bands, s.bands, strict=True) for some in sorted(band, key=mark)[:most]
    ]
    traces = sorted((t for some in kept for t in some), key=lambda t: (t.prompt.id, t.sample))
    counts.update(kept=len(traces), kept_prompts=len(kept))
    by_band = {f"up to {edge:g}": len(band) for (edge, _), band in zip(s.bands, bands, strict=True)}
    return traces, {**counts, "prompts_with_a_trace": by_band}
