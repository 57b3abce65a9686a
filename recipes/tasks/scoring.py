"""A vLLM server that scores tokens which others sampled, as a teacher does. Any will do; imports no vLLM.

Rows go to `/v1/completions` as token ids, with `prompt_logprobs`: log-probs of raw logits at temperature 1.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.store.folder import write_atomically
from rl.weights import canary_ids
from rollout.engine import EngineError
from rollout.vllm.control import Control, ServerDead
from rollout.vllm.core import NOT_FINITE, UNREAD
from rollout.vllm.served import POLL_S

DRIFT_NATS = 0.15  # the same bf16 weights, alone and beside long rows: 0.04 (SmolLM2-135M, vLLM on a CPU)


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """For each token of a row except the first: its log-prob and those of the k likeliest ids, in nats."""

    logprobs: list[float]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]


class ScoringServer:
    """One server. Every wait is bounded by `timeout_s`; a fault is an error that names server and request.

    Args:
        token: what its lock asks for; empty: it has none.
        record: file with its model's canary, a row of every request: fixed ids, and their log-probs when the
            run began. `check` writes it if it is missing.
    """

    def __init__(self, url: str, token: str, *, timeout_s: float, record: Path | None = None) -> None:
        self._control = Control(url, token or "none", timeout_s=timeout_s)
        self.url, self._named, self._record = self._control.url, "", record
        self._canary: dict[str, list[Any]] = {}

    def model(self) -> tuple[str, int]:
        """Its model's name or folder, and the most tokens of a row with one sampled; faults as `score`."""
        card = self._control.call("GET", "/v1/models", "its model", lambda found: dict(found["data"][0]))
        if not card.keys() >= {"root", "max_model_len"}:
            raise ValueError(f"server {self.url} does not say what vLLM says of a model; serve it with vLLM")
        return card["root"], card["max_model_len"]

    def wait(self, say: Callable[[str], None]) -> None:
        """Waits while nobody answers, for `timeout_s` at most; `say` is told so, and why.

        Raises:
            EngineError, ValueError: nobody did; or as `model`, at once.
        """
        deadline, is_said = time.monotonic() + self._control.timeout_s, False
        while True:
            try:
                self.model()
                return
            except ServerDead as error:
                if isinstance(error.__cause__, UNREAD) or time.monotonic() > deadline:
                    raise
                if not is_said:
                    limit = f"teacher.timeout_s={self._control.timeout_s:g}"
                    say(f"the teacher does not answer yet ({error}); waiting for it for {limit} at most")
                    is_said = True
            time.sleep(POLL_S)

    def score(self, rows: Sequence[list[int]], k: int) -> list[ScoredRow]:
        """In order; one request for all rows.

        Raises:
            EngineError: it does not answer in time, or not with a finite log-prob of every token; or it is
                now another model than at the first call, or has other weights than when the run began.
            ValueError: it refuses the request, such as more than its --max-logprobs.
        """
        if not self._canary and self._record is not None and self._record.is_file():
            self._canary = json.loads(self._record.read_bytes())
        rows = [*rows, self._canary["ids"]] if self._canary else rows
        body = {"prompt": rows, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": k}
        what = f"log-probs of {len(rows)} rows"
        answer = self._control.call("POST", "/v1/completions", what, json=body)
        try:
            self._named = self._named or answer["model"]
            if answer["model"] != self._named:
                raise EngineError(
                    f"server {self.url} now serves {answer['model']} in place of {self._named}; start the "
                    "model that the run began with again, and resume"
                )
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            found = [_read(c["prompt_logprobs"], ids, k) for c, ids in zip(choices, rows, strict=True)]
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(
                f"server {self.url}: {what}: its answer lacks a log-prob ({type(error).__name__}: {error})"
            ) from error
        if self._canary:
            self._compare(found.pop().logprobs, self._canary["logprobs"])
        return found

    def _compare(self, logprobs: list[float], before: list[float]) -> None:
        mean = math.fsum(abs(a - b) for a, b in zip(logprobs, before, strict=True)) / len(before)
        if not mean <= DRIFT_NATS:
            raise EngineError(
                f"server {self.url}: its model {self._named} has other weights than when the run began: the "
                f"canary's log-probs are {mean:.3g} nats from those in {self._record} on average, more than "
                f"{DRIFT_NATS:g}; serve the former ones and resume, or remove that file to go on with these"
            )

    def check(self, tokenizer: Any, longest: int, k: int) -> None:
        """Compares its tokenizer with the policy's, and looks at the log-probs of a probe.

        Args:
            longest: tokens of the longest row.

        Raises:
            EngineError, ValueError: as `score`; ids stand for other tokens, rows are too long for it, or what
                it answers with are not log-probs.
        """
        name, limit = self.model()
        if longest >= limit:
            raise ValueError(
                f"server {self.url}: its model {name} takes {limit - 1} tokens with one to sample, and the "
                f"longest row may have {longest}; serve it with --max-model-len {longest + 1}"
            )
        ids = sorted(tokenizer.get_vocab().values())
        asked = ("POST", "/detokenize", "its vocabulary", lambda found: found["prompt"])
        theirs = self._control.call(*asked, json={"tokens": ids})
        if theirs != (ours := tokenizer.decode(ids)):
            differing = (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
            at = max(0, next(differing, min(len(ours), len(theirs))) - 5)
            raise ValueError(
                f"server {self.url}: its model {name} has another tokenizer: ids stand for "
                f"{ours[at : at + 20]!r} here and {theirs[at : at + 20]!r} there; serve one of the family"
            )
        (row,) = self.score([probe := canary_ids(tokenizer, limit)], max(k, 1))
        mass = max(math.fsum(map(math.exp, found)) for found in row.top_logprobs)
        least = min(found[0] for found in row.top_logprobs)  # the likeliest id has 1 / vocabulary or more
        if not (max(row.logprobs) <= 1e-4 and mass <= 1 + 1e-3 and least >= -math.log(2 * len(ids))):
            raise ValueError(
                f"server {self.url}: the {max(k, 1)} likeliest ids of a probe have the mass {mass:.3g}, and "
                f"one likeliest id has {least:.3g} nats, so these are not log-probs; serve it with "
                "--logprobs-mode raw_logprobs"
            )
        if self._record is not None and not self._record.is_file():
            write_atomically(self._record, json.dumps({"ids": probe, "logprobs": row.logprobs}))


def _read(found: list[Any], ids: list[int], k: int) -> ScoredRow:
    """Raises ValueError, KeyError or TypeError where something is missing or not finite."""
    pairs = list(zip(found, ids, strict=True))[1:]
    own = [at[str(token)]["logprob"] for at, token in pairs]
    best = [sorted((e["rank"], int(i), e["logprob"]) for i, e in at.items())[:k] for at, _ in pairs]
    if any(len(one) < k for one in best):
        raise ValueError(f"fewer than {k} likeliest ids of a token")
    if not all(NOT_FINITE < x < math.inf for x in own) or any(math.isnan(x) for e in best for *_, x in e):
        raise ValueError("a log-prob that is not finite")
    return ScoredRow(own, [[i for _, i, _ in one] for one in best], [[x for *_, x in one] for one in best])
